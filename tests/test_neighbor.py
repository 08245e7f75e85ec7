"""One hostile feature beside ordinary ones, in every kind of call, at every boundary of the engine.

Pairs of axes are covered, not all combinations: see `problems.pairs`.
"""

import itertools

import pytest

from .calls import FIRST, SECOND, check_first, check_second, first_may_be, second_may_be
from .problems import FAR_SHAPES, KINDS, PLACES, SHAPES, pairs

pytestmark = pytest.mark.filterwarnings("error")  # never a warning: NaN and inf say it

FAR = FIRST | {
    "shape": FAR_SHAPES,
    "kind": [("x", "constant"), ("x", "nan"), ("dout", "offset"), ("gamma", "1e30")],
    "layout": ["C", "features last", "Fortran"],
    "dtype": ["float32", "float64", "float16"],
}
FILLED = FIRST | {
    "shape": SHAPES[::9],
    "kind": [kind for kind in KINDS if kind[0] == "filler"],
    "weights": ["mask", "real", "mask each", "real each"],
    "also": [kind for kind in KINDS if kind[0] in ("x", "dout")],
    "gamma": ["zero", "1e-30"],
}


def filled_may_be(row):
    also = row.get("also", row.get("kind", ("filler", "nan")))
    return first_may_be(row) and first_may_be(row | {"kind": also})


def rows(axes, valid, times=1):
    def name(value):
        if isinstance(value, tuple):
            return "x".join(map(str, value)) if isinstance(value[0], int) else " ".join(value)
        return str(value)

    return [
        pytest.param(row, id="-".join(name(value).replace(" ", "_") for value in row.values()))
        for row in pairs(axes, valid, times)
    ]


@pytest.mark.parametrize("row", rows(FIRST, first_may_be, times=2))
def test_first_order(row):
    check_first(row)


@pytest.mark.parametrize("row", rows(SECOND, second_may_be))
def test_second_order_and_pieces(row):
    check_second(row)


@pytest.mark.parametrize("row", rows(FAR, first_may_be))
def test_beyond_the_caches(row):
    check_first(row)


@pytest.mark.parametrize("row", rows(FILLED, filled_may_be))
def test_a_filler_in_a_feature_that_is_hostile_anyway(row):
    place = PLACES[row["place"]](row["shape"][1])
    check_first(row, {"beside": [(row["also"], place), (("gamma", row["gamma"]), place)]})


def test_a_filler_that_takes_dx_to_the_end_of_the_range():
    """dx of 1.2e308 is in range, and so has to be what it is made of."""
    axes = {name: values[0] for name, values in FIRST.items()}
    row = axes | {"kind": ("filler", "lowest"), "dtype": "float64", "weights": "mask"}
    check_first(row, {"shape": (2, 4, 2), "place": 1, "beta": "open", "seed": 661})


def test_pairs_are_covered():
    axes = {"a": "abcde", "b": [1, 2, 3, 3], "c": [None, True], "d": [4, 5]}

    def valid(row):
        return not (row.get("c", True) is None and row.get("d") == 5)

    table = pairs(axes, valid)
    assert table == pairs(axes, valid)
    for a, b in itertools.combinations(axes, 2):
        expected = {(v, w) for v in axes[a] for w in axes[b] if valid({a: v, b: w})}
        assert {(row[a], row[b]) for row in table} == expected
    assert len(table) < 5 * 3 * 2
