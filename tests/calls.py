"""Kinds of calls by the names of their results, what each feature of them should be, and the laws
that hold however hostile a feature is beside the others.
"""

import numpy as np

import bn_fast
from bn_fast import batchnorm_backward, batchnorm_double_backward, batchnorm_forward, reference

from . import judge, oracle
from .arrays import DTYPES, HALVES, twin, widened
from .judge import Exact, one_nan
from .problems import (
    BETAS,
    ENGINES,
    KINDS,
    LAYOUT_PAIRS,
    PLACES,
    SHAPES,
    engine,
    make_problem,
)

SLOPE = 0.25  # a power of two: exact in every dtype
MOMENTUM = 0.75
GRADIENTS = "dx", "dgamma", "dbeta", "dresidual"
PASSED_ON = "mean", "var", "inv_std", "sum_dout", "sum_dout_xmu", "whole sum_dout_xmu"
LIMIT = 6  # of the options' tests


# Calls. Each gives its results as a dict; arrays of x's size are the new ones' or the caller's.


def _settings(p, mode):
    param = {"mode": mode, "eps": p.eps, "momentum": MOMENTUM}
    if mode == "test":
        return param | {"running_mean": p.mean, "running_var": p.var}
    return param | {"running_mean": np.ones_like(p.mean), "running_var": np.ones_like(p.mean)}


def first_order(p, mode, activation, needs, out):
    """Forward and backward, with running averages."""
    param = _settings(p, mode)
    given = {"activation": activation, "negative_slope": SLOPE, "weights": p.weights}

    def forward(x, residual, out=None):
        return batchnorm_forward(x, p.gamma, p.beta, param, residual=residual, out=out, **given)

    x, residual = p.x, p.residual
    own = None
    if out == "given":
        own = np.full_like(x, np.nan, order="C")
    elif out == "in place":
        x = own = twin(x)
    elif out == "over residual":
        residual = own = twin(residual)
    y, cache = forward(x, residual, own)
    assert own is None or y is own
    averages = {name: param[name] for name in ("running_mean", "running_var")}
    if x is own or residual is own:  # that cache is spent
        cache = forward(p.x, p.residual)[1]
    names = [name for name in needs.split() if p.residual is not None or name != "dresidual"]
    own = None
    if "dx" in names:
        own = {"given": np.full_like(p.x, np.nan, order="C"), "in place": twin(p.dout)}.get(out)
    over = own if out == "in place" and own is not None else p.dout
    gradients = batchnorm_backward(over, cache, needs=names, out=own)
    results = dict(zip(GRADIENTS, gradients, strict=False))
    assert own is None or results["dx"] is own
    assert {name for name, a in results.items() if a is not None} == set(names)
    return {"out": y} | averages | {name: results[name] for name in names}


def second_order(p, mode, given):
    param = _settings(p, mode)
    _, cache = batchnorm_forward(p.x, p.gamma, p.beta, param)
    ddx, ddgamma, ddbeta = _second_given(p, given)
    results = batchnorm_double_backward(ddx, ddgamma, ddbeta, p.dout, cache)
    return dict(zip(("second dx", "second dgamma", "ddout"), results, strict=True))


def _second_given(p, given):
    return (
        None if given == "parameters" else p.ddx,
        None if given == "ddx" else p.ddgamma,
        None if given == "ddx" else p.beta,
    )


def pieces(p):
    """moments, and what follows from them, whole or as mean and var."""
    m = bn_fast.moments(p.x, weights=p.weights)
    var = m.var()
    with np.errstate(all="ignore"):
        inv_std = 1 / np.sqrt(var + p.eps)
        inv_std = np.where(var + p.eps == 0, 0, inv_std)
    s, t = bn_fast.backward_reduce(p.dout, p.x, m.mean, inv_std)
    count = p.x.size / p.x.shape[1]
    whole = bn_fast.backward_reduce(p.dout, p.x, m, inv_std)
    return {
        "mean": m.mean,
        "m2": m.m2,
        "var": var,
        "std": m.std(),
        "inv_std": inv_std,
        "out": bn_fast.normalize(p.x, m, gamma=p.gamma, beta=p.beta, eps=p.eps),
        "normalized": bn_fast.normalize(p.x, m.mean, var, p.gamma, p.beta, eps=p.eps),
        "sum_dout": s,
        "sum_dout_xmu": t,
        "applied dx": bn_fast.backward_apply(p.dout, p.x, m.mean, inv_std, p.gamma, s, t, count),
        "whole sum_dout_xmu": whole[1],
        "whole dx": bn_fast.backward_apply(p.dout, p.x, m, inv_std, p.gamma, *whole, count),
    }


# What a feature's results should be: columns of shape (M, 1), in long double.


