"""Problems for the engine's every way: sizes at its boundaries, one hostile feature, pairs of axes.

A problem is ordinary but for one feature, which is hostile in one of KINDS. Its sizes lie around
the boundaries that the compiled module names, so that they follow the engine wherever it goes.
"""

import itertools
import random
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import numpy as np

import bn_fast.functional
from bn_fast._core import core, isa, isa_available

from .arrays import LAYOUTS, normal, spread_weights
from .judge import assert_same_bits

# Every number of threads and every instruction set against "base" on one thread; all sets share the
# code that deals the work out.
THREADS = 1, 2, 3, 7
ENGINES = [
    *((isa_available[-1], n) for n in THREADS),
    *((isa, n) for isa, n in zip(isa_available[:-1], itertools.cycle(THREADS[1:]), strict=False)),
]


@contextmanager
def engine(isa, n_threads):
    """Every call, however small, on this instruction set and number of threads.

    Where there is a straight road, all take it.
    """
    chosen = import_module(f"bn_fast._core_{isa}")
    serial = bn_fast.functional._SERIAL_SIZE
    try:
        for module in _users_of_core():
            module.core = chosen
        if n_threads > 1:
            bn_fast.functional._SERIAL_SIZE = 0
        bn_fast.set_num_threads(n_threads)
        yield chosen
    finally:
        bn_fast.set_num_threads(None)
        bn_fast.functional._SERIAL_SIZE = serial
        for module in _users_of_core():
            module.core = core


def assert_same_on_any_threads(results):
    """Of a function of no arguments, to the bit."""
    found = []
    for n_threads in (1, 2, 5):
        with engine(isa, n_threads):
            found.append(results())
    for other in found[1:]:
        assert_same_bits(other, found[0])


@cache
def _users_of_core():
    modules = [m for name, m in sys.modules.items() if name.startswith("bn_fast.")]
    return [m for m in modules if getattr(m, "core", None) is core]


# Sizes


def around(*limits):
    return [n + step for n in limits for step in (-1, 0, 1)]


