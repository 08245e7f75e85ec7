"""The command ``python -m bn_fast``: what this build is, whether it is right, how fast it is here.

It needs nothing but NumPy, compares with PyTorch where that is installed, and ends in under half a
minute. The exit status is 1 if a check fails.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bn_fast
from bn_fast import reference

Array = NDArray[Any]
Calls = dict[tuple[str, str], Callable[[], Any]]  # by name and direction
Errors = tuple[float, float]  # the largest of out and dx, and of dgamma and dbeta

EPS = 1e-5  # the default of bn_param["eps"]

# Errors are counted in roundings: the dtype's eps times the largest value of the right answer.
# A result takes three or four. dgamma and dbeta are sums of M terms of either sign: they end up
# small against what is rounded on the way, and an error of 1.5e-5 in float32 is allowed.
LIMIT, LIMIT_OF_SUMS = 4.0, 128.0
# NumPy adds up one row after the other, which costs it some digits of mean and x_hat.
LIMIT_OF_NUMPY = 32.0

# (shape, axis) of the layers that are timed, all float32: dense layers, a point cloud, the stages
# of a residual network, the first of them with its features last as well.
LAYERS = [
    ((256, 512), 1),
    ((1024, 4096), 1),
    ((65536, 128), 1),
    ((32, 64, 56, 56), 1),
    ((32, 56, 56, 64), 3),
    ((32, 256, 14, 14), 1),
    ((16, 512, 7, 7), 1),
]
LAYER_SECONDS = 1.2  # of timing for each, and at least MIN_ROUNDS rounds
MIN_ROUNDS = 3
BLOCK_SECONDS = 0.002  # calls shorter than this are repeated, and the block is timed
# OpenMP's workers spin for some milliseconds after a call, and would slow down whatever is timed
# next on their core.
PAUSE_SECONDS = 0.01


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bn_fast",
        description="Print the configuration of bn_fast, check this build against the NumPy"
        " reference, and time real layers on this machine, in under half a minute.",
        epilog="The exit status is 1 if a check fails, else 0. Threads and instruction set are"
        " those that bn_fast uses by default; the environment changes them, as in"
        " OMP_NUM_THREADS=1 BN_FAST_ISA=v3 python -m bn_fast.",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures to FILE too")
    options = parser.parse_args(arguments)
    if options.json:
        try:
            options.json.touch()  # now, and not when half a minute of work would be lost
        except OSError as error:
            parser.error(f"--json: cannot write {options.json}: {error.strerror}")

    print(f"{'cpu':<14} {cpu_name()}")
    bn_fast.show_config()
    print("\nChecks against the reference: the largest error / what is allowed, in roundings of")
    print("the largest value (1.2e-7 of it in float32, 2.2e-16 in float64).")
    print(f"  {'':<36} {'out, dx':>15} {'dgamma, dbeta':>15}")
    checks = list(run_checks())
    layers = list(time_layers())

    failed = [row for row in checks + layers if not row["ok"]]
    if options.json:
        record = {
            "cpu": cpu_name(),
            "build": bn_fast.build_info(),
            "ok": not failed,
            "checks": checks,
            "layers": layers,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{len(failed)} checks FAILED" if failed else "\nall checks passed")
    return 1 if failed else 0


def cpu_name() -> str:
    """The processor's name as a person knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def progress(text: str) -> None:
    """Say on the terminal what is being done; the next row replaces it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def print_row(row: str) -> None:
    progress("")
    print(row, flush=True)


# --- Checks


def normal(*shape: int, dtype: type = np.float32) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def roundings(got: Array, expected: Array) -> float:
    """The largest error, in eps of the largest value; NaN if anything is NaN."""
    error = np.abs(got - expected).max()
    return float(error / (np.abs(expected).max() * np.finfo(got.dtype).eps)) if error else 0.0


def errors(got: Sequence[Array], expected: Sequence[Array]) -> Errors:
    """Both are (out, dx, dgamma, dbeta), or the last three."""
    each = list(map(roundings, got, expected))
    return worst(each[:-2]), worst(each[-2:])


def worst(values: Sequence[float]) -> float:
    """The largest, and NaN if there is one, which max() may pass over."""
    return float(np.max(values))


def finite_or_none(values: Errors) -> list[float | None]:
    """For JSON, which has neither infinity nor NaN."""
    return [value if np.isfinite(value) else None for value in values]


def exact(is_so: bool) -> Errors:
    return (0.0, 0.0) if is_so else (np.inf, np.inf)


def same_bits(got: Sequence[Array], expected: Sequence[Array]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(got, expected))


def parameters(x: Array, axis: int) -> tuple[Array, Array, Array]:
    """Gamma, beta and dout for x."""
    rng = np.random.default_rng(1)
    n_features = x.shape[axis]
    gamma = rng.uniform(0.5, 2, n_features)
    beta = rng.standard_normal(n_features)
    dout = rng.standard_normal(x.shape)
    return np.asarray(gamma, x.dtype), np.asarray(beta, x.dtype), np.asarray(dout, x.dtype)


def both_passes(
    x: Array, gamma: Array, beta: Array, dout: Array, axis: int = 1, out: Array | None = None
) -> tuple[Array, ...]:
    """Out, dx, dgamma and dbeta."""
    y, cache = bn_fast.batchnorm_forward(x, gamma, beta, axis=axis, out=out)
    return y, *bn_fast.batchnorm_backward(dout, cache)


def against_oracle(x: Array, axis: int = 1) -> Errors:
    gamma, beta, dout = parameters(x, axis)
    out, _, _ = reference.oracle_forward(x, gamma, beta, eps=EPS, axis=axis)
    gradients = reference.oracle_backward(dout, x, gamma, eps=EPS, axis=axis)
    return errors(both_passes(x, gamma, beta, dout, axis), (out, *gradients))


def with_drift() -> Array:
    x = normal(4096, 33)
    x += np.linspace(0, 1000, len(x), dtype=x.dtype)[:, None]
    return x


def with_outlier() -> Array:
    x = normal(4096, 33)
    x[100] = 1e6
    return x


def test_mode() -> Errors:
    x = normal(4096, 33)
    gamma, beta, dout = parameters(x, 1)
    mean, var = normal(33), normal(33) ** 2
    bn_param = {"mode": "test", "running_mean": mean, "running_var": var}
    out, cache = bn_fast.batchnorm_forward(x, gamma, beta, bn_param)
    got = (out, *bn_fast.batchnorm_backward(dout, cache))
    out, _, _ = reference.oracle_forward(x, gamma, beta, eps=EPS, axis=1, mean=mean, var=var)
    gradients = reference.oracle_backward(dout, x, gamma, eps=EPS, axis=1, mean=mean, var=var)
    return errors(got, (out, *gradients))


def running_averages() -> Errors:
    x = normal(4096, 33) + 1
    gamma, beta, _ = parameters(x, 1)
    bn_param: dict[str, Any] = {"mode": "train"}
    for _ in range(2):
        bn_fast.batchnorm_forward(x, gamma, beta, bn_param)
    _, mean, var = reference.oracle_forward(x, gamma, beta, eps=EPS, axis=1)
    share = 1 - 0.9**2  # of the batch, after two steps from zero with momentum 0.9
    mean_error = roundings(bn_param["running_mean"], share * mean)
    return worst([mean_error, roundings(bn_param["running_var"], share * var)]), 0.0


def exchanged_caches() -> Errors:
    """Our cache in NumPy code, and NumPy's tuple in ours."""
    x = normal(4096, 33, dtype=np.float64)
    gamma, beta, dout = parameters(x, 1)
    _, ours = bn_fast.batchnorm_forward(x, gamma, beta)
    _, theirs = reference.batchnorm_forward(x, gamma, beta)
    expected = reference.oracle_backward(dout, x, gamma, eps=EPS, axis=1)
    there = errors(reference.batchnorm_backward(dout, tuple(ours)), expected)
    back = errors(bn_fast.batchnorm_backward(dout, tuple(theirs)), expected)
    return worst([there[0], back[0]]), worst([there[1], back[1]])


