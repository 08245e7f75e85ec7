"""What the table of shapes does not show: threads, latency, memory, strides, digits, ISAs.

Each measurement prints one table. Blocks of calls take turns, and the fastest are compared;
nothing else should run meanwhile.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module

import numpy as np
from cases import Case
from implementations import IMPLEMENTATIONS
from problem import Problem
from timing import fastest

import bn_fast
import bn_fast.functional

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:
    sys.exit("behaviour.py prints with rich: pip install -e '.[bench]'")

SHAPES = [
    ((32, 64), 1),
    ((128, 512), 1),
    ((256, 512), 1),
    ((256, 1024), 1),
    ((1000, 333), 1),
    ((4096, 33), 1),
    ((65536, 3), 1),
    ((16, 512, 7, 7), 1),
    ((64, 251, 7, 7), 1),
    ((32, 256, 14, 14), 1),
    ((8, 3, 224, 224), 1),
    ((64, 14, 14, 160), 3),
    ((16, 65536), 1),
    ((1024, 4096), 1),
    ((32, 64, 56, 56), 1),
    ((65536, 128), 1),
    ((16384, 1024), 1),
    ((64, 64, 112, 112), 1),
]


class Layer:
    """Forward and backward of one layer with the caller's buffers."""

    def __init__(self, x: np.ndarray, axis: int = 1) -> None:
        n_features = x.shape[axis]
        self.x, self.axis = x, axis
        self.gamma, self.beta = np.ones(n_features, x.dtype), np.zeros(n_features, x.dtype)
        self.buffer = np.empty_like(x)
        self.dout = np.empty_like(x)
        self.dout[...] = x[::-1]
        _, self.cache = bn_fast.batchnorm_forward(x, self.gamma, self.beta, axis=axis)

    def forward(self) -> None:
        bn_fast.batchnorm_forward(self.x, self.gamma, self.beta, axis=self.axis, out=self.buffer)

    def backward(self) -> None:
        bn_fast.batchnorm_backward(self.dout, self.cache, out=self.buffer)

    def forward_fresh(self) -> None:
        bn_fast.batchnorm_forward(self.x, self.gamma, self.beta, axis=self.axis)

    def backward_fresh(self) -> None:
        bn_fast.batchnorm_backward(self.dout, self.cache)