def boundary_shapes(at):
    """Shapes (N, C, ...) just below, at and above the boundaries `at` (`core.boundaries`)."""
    join = at["JOIN_COLUMNS"] // 3  # rows of three features, when there are many
    short = at["SHORT_COLUMNS"] // 3  # and when there are few
    tall = 3 * at["JOIN_ROWS"] + 5  # rows enough to be joined in threes, with some left over
    unjoined = at["JOIN_COLUMNS"] // 2 + 2
    run = 49  # 7 x 7: short, walked across
    rows_of_runs = at["BLOCK_ROWS"] * at["MAX_CHUNKS"]
    piece = at["BLOCK_ELEMENTS"]
    prime = 2 * at["PIECE"] + 15  # no equal pieces
    split = at["SPLIT_FROM"] // (4 * 600)  # rows of 600 features, float32
    return dict.fromkeys(
        [
            # Features side by side: joined, gathered, a thread's share of them, their tiles.
            *((tall, n) for n in around(at["NARROW"], at["SHARE_FEATURES"])),
            *((2 * tall, n) for n in around(at["JOIN_COLUMNS"] // 2)),
            (tall, 100),
            *((at["BLOCK_ROWS"] + 2, n) for n in around(at["GATHER_COLUMNS"])),
            *((at["BLOCK_ROWS"] + 2, n) for n in around(at["TILE_COLUMNS"])),
            *((2 * at["TREE_ROWS"] + 3, n) for n in around(at["MAX_COLUMNS"])),
            (at["TREE_ROWS"] + 1, 2 * at["MAX_COLUMNS"]),
            *((n, 600) for n in around(split)),
            # Their rows: trees, blocks, chunks.
            *(
                (n, unjoined)
                for n in around(at["APPLY_ROWS"], at["TREE_ROWS"], 2 * at["TREE_ROWS"])
            ),
            (2 * at["TREE_ROWS"] + 3, 1024),  # whole pages apart
            *((n, unjoined) for n in around(at["BLOCK_ROWS"] // at["BLOCK_SHARE"])),
            *((n, unjoined) for n in around(at["BLOCK_ROWS"])),
            (3 * at["BLOCK_ROWS"] + 1, unjoined),
            (2 * at["CHUNK_ELEMENTS"] // unjoined + 1, unjoined),
            *((n, 3) for n in around(short, at["JOIN_ROWS"] * short)),
            *((n, 3) for n in around(join * at["BLOCK_ROWS"])),
            *((n, 33) for n in around(at["LANES"] * at["JOIN_ROWS"])),  # whole vectors
            *((n, 2, 3) for n in around(rows_of_runs // 2, rows_of_runs)),
            (2 * at["CHUNK_ELEMENTS"] // 6 + 1, 2, 3),
            # Runs: along and across, trees of lanes, equal pieces and others.
            *((5, 3, n) for n in around(at["SHORT_RUN"], at["ALONG_RUN"], at["ALONG_WEIGHED"])),
            *((3, n, at["ALONG_RUN"]) for n in around(at["MAX_TURNS"])),
            *((9, n, at["ALONG_RUN"]) for n in around(at["GATHER_ELEMENTS"] // at["ALONG_RUN"])),
            *((n, 3, at["SHORT_RUN"]) for n in around(at["SHORT_RUN"] // at["SHORT_ROWS"])),
            *((2, 3, n * at["LANES"] + 5) for n in (7, 15, 18)),  # fours, ones and a rest
            *((3, 2, n) for n in around(at["SHORT_RUN"] + at["LANES"])),
            *((2, 3, n) for n in around(at["PIECE"])),
            (2, 2, prime),
            *((n, 1) for n in around(piece)),
            (2, 3, piece + 1),
            *((9, n, run) for n in around(at["TILE_COLUMNS"] // run, at["MAX_COLUMNS"] // run)),
            *((at["BLOCK_ROWS"] // 2 + 1, n, 7, 7) for n in (3, 2 * at["MAX_COLUMNS"] // run)),
            (9, 4 * at["LANES"] + 1, 7, 7),  # tiles of whole vectors
            (3, at["SHARE_FEATURES"] + 1, at["LANES"]),
            (2, 5),
            (1, 7),
        ]
    )


SHAPES = list(boundary_shapes(core.boundaries))


def far_shapes(at):
    """Arrays beyond the boundaries between the caches: prefetched, streamed past them."""
    streamed = at["STREAM_BYTES"] // 4 // 3  # three arrays of float32
    return [
        (streamed // 130 + 1, 130),
        (streamed // 21 + 1, 21),
        (at["PREFETCH_OUTPUT_BYTES"] // 4 // 21000 + 1, 21, 1000),
        (at["PREFETCH_BYTES"] // 2 // 4 // (40 * 49) + 1, 40, 7, 7),
    ]


FAR_SHAPES = far_shapes(core.boundaries)


# Kinds of hostile features


def _range(dtype):
    """Of the floating-point type: eps, largest, smallest normal, smallest subnormal."""
    if dtype.name == "bfloat16":
        return 2.0**-7, 2.0**127, 2.0**-126, 2.0**-133
    info = np.finfo(dtype)
    return float(info.eps), float(info.max), float(info.tiny), float(info.smallest_subnormal)


def _some(n, value):
    """n values at the places that a guess might look at: first, middle, last."""

    def change(v, dtype):
        places = [0, *range((len(v) - 1) // 2, (len(v) + 4) // 2), *range(-4, 0)]
        v[[k for k in places if -len(v) <= k < len(v)][:n]] = value
        return v

    return change


def _one(value, place=1 / 3):
    def change(v, dtype):
        v[int(place * len(v))] = value
        return v

    return change


def _scaled(scale):
    def change(v, dtype):
        return v * min(scale, _range(dtype)[1] / 64)

    return change


def _subnormal(v, dtype):
    return np.round(100 * v) * _range(dtype)[3]


def _offset(v, dtype):
    return v + min(1e6, 0.1 / _range(dtype)[0]) * v.std()


def _huge_offset(v, dtype):
    """As large as a sum of them allows, and nearly all alike."""
    far = {2: 1e4, 4: 1e36, 8: 1e300}[dtype.itemsize]
    return (1 + max(1e-3, 4 * _range(dtype)[0]) * v) * far


def _outliers(v, dtype):
    size = min(1e9 if dtype.itemsize < 8 else 1e17, _range(dtype)[1] / 64)
    return _some(10, size)(np.ones_like(v), dtype)


def _outlier(v, dtype):
    return _one(min(1e6, _range(dtype)[1] / 64))(v, dtype)


VALUES = {
    "constant": lambda v, dtype: np.full_like(v, 0.1),
    "constant, largest": lambda v, dtype: np.full_like(v, _range(dtype)[1] / 4),
    "zero": lambda v, dtype: np.zeros_like(v),
    "nan": _one(np.nan),
    "inf": _one(np.inf, 0),
    "-inf": _one(-np.inf, 0.99),
    "1e30": _scaled(1e30),
    "1e-30": _scaled(1e-30),
    "largest": lambda v, dtype: v * (_range(dtype)[1] / 64),
    "root": lambda v, dtype: v * (_range(dtype)[1] ** 0.5 / 64),  # its variance is in range yet
    "subnormal": _subnormal,
    "offset": _offset,
    "huge offset": _huge_offset,
    "outlier": _outlier,
    "outliers": _outliers,
}
PARAMETERS = {
    "zero": 0.0,
    "nan": np.nan,
    "inf": np.inf,
    "1e30": 1e30,
    "1e-30": -1e-30,
}
FILLERS = {
    "nan": lambda dtype: np.nan,
    "inf": lambda dtype: -np.inf,
    "lowest": lambda dtype: -_range(dtype)[1],
}
# The array (or the weights' filler in x) that one feature is hostile in, and how.
KINDS = [
    *(("x", how) for how in VALUES),
    *(("dout", how) for how in VALUES),
    *(("gamma", how) for how in PARAMETERS),
    *(("beta", how) for how in ("nan", "inf", "1e30")),
    *(("residual", how) for how in ("nan", "-inf", "1e30", "largest")),
    *(("ddx", how) for how in ("nan", "constant", "1e30", "1e-30", "offset")),
    *(("filler", how) for how in FILLERS),
]


@dataclass
class Problem:
    """The arrays of every kind of call, features on axis 1; `feature` is the hostile one."""

    x: np.ndarray
    dout: np.ndarray
    ddx: np.ndarray
    residual: np.ndarray | None
    weights: np.ndarray | None
    gamma: np.ndarray
    beta: np.ndarray
    ddgamma: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    eps: float
    feature: int

    def column(self, name, feature):
        """The feature's values alone: of shape (M, 1), or (1,) of a parameter."""
        a = getattr(self, name)
        if a is None:
            return None
        if name == "weights":
            return np.broadcast_to(a, self.x.shape)[:, feature].reshape(-1, 1)
        return a[feature : feature + 1] if a.ndim == 1 else a[:, feature].reshape(-1, 1)


PLACES = {
    "first": lambda n: 0,
    "middle": lambda n: n // 2,
    "last": lambda n: n - 1,
    "share": lambda n: min(core.boundaries["SHARE_FEATURES"], n - 1),
}
# Of x (and ddx and residual), and of dout.
LAYOUT_PAIRS = {
    "C": ("C", "C"),
    "Fortran": ("Fortran", "Fortran"),
    "features last": ("features last", "features last"),
    "permuted": ("permuted", "permuted"),
    "sliced": ("sliced", "sliced"),
    "reversed": ("reversed", "sliced backwards"),
    "mixed": ("C", "Fortran"),
    "dout repeated": ("features last", "broadcast first"),
    "dout repeated along": ("sliced", "broadcast last"),  # of two dimensions the first: no features
}
OPTIONS = {  # activation, residual, weights
    "residual": (None, True, None),
    "relu": ("relu", False, None),
    "leaky_relu residual": ("leaky_relu", True, None),
    "weights": (None, False, "real"),
    "weights of each": (None, False, "real each"),
    "relu residual mask of each": ("relu", True, "mask each"),
    "relu mask": ("relu", False, "mask"),
    "leaky_relu residual weights": ("leaky_relu", True, "integers"),
}
BETAS = {"open": 0.7, "shut": -0.7, "edge": 0.0}


def make_problem(
    shape, kind, dtype, layout="C", place="middle", residual=True, weights=None, beta="open",
    eps=1e-5, beside=(), seed=0,
):  # fmt: skip
    """The problem, and the same with an ordinary feature in the hostile one's place.

    place: a name or a number. residual: whether there is one, or "opposite", which leaves of
    ordinary features what their rounding leaves, for the gate. beside: kinds and places of more
    that is hostile, in both.
    """
    dtype = np.dtype(dtype)
    n = shape[1]
    f = PLACES[place](n) if isinstance(place, str) else place
    values = {
        "x": 3 + 2 * normal(shape, np.float64, seed + 1),
        "dout": normal(shape, np.float64, seed + 2) + 0.5,
        "ddx": normal(shape, np.float64, seed + 3) - 0.25,
        "residual": normal(shape, np.float64, seed + 4),
        "gamma": 1 + normal(n, np.float64, seed + 5) / 4,
        "beta": normal(n, np.float64, seed + 6),
        "ddgamma": normal(n, np.float64, seed + 7),
    }
    values["beta"][f] = BETAS[beta]
    w = spread_weights(shape, 1, weights)
    if residual == "opposite":
        values["residual"] = _opposite(values, dtype, eps)
    for other, where in beside:
        _spoil(values, w, other, where, dtype)
    ordinary = _laid_out(values, w, dtype, layout, residual, eps, f)
    _spoil(values, w, kind, f, dtype)
    hostile = _laid_out(values, w, dtype, layout, residual, eps, f)
    others = np.arange(n) != f
    for name in ("mean", "var"):  # of the same x to the same bits, however they were summed
        getattr(hostile, name)[others] = getattr(ordinary, name)[others]
    return hostile, ordinary


def _opposite(values, dtype, eps):
    """What makes 0 of the output, but for roundings."""
    x = np.moveaxis(values["x"].astype(dtype).astype(np.float64), 1, -1)
    others = tuple(range(x.ndim - 1))
    std = np.sqrt(x.var(axis=others) + eps)
    x_hat = (x - x.mean(axis=others)) / np.where(std == 0, 1, std)
    return np.moveaxis(-(x_hat * values["gamma"] + values["beta"]), -1, 1).copy()


def _spoil(values, w, kind, f, dtype):
    """Make feature f hostile."""
    name, how = kind
    if name == "filler":
        values["x"][:, f][np.broadcast_to(w == 0, values["x"].shape)[:, f]] = FILLERS[how](dtype)
    elif values[name].ndim == 1:
        values[name][f] = PARAMETERS[how]
    else:
        own = values[name][:, f]
        with np.errstate(all="ignore"):  # of one that is hostile already
            own[...] = VALUES[how](own.ravel(), dtype).reshape(own.shape)


def _laid_out(values, w, dtype, layout, residual, eps, f):
    x_layout, g_layout = LAYOUT_PAIRS[layout]
    if g_layout == "broadcast last" and values["x"].ndim == 2:
        g_layout = "broadcast first"
    given = {}
    with np.errstate(over="ignore"):
        for name, a in values.items():
            if a.ndim == 1:
                given[name] = a.astype(np.float64 if dtype.itemsize == 8 else np.float32)
            else:
                way = g_layout if name == "dout" else x_layout
                given[name] = LAYOUTS[way](a.astype(dtype))
    if not residual:
        given["residual"] = None
    mean, var = _finite_statistics(given["x"])
    return Problem(weights=w, mean=mean, var=var, eps=eps, feature=f, **given)


def _finite_statistics(x):
    """Mean and variance of what is finite of each feature, the latter within float64's range."""
    axes = tuple(d for d in range(x.ndim) if d != 1)
    with np.errstate(all="ignore"):
        mean, var = (
            a.astype(np.float64) for a in (x.mean(axes, np.float64), x.var(axes, np.float64))
        )
    for f in np.flatnonzero(~(np.isfinite(mean) & (var < 1e300))):
        own = np.asarray(x[:, f], np.longdouble)
        own = own[np.isfinite(own)]
        mean[f], var[f] = (own.mean(), min(own.var(), 1e300)) if own.size else (0, 1)
    return mean, var


# Pairs


def pairs(axes, valid=lambda row: True, times=1):
    """Rows (dicts) in which every two values of two axes meet so many times, if they may.

    The two longest axes are multiplied. Then each axis in turn takes, in each row, the value whose
    pairs with the row have met least (one that is listed twice comes up twice as often); pairs
    that never met get rows of their own. `valid` says of a part of a row whether it may be. The
    rows and their order are always the same.
    """
    dice = random.Random(0)
    names = sorted(axes, key=lambda name: -len(axes[name]))
    share = {name: Counter(axes[name]) for name in names}
    met = {(name, v): Counter() for name in names for v in share[name]}

    def worth(own, others):
        """How little a value of an axis has met those of the others."""
        seen, of = met[own], share[own[0]][own[1]]
        return sum(seen[v] / of if seen[v] >= times else -100 for v in others)

    def fill(row):
        for name in names:
            if name not in row:
                others = list(row.items())
                tried = [(name, v) for v in share[name] if valid(row | {name: v})]
                dice.shuffle(tried)
                own = min(tried, key=lambda own: worth(own, others))
                row = row | dict([own])
        for pair in itertools.permutations(row.items(), 2):
            met[pair[0]][pair[1]] += 1
        return {name: row[name] for name in axes}

    rows = []
    for a, b in itertools.combinations(names, 2):
        both = [{a: v, b: w} for v, w in itertools.product(share[a], share[b])] * times
        dice.shuffle(both)
        rows += [fill(row) for row in both if valid(row) and met[a, row[a]][b, row[b]] < times]
    return rows