def _without_start(x, w=None):
    """x less its first value that counts, which is exact and changes no deviation; and that."""
    x = np.asarray(x, np.longdouble)
    counted = np.isfinite(x) if w is None else np.isfinite(x) & (w > 0)
    start = x[counted][0] if counted.any() else np.longdouble(0)
    return x - start, start


def _mean(x, mean, w=None):
    """The mean, or what NumPy makes of values that are not finite."""
    if np.isfinite(mean[0]):
        return mean
    if w is not None:
        x, w = x[w > 0][:, None], w[w > 0][:, None]
    return np.average(np.asarray(x, np.longdouble), axis=0, weights=w)


def _step(dtype):
    """The smallest number of the lanes, of which a rounding may lose half."""
    return 2.0**-1074 if dtype.itemsize == 8 else 2.0**-149


def _lost_of_dx(step, a, x_hat):
    """What dx = a (dout - mean(dout) - x_hat mean(dout x_hat)) loses where dout is of the least
    numbers: half a step of either mean, which a large gamma takes into sight."""
    return step * (1 + a * (1 + oracle.largest(x_hat)) / 2)


def _beyond(name, value):
    """Whether a sum leaves float64: whatever its lanes come to then is not finite."""
    return name != "dx" and bool((np.abs(value) > np.finfo(np.float64).max).any())


def _seen_by_gate(p, got, mode, activation):
    """What forward computed, before 16 bits rounded small values to 0, which has no sign."""
    if p.x.dtype.itemsize > 2 or activation is None:
        return got["out"]
    residual = None if p.residual is None else p.residual.astype(np.float32)
    return batchnorm_forward(
        widened(p.x), p.gamma, p.beta, _settings(p, mode), activation=activation,
        negative_slope=SLOPE, residual=residual, weights=p.weights,
    )[0]  # fmt: skip


def exact_first_order(p, got, f, mode, activation):
    x, dout, gamma, beta, w = (
        p.column(name, f) for name in ("x", "dout", "gamma", "beta", "weights")
    )
    given = {"axis": 1, "eps": p.eps}
    start = 0
    if mode == "test":
        given |= {"mean": p.column("mean", f), "var": p.column("var", f)}
    else:
        x, start = _without_start(x, w)
    given["weights"] = w
    forward_pass = x_hat, mean, var = oracle.normalized(x, **given)
    z = x_hat * gamma + beta
    terms = [oracle.largest(a) for a in (gamma, beta)]
    if p.residual is not None:
        residual = np.asarray(p.column("residual", f), np.longdouble)
        z = z + residual
        terms.append(oracle.largest(residual))
    g = np.asarray(dout, np.longdouble)
    if activation:
        forward, backward = reference.ACTIVATIONS[activation]
        seen = _seen_by_gate(p, got, mode, activation)[:, f].reshape(-1, 1)
        with np.errstate(over="ignore"):  # infinity has no part of it that is finite
            z = np.where(np.isfinite(z.astype(gamma.dtype)), z, z.astype(gamma.dtype))
        z, g = forward(z, SLOPE), backward(g, seen, SLOPE)
    gradients = oracle.backward(
        g, x, gamma, **given, forward_pass=forward_pass, gated=activation is not None
    )
    # What even a mean or a slope cannot hold of the least numbers; seen where x or dout is of them.
    inv_std = 1 / np.sqrt(var + p.eps)
    r = oracle.largest(inv_std)
    lost = 2.0**-1074 * r
    step, a = _step(p.x.dtype), oracle.largest(gamma) * r
    count = len(x) if w is None else w.sum()
    largest_mean = max(oracle.largest(sums) for sums in gradients[1:3]) / count
    # A mean is as good as what is added up for it: it may be off by a rounding of a deviation,
    # which a dout that does not add up to 0 takes along (M = 3, an outlier of weight 0, near it).
    meant = np.finfo(np.float64 if p.x.dtype.itemsize == 8 else np.float32).eps
    meant *= mode == "train" and (w is not None or activation is not None)
    floors = {
        "dx": _lost_of_dx(step, a, x_hat),
        "dgamma": (
            step * len(x) * (1 + oracle.largest(x_hat))
            + lost * oracle.total(g)
            + meant * abs(np.where(np.isfinite(g), g, 0).sum())
        ),
        "dbeta": step * len(x),
    }
    loose = mode == "train" and not all(np.isfinite(a).all() for a in (x, dout, gamma, z))
    loose = loose or not np.isfinite(inv_std).all()  # every x_hat is infinite, or 0 inf = NaN
    result = {
        "out": Exact(z, max(terms), lost * oracle.largest(gamma), None if w is None else w > 0),
        "dresidual": Exact(g, 0, step),
    }
    for name, floor in floors.items():
        value, scale = getattr(gradients, name), getattr(gradients, name + "_scale")
        # What takes an infinite dgamma or constant along may be NaN, too: terms have both signs.
        beyond = _beyond(name, value) or _beyond("dgamma", gradients.dgamma)
        beyond = beyond or (name == "dx" and _beyond("constant", a * largest_mean))
        result[name] = Exact(value, scale, floor, loose=loose or beyond)
    if mode == "test":
        return result | {
            "running_mean": Exact(p.mean[f : f + 1]), "running_var": Exact(p.var[f : f + 1])
        }  # fmt: skip
    mean = _mean(p.column("x", f), mean + start, w)
    size = 1 + oracle.largest(mean) + np.sqrt(oracle.largest(var))
    return result | {
        "running_mean": Exact(MOMENTUM + (1 - MOMENTUM) * mean, size),
        "running_var": Exact(MOMENTUM + (1 - MOMENTUM) * var, 1 + 3 * oracle.largest(var)),
    }


