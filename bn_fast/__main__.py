"""The command ``python -m bn_fast``: what this build is, whether it is right, how fast it is here.

It needs nothing but NumPy, compares with PyTorch where that is installed, and ends in under half a
minute. The exit status is 1 if a check fails.
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from timeit import Timer
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import bn_fast
from bn_fast import reference

Array = NDArray[Any]
Call = Callable[[], Any]

EPS = 1e-5  # the default of bn_param["eps"]
# Errors are counted in roundings; a result takes one or two. Those of dgamma and dbeta count by a
# 32nd: in float32 an error of 1.5e-5 is allowed them.
LIMIT, OF_SUMS = 4.0, 32.0


class Kind(NamedTuple):
    """What a layer is: the shape of x, its feature axis (of rows the last one), and which norm."""

    shape: tuple[int, ...]
    axis: int = 1
    norm: str = "batch"
    num_groups: int | None = None

    @property
    def name(self) -> str:
        if self.norm != "batch":
            groups = "" if self.num_groups is None else f" {self.num_groups}"
            return f"{self.norm}{groups} {self.shape}"
        return str(self.shape) + (f" axis {self.axis}" if self.axis != 1 else "")


# The layers that are timed, all float32: dense layers, a point cloud, the stages of a residual
# network, the first of them with its features last as well; then each of the other norms.
LAYERS = [
    Kind((256, 512)),
    Kind((1024, 4096)),
    Kind((65536, 128)),
    Kind((32, 64, 56, 56)),
    Kind((32, 56, 56, 64), 3),
    Kind((32, 256, 14, 14)),
    Kind((16, 512, 7, 7)),
    Kind((8192, 1024), -1, "layer"),
    Kind((8192, 1024), -1, "rms"),
    Kind((32, 64, 3136), 1, "group", 8),
    Kind((32, 64, 3136), 1, "instance"),
]
LAYER_SECONDS = 0.7  # of timing for each, and at least MIN_ROUNDS rounds
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
            options.json.open("a").close()  # now, and not when half a minute of work would be lost
        except OSError as error:
            parser.error(f"--json: cannot write {options.json}: {error.strerror}")

    print(f"{'cpu':<14} {cpu_name()}")
    bn_fast.show_config()
    checks = list(run_checks())
    layers = list(time_layers())

    failed = [row for row in checks + layers if not row["ok"]]
    record = {"cpu": cpu_name(), "build": bn_fast.build_info(), "ok": not failed}
    if options.json:
        record |= {"checks": checks, "layers": layers}
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


class Layer:
    """The arguments of one layer, the same at every run."""

    def __init__(
        self, x: Array, axis: int = 1, norm: str = "batch", num_groups: int | None = None
    ) -> None:
        rng = np.random.default_rng(1)
        self.x, self.axis, self.norm, self.num_groups = x, axis, norm, num_groups
        self.gamma = np.asarray(rng.uniform(0.5, 2, x.shape[axis]), x.dtype)
        self.beta = np.asarray(rng.standard_normal(x.shape[axis]), x.dtype)
        self.dout = np.asarray(rng.standard_normal(x.shape), x.dtype)

    @property
    def parameters(self) -> list[Array]:
        return [self.gamma] if self.norm == "rms" else [self.gamma, self.beta]

    def calls(self, module: Any, bn_param: dict[str, Any] | None = None) -> list[Call]:
        """Forward and backward of bn_fast or of its reference."""
        forward_op, backward_op = (
            getattr(module, f"{self.norm}norm_{way}") for way in ("forward", "backward")
        )
        options: dict[str, Any] = {"axis": self.axis}
        if self.norm == "batch":
            options["bn_param"] = bn_param
        if self.num_groups is not None:
            options["num_groups"] = self.num_groups

        def forward() -> Any:
            return forward_op(self.x, *self.parameters, **options)

        _, cache = forward()
        return [forward, lambda: backward_op(self.dout, cache)]

    def wide(self) -> "Layer":
        """The same in float64."""
        layer = copy.copy(self)
        layer.x, layer.dout = self.x.astype(np.float64), self.dout.astype(np.float64)
        return layer

    def results(self, bn_param: dict[str, Any] | None = None, module: Any = bn_fast) -> list[Array]:
        """What bn_fast makes of it: out, dx, dgamma and, where there is a beta, dbeta."""
        forward, backward = self.calls(module, bn_param)
        return [forward()[0], *backward()]


def normal(*shape: int, dtype: type = np.float32) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def largest_error(got: Sequence[Array], right: Sequence[Array]) -> float:
    """The largest error, in roundings; NaN if anything is NaN.

    A rounding is the dtype's eps times the largest right value. dgamma and dbeta are sums of terms
    of either sign, which end up small against what is rounded on the way: theirs count as less.
    """
    each = []
    for a, b in zip(got, right):
        rounding = np.abs(b).max() * np.finfo(a.dtype).eps * (OF_SUMS if a.ndim == 1 else 1)
        each.append(np.abs(a - b).max() / rounding)
    return float(np.max(each))  # unlike max(), it does not pass over NaN


# --- Checks


def against_oracle(x: Array, mean: Array | None = None, var: Array | None = None) -> float:
    """Train mode, or test mode with the statistics that are given."""
    layer = Layer(x)
    test = {"mode": "test", "running_mean": mean, "running_var": var}
    out, _, _ = reference.oracle_forward(
        x, layer.gamma, layer.beta, eps=EPS, axis=1, mean=mean, var=var
    )
    gradients = reference.oracle_backward(
        layer.dout, x, layer.gamma, eps=EPS, axis=1, mean=mean, var=var
    )
    return largest_error(layer.results(None if mean is None else test), (out, *gradients))


def against_reference(norm: str, x: Array, num_groups: int | None = None) -> float:
    """Another norm against the reference in float64, which keeps its digits at an offset too."""
    axis = -1 if norm in ("layer", "rms") else 1
    layer = Layer(x, axis, norm, num_groups)
    return largest_error(layer.results(), layer.wide().results(module=reference))


def constant_feature() -> float:
    x = normal(4096, 33)
    x[:, 7] = 0.1
    layer = Layer(x)
    out, *gradients = layer.results()
    finite = all(np.isfinite(a).all() for a in gradients)
    return 0.0 if finite and (out[:, 7] == layer.beta[7]).all() else np.inf


def thread_counts() -> float:
    layer, bits = Layer(normal(8192, 65)), []  # enough for more than one thread
    for n in (1, 2, 3):
        bn_fast.set_num_threads(n)
        bits.append([a.tobytes() for a in layer.results()])
    bn_fast.set_num_threads(None)
    return 0.0 if bits[0] == bits[1] == bits[2] else np.inf


# What can be wrong with a build or a machine; what can be wrong with the code, the tests know.
CHECKS: list[tuple[str, Callable[[], float]]] = [
    ("float32 (4096, 33)", lambda: against_oracle(normal(4096, 33))),
    (
        "float64 images (8, 24, 15, 13)",
        lambda: against_oracle(normal(8, 24, 15, 13, dtype=np.float64)),
    ),
    ("every other column, backwards", lambda: against_oracle(normal(999, 66)[::-1, ::-2])),
    ("float32, mean of 1e6 deviations", lambda: against_oracle(normal(4096, 33) + 1e6)),
    ("test mode", lambda: against_oracle(normal(4096, 33), normal(33), normal(33) ** 2)),
    ("layer norm, mean of 1e4", lambda: against_reference("layer", normal(90, 288) + 1e4)),
    ("rms norm", lambda: against_reference("rms", normal(90, 288))),
    ("group norm", lambda: against_reference("group", normal(8, 24, 15, 13), 4)),
    ("instance norm", lambda: against_reference("instance", normal(8, 24, 15, 13))),
    ("a constant feature is exactly beta", constant_feature),
    ("1, 2 or 3 threads: the same bits", thread_counts),
]


def run_checks() -> Iterator[dict[str, Any]]:
    """Print a row for each check and yield its figures."""
    print(
        f"\nChecks against the NumPy reference: the largest error, of which {LIMIT:g} is allowed,"
    )
    print("in units of the dtype's eps (1.2e-7 in float32, 2.2e-16 in float64) times the largest")
    print(f"value; {OF_SUMS:g} such units count as one for dgamma and dbeta, which are sums.")
    for number, (name, check) in enumerate(CHECKS, 1):
        progress(f"check {number} of {len(CHECKS)}: {name}")
        reason = ""
        try:
            error = check()
        except Exception as raised:  # a check that cannot run has failed; the others go on
            error, reason = np.inf, f"{type(raised).__name__}: {raised}"
        row = verdict(error) | {"check": name, "reason": reason}
        print_row(f"  {name:<36} {error:>6.3g}  {'ok' if row['ok'] else f'FAILED {reason}'}")
        yield row


def verdict(error: float) -> dict[str, Any]:
    """For JSON, which has neither infinity nor NaN."""
    return {"error": error if np.isfinite(error) else None, "ok": bool(error <= LIMIT)}


# --- Times


def time_layers() -> Iterator[dict[str, Any]]:
    """Print two rows for each layer, forward and backward, and yield their figures."""
    torch, n_threads = find_torch(), bn_fast.get_num_threads()
    others = {"NumPy": "NumPy reference"}
    if torch:
        others["PyTorch"] = f"PyTorch {torch.__version__}"
    threads = f"{n_threads} thread{'s' if n_threads > 1 else ''}"
    print_row(
        f"\nMedian times of one call in float32 with {threads}; a shape without a name is that"
    )
    print("of a batch norm in train mode. 2.0x: bn_fast takes half as long. of copy: the bytes per")
    print(
        "second that a call cannot do without, against those of a copy of x. error: as above, but"
    )
    print("against the reference in float64.")
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if busy > 0.5:
        print(f"NOTE: the load average is {busy:.1f}: threaded calls wait for other programs.")
    head = "".join(f" {title:>19}" for title in others.values())
    print(f"{'layer':<24} {'':<8} {'bn_fast':>10}{head} {'of copy':>8} {'error':>6}")
    for number, kind in enumerate(LAYERS, 1):
        name = kind.name
        progress(f"layer {number} of {len(LAYERS)}: {name}")
        layer = Layer(normal(*kind.shape), *kind[1:])
        errors = layer_errors(layer)
        calls = {"bn_fast": layer.calls(bn_fast), "NumPy": layer.calls(reference)}
        if torch:
            calls["PyTorch"] = torch_calls(torch, layer)
        with ThreadPoolExecutor(n_threads) as pool:
            times = medians(calls | {"copy": copy_calls(layer.x, pool, n_threads)})
        copy_time = min(times.pop("copy"))
        for i, (direction, n_arrays) in enumerate([("forward", 2), ("backward", 3)]):
            seconds = {who: pair[i] for who, pair in times.items()}
            ours = seconds["bn_fast"]
            row = verdict(errors[i]) | {
                "layer": name,
                **kind._asdict(),
                "direction": direction,
                "seconds": seconds,
                "copy_share": n_arrays / 2 * copy_time / ours,
            }
            cells = "".join(
                f" {milliseconds(seconds[who])} {seconds[who] / ours:>7.1f}x" for who in others
            )
            print_row(
                f"{'' if i else name:<24} {direction:<8} {milliseconds(ours)}{cells}"
                f" {row['copy_share']:>8.0%} {errors[i]:>6.3g}{'' if row['ok'] else '  FAILED'}"
            )
            yield row


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:>7.{3 if seconds < 1e-2 else 1}f} ms"


def layer_errors(layer: Layer) -> list[float]:
    """Against the reference in float64: the oracle would take longer than all the timing."""
    right, got = layer.wide().results(module=reference), layer.results()
    return [largest_error(got[:1], right[:1]), largest_error(got[1:], right[1:])]


def find_torch() -> Any:
    """PyTorch, or None."""
    progress("importing PyTorch")
    with contextlib.suppress(Exception):  # broken ones raise OSError and AttributeError too
        return import_module("torch")
    return None


def torch_calls(torch: Any, layer: Layer) -> list[Call]:
    """PyTorch's own batch norm without the bookkeeping of autograd, on the same memory."""
    if layer.norm != "batch":
        return torch_norm_calls(torch, layer)
    x, dout = (torch.from_numpy(np.moveaxis(a, layer.axis, 1)) for a in (layer.x, layer.dout))
    gamma, beta = torch.from_numpy(layer.gamma), torch.from_numpy(layer.beta)

    def forward() -> Any:
        return torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)

    _, mean, inv_std = forward()

    def backward() -> Any:
        return torch.ops.aten.native_batch_norm_backward(
            dout, x, gamma, None, None, mean, inv_std, True, EPS, [True, True, True]
        )

    return [forward, backward]