def three_derivations() -> Errors:
    x = normal(64, 33, dtype=np.float64)
    gamma, beta, dout = parameters(x, 1)
    _, cache = bn_fast.batchnorm_forward(x, gamma, beta)
    expected = bn_fast.batchnorm_backward(dout, cache)
    derivations = (
        reference.batchnorm_backward_three_pathways,
        reference.batchnorm_backward_column_wise,
        reference.batchnorm_backward_element_wise,
    )
    each = [errors(derivation(dout, tuple(cache)), expected) for derivation in derivations]
    return worst([e for e, _ in each]), worst([e for _, e in each])


def constant_feature() -> Errors:
    x = normal(4096, 33)
    x[:, 7] = 0.1
    gamma, beta, dout = parameters(x, 1)
    out, *gradients = both_passes(x, gamma, beta, dout)
    finite = all(np.isfinite(a).all() for a in gradients)
    return exact(finite and bool((out[:, 7] == beta[7]).all()))


def in_place() -> Errors:
    x = normal(4096, 33)
    gamma, beta, dout = parameters(x, 1)
    fresh = both_passes(x, gamma, beta, dout)
    _, cache = bn_fast.batchnorm_forward(x, gamma, beta)
    gradients = bn_fast.batchnorm_backward(dout, cache, out=dout)
    out, _ = bn_fast.batchnorm_forward(x, gamma, beta, out=x)
    return exact(same_bits((out, *gradients), fresh))