def exact_second_order(p, got, f, mode, given):
    x, dout, gamma = (p.column(name, f) for name in ("x", "dout", "gamma"))
    missing = {"ddx": ("ddgamma", "beta"), "parameters": ("ddx",), "all": ()}[given]
    arguments = [
        np.zeros_like(p.column(name, f)) if name in missing else p.column(name, f)
        for name in ("ddx", "ddgamma", "beta")
    ]
    statistics = {}
    if mode == "test":
        statistics = {"mean": p.column("mean", f), "var": p.column("var", f)}
    else:
        x, _ = _without_start(x)
    if given == "parameters":  # gamma has no say, nor is there anything to add up for it
        gamma = np.ones_like(gamma)
    values, scales = oracle.double_backward(*arguments, dout, x, gamma, eps=p.eps, **statistics)
    values = dict(zip(("second dx", "second dgamma", "ddout"), values, strict=True))
    if given == "parameters":
        values["second dgamma"] = np.zeros(1)
    r = oracle.largest(1 / np.sqrt(p.column("x", f).astype(np.longdouble).var() + p.eps))
    sizes = [oracle.largest(a) for a in (*arguments, dout, gamma)]
    floor = _step(p.x.dtype) * len(x) * (1 + r) ** 3 * (1 + max(sizes))
    loose = not all(np.isfinite(a).all() for a in (x, dout, gamma, *arguments))
    return {
        name: Exact(value, scale, floor, loose=loose)
        for (name, value), scale in zip(values.items(), scales, strict=True)
        # Of terms that leave the range something may be left that is in it, as with M = 2.
        if not _beyond(name, scale)
    }


def exact_pieces(p, got, f):
    """Of the statistics from x; of what follows from them as they were given."""
    x, dout, gamma, beta, w = (
        p.column(name, f) for name in ("x", "dout", "gamma", "beta", "weights")
    )
    moved, start = _without_start(x, w)
    x_hat, own_mean, var = oracle.normalized(moved, eps=p.eps, weights=w)
    count = len(x) if w is None else w.sum(dtype=np.longdouble)
    mean = _mean(x, own_mean + start, w)
    used = {name: got[name][f : f + 1].astype(np.longdouble) for name in PASSED_ON}
    normalized = oracle.forward(x, gamma, beta, 1, p.eps, used["mean"], used["var"])
    d, g = np.asarray(x, np.longdouble) - used["mean"], np.asarray(dout, np.longdouble)
    r, m, a = used["inv_std"], len(x), gamma * used["inv_std"]
    parts = a * g, a * used["sum_dout"] / m, a * d * r**2 * (used["sum_dout_xmu"] / m)
    centered = moved - own_mean
    own = (*parts[:2], a * centered * r**2 * (used["whole sum_dout_xmu"] / m))
    largest, total = oracle.largest, oracle.total
    loose = not all(np.isfinite(v).all() for v in (x, dout, gamma))
    unsure = loose or not all(np.isfinite(used[name]).all() for name in PASSED_ON[3:])
    unsure = unsure or any(_beyond("constant", part) for part in (*parts[1:], *own[1:]))
    step = _step(p.x.dtype)
    t, own_t = ((g * deviations).sum(axis=0) for deviations in (d, centered))
    lost = 2.0**-1074 * largest(1 / np.sqrt(var + p.eps))
    lost_of_dx = _lost_of_dx(step, largest(a), d * r)
    terms = (
        max(largest(gamma), largest(beta)), lost * largest(gamma),
        None if w is None else w > 0, loose,
    )  # fmt: skip
    return {
        "mean": Exact(mean, largest(mean) + np.sqrt(largest(var))),
        "m2": Exact(var * count, 3 * largest(var * count)),
        "var": Exact(var, 3 * largest(var)),
        "std": Exact(np.sqrt(var), 2 * np.sqrt(largest(var))),
        "out": Exact(x_hat * gamma + beta, *terms),
        "normalized": Exact(normalized, *terms),
        "sum_dout": Exact(g.sum(axis=0), total(g), step * m, loose=loose),
        "sum_dout_xmu": Exact(t, total(g * d), step * m, loose=loose or _beyond("", t)),
        "applied dx": Exact(
            parts[0] - parts[1] - parts[2], max(map(largest, parts)), lost_of_dx,
            loose=unsure,
        ),
        "whole sum_dout_xmu": Exact(
            # The shift lies up to an eighth of a deviation off the mean (round_means).
            own_t, total(abs(g) * (abs(centered) + np.sqrt(var) / 8)), step * m + lost * total(g),
            loose=loose or _beyond("", own_t),
        ),
        "whole dx": Exact(
            own[0] - own[1] - own[2], max(map(largest, own)), lost_of_dx,
            loose=unsure,
        ),
    }  # fmt: skip