def torch_norm_calls(torch: Any, layer: Layer) -> list[Call]:
    """Its other norms, with that bookkeeping: not all are operators of their own."""
    x, dout, *parameters = map(torch.from_numpy, (layer.x, layer.dout, *layer.parameters))
    leaves = [a.requires_grad_() for a in (x, *parameters)]
    named = dict(zip(("weight", "bias"), parameters))
    between = {"layer": (x.shape[-1:],), "rms": (x.shape[-1:],), "group": (layer.num_groups,)}
    function = getattr(torch.nn.functional, f"{layer.norm}_norm")

    def forward() -> Any:
        return function(x, *between.get(layer.norm, ()), **named, eps=EPS)

    y = forward()
    return [forward, lambda: torch.autograd.grad(y, leaves, dout, retain_graph=True)]


def copy_calls(x: Array, pool: ThreadPoolExecutor, n_threads: int) -> list[Call]:
    """Copies of x to memory that is there already, by one thread and by all (NumPy frees the GIL).

    The faster one is this machine's copy speed: waking threads costs more than a small copy.
    """
    source, target = x.reshape(-1), np.ones(x.size, x.dtype)
    parts = [np.array_split(a, n_threads) for a in (target, source)]
    return [lambda: np.copyto(target, source), lambda: list(pool.map(np.copyto, *parts))]


def medians(calls: dict[str, list[Call]]) -> dict[str, list[float]]:
    """Seconds of each call, in blocks that take turns: a busy moment meets all of them."""
    timers = [Timer(call) for pair in calls.values() for call in pair]
    repeats = [max(1, int(BLOCK_SECONDS / min(timer.repeat(2, 1)))) for timer in timers]
    rounds: list[list[float]] = []
    end = time.perf_counter() + LAYER_SECONDS
    while len(rounds) < MIN_ROUNDS or time.perf_counter() < end:
        rounds.append([])
        for timer, n in zip(timers, repeats):
            time.sleep(PAUSE_SECONDS)
            timer.timeit(1)  # wakes the threads, and brings the arrays back to the cache
            rounds[-1].append(timer.timeit(n) / n)
    found = iter(np.median(rounds, axis=0).tolist())
    return {name: [next(found) for _ in pair] for name, pair in calls.items()}


def run() -> int:
    """`main` for a shell: quiet when a reader such as head has seen enough, or at Ctrl-C."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still to be written, at the interpreter's end too, goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        progress("")
        return 130  # as shells have it
    return status


if __name__ == "__main__":
    sys.exit(run())