def thread_counts() -> Errors:
    x = normal(8192, 65)  # enough for more than one thread
    gamma, beta, dout = parameters(x, 1)
    results = []
    for n in (1, 2, 3):
        bn_fast.set_num_threads(n)
        results.append(both_passes(x, gamma, beta, dout))
    bn_fast.set_num_threads(None)
    return exact(all(same_bits(result, results[0]) for result in results))


# Name, what is allowed, and what returns the largest errors.
USUAL, NUMPY, EXACT = (LIMIT, LIMIT_OF_SUMS), (LIMIT_OF_NUMPY, LIMIT_OF_SUMS), (0.0, 0.0)
CHECKS: list[tuple[str, Errors, Callable[[], Errors]]] = [
    ("float32 (4096, 33)", USUAL, lambda: against_oracle(normal(4096, 33))),
    ("float64 (4096, 33)", USUAL, lambda: against_oracle(normal(4096, 33, dtype=np.float64))),
    ("images (8, 24, 15, 13)", USUAL, lambda: against_oracle(normal(8, 24, 15, 13))),
    ("features last (8, 15, 13, 24)", USUAL, lambda: against_oracle(normal(8, 15, 13, 24), 3)),
    ("Fortran order", USUAL, lambda: against_oracle(np.asfortranarray(normal(999, 33)))),
    ("every other column, backwards", USUAL, lambda: against_oracle(normal(999, 66)[::-1, ::-2])),
    ("float32, mean of 1e6 deviations", USUAL, lambda: against_oracle(normal(4096, 33) + 1e6)),
    (
        "float64, mean of 1e9 deviations",
        USUAL,
        lambda: against_oracle(normal(4096, 33, dtype=np.float64) + 1e9),
    ),
    ("drift of 1000 deviations", USUAL, lambda: against_oracle(with_drift())),
    ("one row of 1e6", USUAL, lambda: against_oracle(with_outlier())),
    ("values of 1e25", USUAL, lambda: against_oracle(normal(999, 33) * np.float32(1e25))),
    ("test mode", USUAL, test_mode),
    ("running averages", USUAL, running_averages),
    ("caches of NumPy code, both ways", NUMPY, exchanged_caches),
    ("the three derivations", NUMPY, three_derivations),
    ("a constant feature is exactly beta", EXACT, constant_feature),
    ("in place: the same bits", EXACT, in_place),
    ("1, 2 or 3 threads: the same bits", EXACT, thread_counts),
]