# The laws


def check_laws(call, exact, hostile, ordinary):
    """One feature is hostile: the others' bits are as if it were not, its own numbers are right,
    and all bits are the same on every number of threads and every instruction set."""
    f = hostile.feature
    with engine("base", 1):
        expected = call(ordinary)
        got = call(hostile)
    faults = []
    for name, a in got.items():
        if not _same(np.delete(a, f, _axis(a)), np.delete(expected[name], f, _axis(a))):
            n = _count(np.delete(a, f, _axis(a)), np.delete(expected[name], f, _axis(a)))
            faults.append(f"{name} of {n} other features is not what it is beside an ordinary one")
    for isa, n_threads in ENGINES:
        with engine(isa, n_threads):
            again = call(hostile)
        faults += [
            f"{name} of {_count(again[name], a)} features ({_who(again[name], a, f)})"
            f" differs on {isa} with {n_threads} threads"
            for name, a in got.items()
            if not _same(again[name], a)
        ]
    for who, feature in (("hostile", f), ("neighbor", (f + 1) % len(hostile.gamma))):
        with np.errstate(all="ignore"):
            should = exact(hostile, got, feature)
        for name, a in got.items():
            if name not in should:
                continue
            own = a[:, feature].reshape(-1, 1) if a.ndim > 1 else a[feature : feature + 1]
            fault = judge.fault(name, own, should[name], hostile.x.dtype, LIMIT)
            if fault:
                faults.append(f"{who}: {fault}")
    assert not faults, "\n".join(faults)


def _axis(a):
    return 1 if a.ndim > 1 else 0


def _same(a, b):
    return (
        a.dtype == b.dtype and a.shape == b.shape and one_nan(a).tobytes() == one_nan(b).tobytes()
    )


def _differ(a, b):
    bits = f"u{a.itemsize}"
    same = one_nan(a).view(bits) == one_nan(b).view(bits)
    return ~np.moveaxis(same, _axis(a), 0).reshape(a.shape[_axis(a)], -1).all(axis=1)


def _count(a, b):
    return int(_differ(a, b).sum())


def _who(a, b, f):
    return "the hostile one too" if _differ(a, b)[f] else "not the hostile one"


# Rows of a table: one problem and one call each, for `check_first` and `check_second`.

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
    "residual": [False, True, "opposite"],
    "weights": [None, None, None, "mask", "real", "mask each", "real each"],
    "needs": ["dx dgamma dbeta dresidual", "dx", "dgamma dbeta", "dbeta", "dx dresidual"],
    "out": ["new", "given", "in place", "over residual"],
    "beta": list(BETAS),
}
SECOND = COMMON | {
    "call": ["second train", "second test", "pieces"],
    "given": ["all", "ddx", "parameters"],
    "weights": [None, "mask", "real", "mask each", "real each"],  # of moments alone
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
    without_weights = place == "filler" and row.get("call", "pieces") != "pieces"
    return place != "residual" and not without_weights and may_be(row)


def _problems(row, more):
    names = "shape", "kind", "layout", "place", "residual", "weights", "beta", "eps"
    given = {name: row[name] for name in names if name in row}
    return make_problem(dtype=TYPES[row["dtype"]], **given | (more or {}))


def check_first(row, more=None):
    """more: further arguments of `make_problem`, which come before the row's."""
    given = {name: row[name] for name in ("mode", "activation")}
    check_laws(
        lambda p: first_order(p, needs=row["needs"], out=row["out"], **given),
        lambda p, got, f: exact_first_order(p, got, f, **given),
        *_problems(row, more),
    )


def check_second(row, more=None):
    if row["call"] == "pieces":
        check_laws(pieces, exact_pieces, *_problems(row, more))
        return
    given = {"mode": row["call"].split()[1], "given": row["given"]}
    check_laws(
        lambda p: second_order(p, **given),
        lambda p, got, f: exact_second_order(p, got, f, **given),
        *_problems(row, more),
    )
