"""One hostile feature beside ordinary ones, in every kind of call, at every boundary of the engine.

Pairs of axes are covered, not all combinations: see `problems.pairs`.
"""

import numpy as np
import pytest

from . import calls
from .arrays import DTYPES, HALVES
from .problems import BETAS, FAR_SHAPES, KINDS, LAYOUT_PAIRS, PLACES, SHAPES, make_problem, pairs

pytestmark = pytest.mark.filterwarnings("error")  # never a warning: NaN and inf say it

TYPES = {np.dtype(dtype).name: dtype for dtype in (*DTYPES, *HALVES)}
COMMON = {
    "shape": SHAPES,
    "kind": KINDS,
    "dtype": list(TYPES),
    "layout": [*LAYOUT_PAIRS, "C", "C", "features last"],  # what is there twice comes up more often
    "place": list(PLACES),
    "eps": [1e-5, 0.0],
}
FIRST = COMMON | {
    "mode": ["train", "train", "test"],
    "activation": [None, "relu", "leaky_relu"],
    "residual": [False, True],
    "weights": [None, None, None, "mask", "real"],
    "needs": ["dx dgamma dbeta dresidual", "dx", "dgamma dbeta", "dbeta", "dx dresidual"],
    "out": ["new", "given", "in place", "over residual"],
    "beta": list(BETAS),
}
SECOND = COMMON | {
    "call": ["second train", "second test", "pieces"],
    "given": ["all", "ddx", "parameters"],
    "weights": [None, "mask", "real"],  # of moments alone
}


def may_be(row):
    place, how = row.get("kind", (None, None))
    return not (
        # 1/sqrt(var) is infinite.
        (row.get("eps") == 0 and how == "subnormal" and row.get("dtype") == "float64")
        or (place == "residual" and row.get("residual") is False)
        or (row.get("out") == "over residual" and row.get("residual") is False)
        or (place == "filler" and row.get("weights", "mask") is None)
    )


def first_may_be(row):
    return row.get("kind", [""])[0] != "ddx" and may_be(row)


def second_may_be(row):
    place, _ = row.get("kind", (None, None))
    return place not in ("residual", "filler") and may_be(row)


def parameters(axes, valid, times=1):
    def name(value):
        if isinstance(value, tuple):
            return "x".join(map(str, value)) if isinstance(value[0], int) else " ".join(value)
        return str(value)

    return [
        pytest.param(row, id="-".join(name(value).replace(" ", "_") for value in row.values()))
        for row in pairs(axes, valid, times)
    ]


def problems_of(row):
    names = "shape", "kind", "layout", "place", "residual", "weights", "beta", "eps"
    given = {name: row[name] for name in names if name in row}
    return make_problem(dtype=TYPES[row["dtype"]], **given)


def check_first(row):
    hostile, ordinary = problems_of(row)
    given = {name: row[name] for name in ("mode", "activation")}

    def call(p):
        return calls.first_order(p, needs=row["needs"], out=row["out"], **given)

    def exact(p, got, f):
        return calls.exact_first_order(p, got, f, **given)

    calls.check_laws(call, exact, hostile, ordinary)


@pytest.mark.parametrize("row", parameters(FIRST, first_may_be, times=2))
def test_first_order(row):
    check_first(row)


FAR = {
    "kind": [("x", "constant"), ("x", "nan"), ("dout", "offset"), ("gamma", "1e30")],
    "layout": ["C", "features last", "Fortran"],
    "dtype": ["float32", "float64", list(TYPES)[-1]],
}


@pytest.mark.parametrize("row", parameters(FIRST | {"shape": FAR_SHAPES} | FAR, first_may_be))
def test_beyond_the_caches(row):
    check_first(row)


@pytest.mark.parametrize("row", parameters(SECOND, second_may_be))
def test_second_order_and_pieces(row):
    hostile, ordinary = problems_of(row)
    if row["call"] == "pieces":
        calls.check_laws(calls.pieces, calls.exact_pieces, hostile, ordinary)
        return
    given = {"mode": row["call"].split()[1], "given": row["given"]}

    def call(p):
        return calls.second_order(p, **given)

    def exact(p, got, f):
        return calls.exact_second_order(p, got, f, **given)

    calls.check_laws(call, exact, hostile, ordinary)
