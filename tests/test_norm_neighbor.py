"""One hostile row or group beside ordinary ones, in every norm, at every boundary of the engine.

The laws of `test_neighbor`, for norms whose statistics lie within a sample: the others' bits are as
if it were not there, its own numbers are right, and all bits are the same on every number of
threads and every instruction set. A sample has its bits alone as well.
"""

import numpy as np
import pytest

from bn_fast import norms
from bn_fast._cache import Axes
from bn_fast._core import core

from . import judge, oracle
from .arrays import twin
from .calls import LIMIT, TYPES, _same, _step
from .judge import Exact
from .problems import ENGINES, LAYOUT_PAIRS, LAYOUTS, PARAMETERS, VALUES, around, engine, pairs
from .test_norms import Case, label

pytestmark = pytest.mark.filterwarnings("error")


def boundary_cases(at):
    """Cases just below, at and above the boundaries `at` (`core.boundaries`)."""
    short = around(at["LANES"], at["ROW_LENGTH"], at["TREE_COLUMNS"])
    long = around(at["FOLD_COLUMNS"], at["PIECE"], at["ROW_PIECE"], 2 * at["ROW_PIECE"])
    tall = [*around(at["FOLD_ROWS"]), *around(at["MAX_UNITS"] * at["FOLD_ROWS"])]
    many = around(at["TREE_COLUMNS"], at["FOLD_COLUMNS"], at["TILE_COLUMNS"])
    run = 49  # 7 x 7
    piece = at["BLOCK_ELEMENTS"]
    of_rows = [
        *(((5, n), -1) for n in (1, 2, 3, *short, *long)),
        ((2, 8 * at["ROW_PIECE"] + 15), -1),
        *(((n, 40), -1) for n in tall),
        *(((n, 5), -1) for n in (*tall, *many, at["MAX_UNITS"] * at["FOLD_COLUMNS"] + 1)),
        *(((n, 9), 0) for n in short),
        *(((40, n), 0) for n in (1, *many)),
        *(((2, n, run), 1) for n in short),
        ((3, 4, at["ROW_LENGTH"], 5), (1, 2)),
        ((9, 4, 50), (0, 2)),
        ((2, 3, at["FOLD_COLUMNS"] + 1, 3), (1, 3)),
    ]
    of_groups = [
        *(((3, 6, n), 1, 2) for n in (1, *short, *around(at["SHORT_RUN"], at["ALONG_RUN"]))),
        *(((2, 2 * n, 5), 1, 2) for n in (1, 2, *short)),
        *(((2, n, 3), 1, n) for n in (1, *short)),
        ((at["FOLD_ROWS"] + 1, 4, 3, 3), 1, 2),
        ((2, 6, 7, 7), 1, 1),
        ((2, 7, 7, 12), -1, 3),
        *(((2, n, 3), 1, 1) for n in around(at["TILE_COLUMNS"], at["MAX_COLUMNS"])),
        *(((2, 3, n), -1, 1) for n in around(at["TILE_COLUMNS"], at["MAX_COLUMNS"])),
        *(((2, n, at["ROW_LENGTH"]), 1, 1) for n in around(at["BLOCK_ROWS"])),
        ((1, 2 * at["MAX_COLUMNS"] + 2, at["ROW_LENGTH"]), 1, 2),
        *(((n, 2 * at["FOLD_ROWS"] + 2, 2), 1, 2) for n in (1, 3)),
        ((1, 4, piece + 1), 1, 2),
        ((2, 8), 1, 4),
    ]
    of_channels = [
        *(((3, 2, n), 1) for n in (2, *short, *around(at["SHORT_RUN"], at["ALONG_RUN"]))),
        *(((2, 2, n), 1) for n in (*around(at["PIECE"]), 2 * at["PIECE"] + 15)),
        *(((2, n, run), 1) for n in around(at["TILE_COLUMNS"] // run)),
        ((1, 2, piece + 1), 1),
        ((2, 7, 7, 20), -1),
        ((2, 2, at["BLOCK_ROWS"] + 1, 7), 1),
    ]
    of_norms = {
        "layernorm": of_rows,
        "rmsnorm": of_rows[::2],
        "groupnorm": of_groups,
        "instancenorm": of_channels,
    }
    return list(dict.fromkeys(Case(norm, *case) for norm in of_norms for case in of_norms[norm]))


CASES = boundary_cases(core.boundaries)
KINDS = [
    *(("x", how) for how in VALUES),
    *(("dout", how) for how in ("constant", "zero", "nan", "inf", "1e30", "largest", "subnormal")),
    *(("dout", how) for how in ("offset", "outlier")),
    *(("gamma", how) for how in PARAMETERS),
    *(("beta", how) for how in ("nan", "1e30")),
]
PLACES = {"first": lambda n: 0, "middle": lambda n: n // 2, "last": lambda n: n - 1}
ROW = {
    "case": CASES,
    "kind": KINDS,
    "dtype": list(TYPES),
    "layout": [*LAYOUT_PAIRS, "C", "C", "features last"],
    "place": list(PLACES),
    "eps": [1e-5, 0.0],
    "affine": ["both", "both", "gamma", "beta", "neither"],
    "out": [None, "given", "in place"],
    "needs": ["dx dgamma dbeta", "dx", "dgamma dbeta"],
}


def may_be(row):
    name, how = row.get("kind", ("x", ""))
    repeated = row.get("layout", "").startswith("dout repeated")
    if name == "dout" and (repeated or "dx" not in row.get("needs", "dx").split()):
        return False
    if (name, how, row.get("dtype"), row.get("eps")) == ("x", "subnormal", "float64", 0):
        return False  # 1/sqrt(var) is infinite
    affine = row.get("affine", "both")
    if row.get("case", CASES[0]).norm == "rmsnorm" and (name == "beta" or affine == "beta"):
        return False
    return name not in ("gamma", "beta") or affine in ("both", name)


class Problem:
    """A case's arrays, one statistic or parameter of which is hostile, or none is."""

    def __init__(self, row, kind=None, place=None, seed=0):
        case, dtype = row["case"], np.dtype(TYPES[row["dtype"]])
        self.case, self.eps = case, row["eps"]
        x, dout, gamma, beta = case.problem(np.float64, seed)
        axes = cut(case)
        shape = axes.stats_shape
        numbers = np.arange(int(np.prod(shape))).reshape(shape)
        self.statistic = np.broadcast_to(numbers, axes.shape).reshape(case.shape)
        self.spread = [1] * len(case.shape)  # a parameter against x
        for d in np.atleast_1d(case.axis):
            self.spread[d] = case.shape[d]
        n = int(np.prod(shape))
        self.place = PLACES[place](n) if isinstance(place, str) else place
        name, how = kind or (None, None)
        if name in ("x", "dout"):
            array = x if name == "x" else dout
            own = self.statistic == self.place
            with np.errstate(all="ignore"):
                array[own] = VALUES[how](array[own], dtype)
        self.column = None
        if name in ("gamma", "beta"):
            parameter = gamma if name == "gamma" else beta
            self.column = PLACES[place](parameter.size) if isinstance(place, str) else 0
            parameter.flat[self.column] = PARAMETERS[how]
        x_layout, g_layout = LAYOUT_PAIRS[row["layout"]]
        kind = np.float64 if dtype == np.float64 else np.float32
        with np.errstate(over="ignore"):
            self.x, self.dout = LAYOUTS[x_layout](x.astype(dtype)), dout.astype(dtype)
            self.dout = LAYOUTS[g_layout](self.dout)
            self.gamma = gamma.astype(kind) if row["affine"] in ("both", "gamma") else None
            self.beta = beta.astype(kind) if row["affine"] in ("both", "beta") else None

    def own(self, a, k):
        """The values that share statistic k, as a row; of a parameter those against them."""
        if a.shape != self.x.shape:
            a = np.broadcast_to(a.reshape(self.spread), self.x.shape)
        return a[self.statistic == k][None]


def cut(case):
    """The axes of a case, as the cache has them."""
    x = np.zeros(case.shape, np.float32)
    axes = case.forward(norms, x, None, None)[1].axes
    assert isinstance(axes, Axes)
    return axes


def results(p, out, needs):
    """Forward, forward alone and backward, by their names; the buffers are the caller's or new."""
    x, dout = p.x, p.dout
    own = {"given": np.full_like(x, np.nan, order="C"), "in place": twin(x)}.get(out)
    y, cache = p.case.forward(norms, own if out == "in place" else x, p.gamma, p.beta,
                              eps=p.eps, out=own)  # fmt: skip
    if out == "in place":
        cache = p.case.forward(norms, x, p.gamma, p.beta, eps=p.eps)[1]
    assert own is None or y is own
    judge.assert_same_bits(
        [judge.one_nan(p.case.alone(norms, x, p.gamma, p.beta, eps=p.eps))], [judge.one_nan(y)]
    )
    names = [n for n in needs.split() if n != "dbeta" or p.case.norm != "rmsnorm"]
    own = None
    if "dx" in names:
        own = {"given": np.full_like(x, np.nan, order="C"), "in place": twin(dout)}.get(out)
    gradients = p.case.backward(
        norms, own if out == "in place" and own is not None else dout, cache, needs=names, out=own
    )
    named = zip(("dx", "dgamma", "dbeta"), gradients, strict=True)
    return {"out": y} | {name: a for name, a in named if a is not None}


def exact(p, k):
    """What out and dx of statistic k should be."""
    x, dout = p.own(p.x, k), p.own(p.dout, k)
    gamma = np.ones_like(x, np.float64) if p.gamma is None else p.own(p.gamma, k)
    beta = np.zeros_like(x, np.float64) if p.beta is None else p.own(p.beta, k)
    kind = "rmsnorm" if p.case.norm == "rmsnorm" else "layernorm"
    out, _, inv_std, gradients = oracle.norm(kind, x, gamma[0], beta[0], dout, axis=-1, eps=p.eps)
    r, most = oracle.largest(inv_std), oracle.largest(gamma)
    step, lost = _step(p.x.dtype), 2.0**-1074 * r
    loose = not all(np.isfinite(a).all() for a in (x, dout, gamma, out, inv_std))
    lost_dx = step * (1 + most * r)
    if p.gamma is not None and p.case.norm != "instancenorm":
        # gamma dout is rounded before its mean is taken off: half an eps of all of it.  Where gamma
        # hardly varies and dout lies far from 0, that is more than what dx has left.
        with np.errstate(all="ignore"):
            product = oracle.largest(np.asarray(gamma, np.float64) * np.asarray(dout, np.float64))
        lost_dx += 2.0 ** (-53 if p.x.dtype == np.float64 else -24) * product * r
    return {
        "out": Exact(out, max(most, oracle.largest(beta)), lost * most, loose=loose),
        "dx": Exact(gradients.dx, gradients.dx_scale, lost_dx, loose=loose),
    }


def check_laws(hostile, ordinary, out, needs):
    with engine("base", 1):
        expected = results(ordinary, out, needs)
        got = results(hostile, out, needs)
    faults = []
    others = hostile.statistic != hostile.place
    for name in ("out", "dx") if hostile.column is None else ("out",):
        if name not in got:
            continue
        if hostile.column is not None:  # other parameters' columns
            numbers = np.zeros(hostile.case.parameter_shape)
            numbers.flat[hostile.column] = 1
            others = np.broadcast_to(numbers.reshape(hostile.spread), hostile.case.shape) == 0
        if not _same(got[name][others], expected[name][others]):
            faults.append(f"{name} of others is not what it is beside ordinary ones")
    for isa, n_threads in ENGINES:
        with engine(isa, n_threads):
            again = results(hostile, out, needs)
        faults += [
            f"{name} differs on {isa} with {n_threads} threads"
            for name, a in got.items()
            if not _same(again[name], a)
        ]
    n = int(hostile.statistic.max(initial=0)) + 1
    for who, k in (("hostile", hostile.place), ("neighbor", (hostile.place + 1) % n)):
        with np.errstate(all="ignore"):
            should = exact(hostile, k)
        for name, right in should.items():
            if name in got:
                own = hostile.own(got[name], k)
                fault = judge.fault(name, own, right, hostile.x.dtype, LIMIT)
                faults += [f"{who}: {fault}"] * bool(fault)
    assert not faults, "\n".join(faults)


def check_sample_alone(p):
    """The last sample, on another engine."""
    alone = p.case._replace(shape=(1, *p.case.shape[1:]))
    with engine(*ENGINES[-1]):
        out, cache = p.case.forward(norms, p.x, p.gamma, p.beta, eps=p.eps)
        dx = p.case.backward(norms, p.dout, cache)[0]
    with engine("base", 1):
        own, cache = alone.forward(norms, p.x[-1:], p.gamma, p.beta, eps=p.eps)
        own_dx = alone.backward(norms, p.dout[-1:], cache)[0]
    assert _same(own, out[-1:])
    assert _same(own_dx, dx[-1:])


def check_norm(row, seed=0):
    hostile = Problem(row, row["kind"], row["place"], seed)
    ordinary = Problem(row, None, row["place"], seed)
    check_laws(hostile, ordinary, row["out"], row["needs"])
    if hostile.case.n_samples > 1:
        check_sample_alone(hostile)


def label_of(row):
    return "-".join(
        label(v) if isinstance(v, Case) else " ".join(v) if isinstance(v, tuple) else str(v)
        for v in row.values()
    ).replace(" ", "_")


@pytest.mark.parametrize("row", pairs(ROW, may_be), ids=label_of)
def test_norm(row):
    check_norm(row)
