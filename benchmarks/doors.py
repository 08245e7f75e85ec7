"""Time the doors to other libraries against what their users have today.

    torch      torch.nn.functional.batch_norm in eager mode; forward and backward, float32
    autograd   the NumPy expression that autograd differentiates; value and gradients, float64
    sklearn    StandardScaler; partial_fit in 16 parts, then transform, float32

Both sides are called in turn in one process, and must agree before they are timed. Libraries that
are missing are left out. The exit status is 1 if two results differ.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from results import milliseconds, ratio
from timing import fastest

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:
    sys.exit("doors.py needs rich: pip install -e '.[bench]'")

Arrays = tuple[np.ndarray, ...]


class Contest(NamedTuple):
    """One row of the table. Both calls return the same arrays."""

    what: str
    theirs: Callable[[], Arrays]
    ours: Callable[[], Arrays]
    tolerance: float  # of the results, as a fraction of their largest value


def through_torch(shape: tuple[int, ...]) -> Contest:
    import torch

    from bn_fast.torch import batch_norm

    rng = np.random.default_rng(0)
    x, dout = (torch.from_numpy(rng.standard_normal(shape, np.float32)) for _ in range(2))
    weight, bias = torch.ones(shape[1]), torch.zeros(shape[1])
    leaves = [a.requires_grad_() for a in (x, weight, bias)]

    def run(function: Callable[..., Any]) -> Callable[[], Arrays]:
        running = torch.zeros(shape[1]), torch.ones(shape[1])

        def call() -> Arrays:
            y = function(x, *running, weight, bias, True)
            gradients = torch.autograd.grad(y, leaves, dout)
            return tuple(a.detach().numpy() for a in (y, *gradients))

        return call

    return Contest("torch", run(torch.nn.functional.batch_norm), run(batch_norm), 1e-4)


def through_autograd(shape: tuple[int, ...]) -> Contest:
    import autograd.numpy as anp
    from autograd import value_and_grad

    from bn_fast.autograd import batch_norm

    rng = np.random.default_rng(0)
    x, dout = (rng.standard_normal(shape) for _ in range(2))
    parameters = np.ones(shape[1]), np.zeros(shape[1])
    others = tuple(d for d in range(x.ndim) if d != 1)
    columns = (-1,) + (1,) * (x.ndim - 2)

    def expression(x: Any, gamma: Any, beta: Any) -> Any:
        mean = anp.mean(x, axis=others, keepdims=True)
        var = anp.var(x, axis=others, keepdims=True)
        x_hat = (x - mean) / anp.sqrt(var + 1e-5)
        return gamma.reshape(columns) * x_hat + beta.reshape(columns)

    def run(function: Callable[..., Any]) -> Callable[[], Arrays]:
        loss = value_and_grad(lambda *given: anp.sum(function(*given) * dout), (0, 1, 2))

        def call() -> Arrays:
            value, gradients = loss(x, *parameters)
            return np.asarray(value), *gradients

        return call

    return Contest("autograd", run(expression), run(batch_norm), 1e-9)


def through_sklearn(shape: tuple[int, ...]) -> Contest:
    from sklearn.preprocessing import StandardScaler

    from bn_fast.sklearn import BatchNormalizer

    x = np.random.default_rng(0).standard_normal(shape, np.float32) + 3

    def run(make: Callable[[], Any]) -> Callable[[], Arrays]:
        def call() -> Arrays:
            estimator = make()
            for part in np.array_split(x, 16):
                estimator.partial_fit(part)
            return estimator.mean_, estimator.var_, estimator.transform(x)

        return call

    return Contest("sklearn", run(StandardScaler), run(lambda: BatchNormalizer(eps=0)), 1e-5)


TABLES = [(1797, 64), (100000, 64), (1000000, 24)]
LAYERS = [(32, 64), (256, 512), (65536, 128), (32, 64, 56, 56)]
DOORS = {
    "torch": (through_torch, LAYERS),
    "autograd": (through_autograd, LAYERS),
    "sklearn": (through_sklearn, TABLES),
}


def contests(doors: list[str], quick: bool) -> Iterator[tuple[tuple[int, ...], Contest]]:
    for library in doors:
        prepare, shapes = DOORS[library]
        if find_spec(library):
            for shape in shapes[:1] if quick else shapes:
                yield shape, prepare(shape)


def agree(contest: Contest) -> bool:
    return all(
        a.shape == b.shape and np.abs(a - b).max() <= contest.tolerance * max(1, np.abs(b).max())
        for a, b in zip(contest.ours(), contest.theirs(), strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default: 9")
    parser.add_argument(
        "--doors", nargs="+", choices=DOORS, default=list(DOORS), help="default: all"
    )
    parser.add_argument("--quick", action="store_true", help="the smallest shapes only")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")

    table = Table(title="ms of a call, the fastest block", title_justify="left", title_style="bold")
    for heading in ("door", "shape", "theirs", "bn_fast", "ratio"):
        table.add_column(heading, justify="left" if heading == "door" else "right")
    wrong = False
    console = Console()
    with console.status("") as status:
        for shape, contest in contests(options.doors, options.quick):
            name = " x ".join(map(str, shape))
            status.update(f"{contest.what}, {name}")
            if not agree(contest):
                wrong = True
                table.add_row(contest.what, name, "", "WRONG", "")
                continue
            calls = {"theirs": contest.theirs, "ours": contest.ours}
            theirs, ours = fastest(calls, options.rounds).values()
            cells = milliseconds(theirs), milliseconds(ours), ratio(theirs / ours)
            table.add_row(contest.what, name, *cells)
    console.print(table)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