def normal(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def with_threads(n: int, call: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        bn_fast.set_num_threads(n)
        call()

    return run


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for n, name in enumerate(head):
        table.add_column(name, justify="left" if n == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.4g}"


def threads(rounds: int) -> None:
    """One thread, two, four, ... up to the CPUs here."""
    n_max = bn_fast.get_num_threads()
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n <= n_max]
    rows = []
    for shape, axis in SHAPES:
        layer = Layer(normal(shape), axis)
        calls = {
            f"{name} {n}": with_threads(n, getattr(layer, name))
            for name in ("forward", "backward")
            for n in counts
        }
        times = fastest(calls, rounds)
        row = [str(shape)]
        for name in ("forward", "backward"):
            row.append(" ".join(micro(times[f"{name} {n}"]) for n in counts))
            row.append(" ".join(f"{times[f'{name} 1'] / times[f'{name} {n}']:.2f}" for n in counts))
        rows.append(row)
    bn_fast.set_num_threads(None)
    said = ", ".join(map(str, counts))
    show(
        f"float32, {said} threads",
        ["shape", "forward us", "x faster", "backward us", "x faster"],
        rows,
    )


def _spin(stop: float) -> None:
    while time.monotonic() < stop:
        pass


@contextmanager
def busy_cpus(n: int) -> Iterator[None]:
    """So many processes that want all of a CPU."""
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_spin, args=(time.monotonic() + 600,)) for _ in range(n)]
    for worker in workers:
        worker.start()
    time.sleep(1)
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def latency(rounds: int) -> None:
    """The distribution of 10 000 small calls, with the machine idle and with every CPU taken."""
    rows = []

    def sample(state: str) -> None:
        for shape in ((32, 64), (128, 256), (512, 512)):
            layer = Layer(normal(shape))
            for name in ("forward", "backward"):
                call, times = getattr(layer, name), []
                for _ in range(10_000):
                    start = time.perf_counter()
                    call()
                    times.append(time.perf_counter() - start)
                times.sort()
                picked = [times[len(times) // 2], times[-len(times) // 100], times[-1]]
                rows.append([f"{shape} {name}", state, *map(micro, picked)])

    sample("idle")
    with busy_cpus(os.cpu_count() or 1):
        sample("busy")
    show("10 000 calls, us", ["call", "machine", "median", "99 %", "longest"], rows)


def _calls(shape: tuple[int, ...], n_threads: int, seconds: float) -> int:
    """How often forward and backward can be called meanwhile."""
    bn_fast.set_num_threads(n_threads)
    layer, n, stop = Layer(normal(shape)), 0, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        layer.forward()
        layer.backward()
        n += 1
    return n


def company(rounds: int) -> None:
    """Two threads beside one process that wants all of a CPU, and in four processes at once."""
    spawn, rows = multiprocessing.get_context("spawn"), []
    for shape in ((16384, 64), (256, 512)):
        found = {}
        for n in (1, 2):
            found["alone", n] = np.median([_calls(shape, n, 2) for _ in range(rounds)])
            with busy_cpus(1):
                found["beside one", n] = np.median([_calls(shape, n, 2) for _ in range(rounds)])
            with spawn.Pool(4) as pool:
                each = [pool.starmap(_calls, [(shape, n, 2)] * 4) for _ in range(rounds)]
            found["four of them", n] = np.median([sum(some) for some in each])
        for state in ("alone", "beside one", "four of them"):
            one, two = found[state, 1] / 2, found[state, 2] / 2
            rows.append([str(shape), state, f"{one:.0f}", f"{two:.0f}", f"{two / one:.2f}"])
    bn_fast.set_num_threads(None)
    show(
        "calls of forward and backward a second, float32, all processes",
        ["shape", "process", "1 thread", "2 threads", "ratio"],
        rows,
    )


def small(rounds: int) -> None:
    """What a small call costs, plain and with each option, against the NumPy reference."""
    x, dout, residual = normal((32, 64)), normal((32, 64))[::-1].copy(), normal((32, 64))[:, ::-1]
    gamma, beta, residual = np.ones(64, x.dtype), np.zeros(64, x.dtype), residual.copy()
    averages = {"running_mean": beta.copy(), "running_var": gamma.copy()}
    kinds: dict[str, dict[str, object]] = {
        "plain": {},
        "out=": {"out": np.empty_like(x)},
        "bn_param, train": {"bn_param": {"mode": "train", **averages}},
        "bn_param, test": {"bn_param": {"mode": "test", **averages}},
        "relu": {"activation": "relu"},
        "residual": {"residual": residual},
        "relu, residual": {"activation": "relu", "residual": residual},
        "weights": {"weights": x[:, :1] > 0},
    }
    calls: dict[str, Callable[[], object]] = {}
    for name, given in kinds.items():
        for who in (bn_fast, bn_fast.reference):
            if who is bn_fast.reference and "out" in given:
                continue
            _, cache = who.batchnorm_forward(x, gamma, beta, **given)
            label = f"{who.__name__} {name}"
            calls[f"{label} forward"] = partial(who.batchnorm_forward, x, gamma, beta, **given)
            calls[f"{label} backward"] = partial(who.batchnorm_backward, dout, cache)
    layer = bn_fast.BatchNorm(64)
    layer.forward(x)
    calls["bn_fast layer forward"] = partial(layer.forward, x)
    calls["bn_fast layer backward"] = partial(layer.backward, dout)
    times = fastest(calls, rounds)
    rows = []
    for name in (*kinds, "layer"):
        row = [name]
        for what in ("forward", "backward"):
            ours = times[f"bn_fast {name} {what}"]
            theirs = times.get(f"bn_fast.reference {name} {what}", times[f"{PLAIN} {what}"])
            row += [micro(ours), micro(theirs), f"{theirs / ours:.1f}"]
        rows.append(row)
    show(
        "(32, 64) float32, us",
        ["call", "forward", "NumPy", "x faster", "backward", "NumPy", "x faster"],
        rows,
    )


PLAIN = "bn_fast.reference plain"

MEMORY = """
import json, resource, sys
import numpy as np, bn_fast
shape = tuple(json.loads(sys.argv[1]))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
warm = np.ones((300, 300), np.float32)
bn_fast.batchnorm_backward(warm, bn_fast.batchnorm_forward(warm, warm[0], warm[0])[1])
x = np.ones(shape, np.float32)
gamma = np.ones(shape[1], np.float32)
before = peak()
out, cache = bn_fast.batchnorm_forward(x, gamma, gamma)
forward = peak()
dx, _, _ = bn_fast.batchnorm_backward(out, cache)
print(json.dumps([x.nbytes, forward - before, peak() - forward]))
"""


def memory(rounds: int) -> None:
    """Peak resident memory: what a call needs besides its result."""
    rows = []
    for shape in ((1_000_000, 64), (100_000, 512), (64, 64, 112, 112), (16, 2_000_000)):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, json.dumps(shape)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        size, forward, backward = json.loads(done.stdout)
        rows.append(
            [str(shape), *(f"{n / 2**20:.1f}" for n in (size, forward - size, backward - size))]
        )
    show(
        "Peak resident memory beyond inputs and result, MiB, "
        f"{bn_fast.get_num_threads()} threads, float32",
        ["shape", "x", "forward", "backward"],
        rows,
    )


def fresh(rounds: int) -> None:
    """What a new result costs over one written into the caller's buffer."""
    rows = []
    for shape in ((1024, 4096), (4096, 4096), (100_000, 512)):
        layer = Layer(normal(shape))
        names = ("forward", "forward_fresh", "backward", "backward_fresh")
        times = fastest({name: getattr(layer, name) for name in names}, rounds)
        times |= fastest({"touch": lambda shape=shape: _touch(shape)}, rounds)
        rows.append([str(shape), *(f"{times[name] * 1e3:.3g}" for name in (*names, "touch"))])
    show(
        "New results, ms",
        ["shape", "forward out=", "new", "backward out=", "new", "np.empty and one write a page"],
        rows,
    )


def _touch(shape: tuple[int, ...]) -> None:
    np.empty(shape, np.float32).reshape(-1)[::1024] = 0


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Fortran": np.asfortranarray,
    "axes permuted": lambda a: np.ascontiguousarray(a.T).T,
    "every other column": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "every other row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "reversed": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
}


def strides(rounds: int) -> None:
    """Views against their contiguous twins, by the cache lines that they touch."""
    rows = []
    for shape in ((1000, 256), (4096, 1024), (64, 32, 28, 28)):
        twin = Layer(normal(shape))
        for name, view in VIEWS.items():
            layer = Layer(view(twin.x))  # its result has x's memory order, without gaps
            layer.dout = view(twin.dout)
            gap = 2 if name == "every other column" else 1
            lines = {"forward": (gap + 1) / 2, "backward": (2 * gap + 1) / 3}
            calls = {
                f"{who} {what}": getattr(one, what)
                for who, one in (("view", layer), ("twin", twin))
                for what in ("forward", "backward")
            }
            times = fastest(calls, rounds)
            row = [str(shape), name]
            for what in ("forward", "backward"):
                ratio = times[f"view {what}"] / times[f"twin {what}"]
                row += [f"{ratio:.2f}", f"{ratio / lines[what]:.2f}"]
            rows.append(row)
    show(
        "Time of a view / time of its contiguous twin; the same per cache line touched",
        ["shape", "view", "forward", "a line", "backward", "a line"],
        rows,
    )


def digits(rounds: int) -> None:
    """How far everyone's results lie from the long double oracle's, by the offset of the data."""
    offsets = (0, 1000, 30_000)  # deviations of x between 0 and its mean
    for shape in ((16, 512, 7, 7), (65536, 128)):
        problems = [Problem(Case("", shape, 1, np.dtype(np.float32)), offset) for offset in offsets]
        rows = []
        for one in IMPLEMENTATIONS:
            if not one.is_importable or not (first := one.prepare(problems[0]).results()):
                continue
            each = [first, *(one.prepare(p).results() for p in problems[1:])]
            errors = [p.errors(results, p.right) for p, results in zip(problems, each)]
            rows.append([one.name, *(f"{e['out']:.0e} / {e['dx']:.0e}" for e in errors)])
        show(
            f"{shape} float32: largest errors of out / dx ÷ their largest value, where x lies",
            ["", *(f"{offset} deviations from 0" for offset in offsets)],
            rows,
        )


def isa(rounds: int) -> None:
    """Every instruction set of this CPU, in one process: pages lie otherwise in another one."""
    modules = {
        name: import_module(f"bn_fast._core_{name}")
        for name in bn_fast.build_info()["isa_available"]
    }

    def on(name: str, call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            bn_fast.functional.core = modules[name]
            call()

        return run

    rows = []
    for dtype in (np.float32, np.float64):
        for shape, axis in SHAPES:
            layer = Layer(normal(shape).astype(dtype), axis)
            for what in ("forward", "backward"):
                times = fastest({n: on(n, getattr(layer, what)) for n in modules}, rounds)
                label = f"{shape} {np.dtype(dtype)} {what}"
                rows.append([label, *map(micro, times.values()), min(times, key=times.__getitem__)])
    bn_fast.functional.core = modules[bn_fast.build_info()["isa"]]
    show("us, by instruction set", ["call", *modules, "fastest"], rows)


MEASUREMENTS = {
    one.__name__: one
    for one in (threads, small, latency, company, memory, fresh, strides, digits, isa)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", default=list(MEASUREMENTS),
        help=f"of {', '.join(MEASUREMENTS)}; default: all",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default: 9")
    options = parser.parse_args()
    if unknown := [name for name in options.what if name not in MEASUREMENTS]:
        parser.error(f"WHAT: {unknown} not among {list(MEASUREMENTS)}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    for name in options.what:
        MEASUREMENTS[name](options.rounds)


if __name__ == "__main__":
    main()