def run_checks() -> Iterator[dict[str, Any]]:
    """Print a row for each check and yield its figures."""
    for number, (name, limits, check) in enumerate(CHECKS, 1):
        progress(f"check {number} of {len(CHECKS)}: {name}")
        reason = ""
        try:
            found = check()
        except Exception as error:  # a check that cannot run has failed; the others go on
            found, reason = exact(False), f"{type(error).__name__}: {error}"
        ok = all(error <= limit for error, limit in zip(found, limits))
        cells = "".join(f" {error:>8.3g} /{limit:>4g} " for error, limit in zip(found, limits))
        print_row(f"  {name:<36}{cells}  {'ok' if ok else f'FAILED {reason}'}")
        yield {
            "check": name,
            "errors": finite_or_none(found),
            "limits": limits,
            "ok": ok,
            "reason": reason,
        }


# --- Times


def time_layers() -> Iterator[dict[str, Any]]:
    """Print two rows for each layer, forward and backward, and yield their figures."""
    torch, torch_name = find_torch()
    n_threads = bn_fast.get_num_threads()
    print(
        f"\nOne call, float32, train mode, {n_threads} threads: medians. x: so many times as fast"
    )
    print("is bn_fast. of copy: bytes that must move, per second, against those of a copy of x.")
    print("error: as above, but against the reference in float64; sums: that of dgamma, dbeta.")
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > 0.5:
        print(
            f"NOTE: the load average is {busy:.1f}: while other programs run, threaded calls wait."
        )
    print(f"{'layer':<24} {'':<8} {'bn_fast':>10} {'NumPy reference':>19} {torch_name:>19}", end="")
    print(f" {'of copy':>7} {'error':>5} {'sums':>5}")
    with ThreadPoolExecutor(n_threads) as pool:
        for number, (shape, axis) in enumerate(LAYERS, 1):
            name = str(shape) + (f" axis {axis}" if axis != 1 else "")
            progress(f"layer {number} of {len(LAYERS)}: {name}")
            x = normal(*shape)
            gamma, beta, dout = parameters(x, axis)
            found = layer_errors(x, gamma, beta, dout, axis)
            times = medians(
                {
                    **numpy_calls(bn_fast, "bn_fast", x, gamma, beta, dout, axis),
                    **numpy_calls(reference, "NumPy", x, gamma, beta, dout, axis),
                    **torch_calls(torch, x, gamma, beta, dout, axis),
                    **copy_calls(x, pool, n_threads),
                }
            )
            copy_time = min(times.pop(("copy", way)) for way in ("alone", "together"))
            for direction, n_arrays in (("forward", 2), ("backward", 3)):
                seconds = {who: t for (who, what), t in times.items() if what == direction}
                copy_share = n_arrays / 2 * copy_time / seconds["bn_fast"]
                error, sums = found[direction]
                ok = error <= LIMIT and sums <= LIMIT_OF_SUMS
                others = "".join(versus(seconds, who) for who in ("NumPy", "PyTorch"))
                print_row(
                    f"{name if direction == 'forward' else '':<24} {direction:<8}"
                    f" {milliseconds(seconds['bn_fast'])}{others} {copy_share:>7.0%} {error:>5.3g}"
                    f" {f'{sums:.3g}' if direction == 'backward' else '':>5}"
                    f"{'' if ok else '  FAILED'}"
                )
                yield {
                    "layer": name,
                    "shape": shape,
                    "axis": axis,
                    "direction": direction,
                    "seconds": seconds,
                    "copy_share": copy_share,
                    "errors": finite_or_none(found[direction]),
                    "ok": ok,
                }


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:>7.{3 if seconds < 1e-2 else 1}f} ms"


def versus(seconds: dict[str, float], other: str) -> str:
    """A cell: the other's time, and how many times as fast bn_fast is."""
    if other not in seconds:
        return f" {'-':>19}"
    return f" {milliseconds(seconds[other])} {seconds[other] / seconds['bn_fast']:>7.1f}x"


def find_torch() -> tuple[Any, str]:
    """PyTorch or None, and what to call it at the head of its column."""
    if find_spec("torch") is None:
        return None, "PyTorch: none"
    progress("importing PyTorch")
    try:
        torch = import_module("torch")
    except Exception as error:  # broken installations raise OSError, ImportError, AttributeError
        print_row(f"PyTorch is installed but cannot be imported: {error}")
        return None, "PyTorch: broken"
    return torch, f"PyTorch {torch.__version__}"


def layer_errors(x: Array, gamma: Array, beta: Array, dout: Array, axis: int) -> dict[str, Errors]:
    """Against the reference in float64: the oracle would take longer than all the timing."""
    out, *gradients = both_passes(x, gamma, beta, dout, axis)
    right, cache = reference.batchnorm_forward(x.astype(np.float64), gamma, beta, axis=axis)
    right_gradients = reference.batchnorm_backward(dout.astype(np.float64), cache)
    return {
        "forward": (roundings(out, right), 0.0),
        "backward": errors(gradients, right_gradients),
    }


def numpy_calls(
    module: Any, name: str, x: Array, gamma: Array, beta: Array, dout: Array, axis: int
) -> Calls:
    """Forward and backward of bn_fast or of its reference."""
    _, cache = module.batchnorm_forward(x, gamma, beta, axis=axis)
    return {
        (name, "forward"): lambda: module.batchnorm_forward(x, gamma, beta, axis=axis),
        (name, "backward"): lambda: module.batchnorm_backward(dout, cache),
    }


def torch_calls(torch: Any, x: Array, gamma: Array, beta: Array, dout: Array, axis: int) -> Calls:
    """PyTorch's own batch norm without the bookkeeping of autograd, on the same memory."""
    if torch is None:
        return {}
    tx, tdout = (torch.from_numpy(np.moveaxis(a, axis, 1)) for a in (x, dout))
    tgamma, tbeta = torch.from_numpy(gamma), torch.from_numpy(beta)

    def forward() -> Any:
        return torch.native_batch_norm(tx, tgamma, tbeta, None, None, True, 0.1, EPS)

    _, mean, inv_std = forward()

    def backward() -> Any:
        return torch.ops.aten.native_batch_norm_backward(
            tdout, tx, tgamma, None, None, mean, inv_std, True, EPS, [True, True, True]
        )

    return {("PyTorch", "forward"): forward, ("PyTorch", "backward"): backward}


def copy_calls(x: Array, pool: ThreadPoolExecutor, n_threads: int) -> Calls:
    """Copies of x to memory that is there already, by one thread and by all (NumPy frees the GIL).

    The faster one is this machine's copy speed: waking threads costs more than a small copy.
    """
    source, target = x.reshape(-1), np.ones(x.size, x.dtype)
    sources, targets = (np.array_split(a, n_threads) for a in (source, target))

    def together() -> None:
        others = [pool.submit(np.copyto, t, s) for t, s in zip(targets[1:], sources[1:])]
        np.copyto(targets[0], sources[0])
        wait(others)

    return {
        ("copy", "alone"): lambda: np.copyto(target, source),
        ("copy", "together"): together,
    }


def medians(calls: Calls) -> dict[tuple[str, str], float]:
    """Seconds of one call of each, measured in turn, so that a busy moment meets all of them."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(BLOCK_SECONDS / (time.perf_counter() - start)))
    times: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + LAYER_SECONDS
    n_rounds = 0
    while n_rounds < MIN_ROUNDS or time.perf_counter() < end:
        for name, call in calls.items():
            time.sleep(PAUSE_SECONDS)
            call()  # wakes the threads, and brings the arrays back to the cache
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
        n_rounds += 1
    return {name: median(values) for name, values in times.items()}


if __name__ == "__main__":
    sys.exit(main())
