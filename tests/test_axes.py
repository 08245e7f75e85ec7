"""Several feature axes: batch norm of every activation, and of whatever places the axes name."""

import numpy as np
import pytest

import bn_fast
from bn_fast import (
    batchnorm_backward,
    batchnorm_double_backward,
    batchnorm_forward,
    moments,
    normalize,
    reference,
)

from . import oracle
from .arrays import DTYPES, HALVES, LAYOUTS, normal
from .judge import assert_same_bits, check, check_gradients, one_nan
from .problems import ENGINES, engine

# Of each way of the engine some: features side by side, joined rows, short and long runs; axes that
# merge to one, and others that are walked around it.
CASES = [
    ((6, 5, 4, 3), (1, 2, 3)),
    ((40, 5, 4, 3), (1, 2)),
    ((6, 5, 4, 3), (0, 1)),
    ((5, 4, 6, 3), (0, 2, 3)),
    ((3, 40, 3, 70), (0, 2)),
    ((130, 3, 5, 7), (1, 3)),
    ((5, 30, 6, 40), (1, 2)),
    ((5, 30, 6, 40), (0, 3)),
    ((4, 3, 20, 300), (0, 2)),
    ((4, 3, 20, 300), (0, 1)),
    ((3, 2, 4, 5, 6), (0, 2, 4)),
    ((4, 1, 7, 3), (1, 2)),
    ((3, 5, 1), (0, 1, 2)),
    ((3, 600, 2, 90), (0, 1)),
]


def flat(a, axes):
    """The array with the features along one axis, the first."""
    moved = np.moveaxis(a, axes, range(len(axes)))
    return moved.reshape(np.prod(moved.shape[: len(axes)]), -1)


def problem(shape, axes, dtype, layout="C"):
    own = tuple(shape[d] for d in axes)
    x, dout = (
        LAYOUTS[layout](3 + 2 * normal(shape, dtype, 1)),
        LAYOUTS[layout](normal(shape, dtype, 2)),
    )
    return x, dout, 1 + normal(own, dtype, 3) / 4, normal(own, dtype, 4)


def settings(shape, axes, mode):
    own = tuple(shape[d] for d in axes)
    mean, var = normal(own, np.float64, 5), 1 + normal(own, np.float64, 6) ** 2
    return {"mode": mode, "running_mean": mean, "running_var": var}


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize(
    "layout", ["C", "Fortran", "permuted", "sliced backwards", "features last"]
)
@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES])
@pytest.mark.parametrize(("shape", "axes"), CASES, ids=str)
def test_values(shape, axes, dtype, layout, mode):
    x, dout, gamma, beta = problem(shape, axes, dtype, layout)
    gamma, beta = (
        a.astype(np.float64 if dtype is np.float64 else np.float32) for a in (gamma, beta)
    )
    param = settings(shape, axes, mode)
    given = {"axis": 0}
    if mode == "test":
        given |= {"mean": param["running_mean"].ravel(), "var": param["running_var"].ravel()}
    y, cache = batchnorm_forward(x, gamma, beta, param, axis=axes)
    gradients = batchnorm_backward(dout, cache)
    assert [a.shape for a in gradients] == [shape, gamma.shape, gamma.shape]
    assert y.strides == np.empty_like(x).strides
    flat_x, flat_dout = (flat(a, axes) for a in (x, dout))
    flat_gamma, flat_beta = gamma.ravel(), beta.ravel()
    expected = oracle.forward(flat_x, flat_gamma, flat_beta, **given)
    check("y", flat(y, axes), expected, flat_x, scale=abs(beta).max())
    expected = oracle.backward(flat_dout, flat_x, flat_gamma, **given)
    found = [flat(gradients[0], axes), *(a.ravel() for a in gradients[1:])]
    check_gradients(found, expected, flat_x)
    if mode == "train":
        for name, value in (
            ("running_mean", flat_x.mean(1, float)),
            ("running_var", flat_x.var(1, float)),
        ):
            old = settings(shape, axes, mode)[name]
            assert param[name].shape == gamma.shape
            np.testing.assert_allclose(
                param[name], 0.9 * old + 0.1 * value.reshape(gamma.shape), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("shape", "axes"), CASES, ids=str)
def test_bits_do_not_depend_on_threads_and_instruction_sets(shape, axes, dtype):
    x, dout, gamma, beta = problem(shape, axes, dtype, "permuted")
    x = x.copy()
    first = tuple(0 if d in axes else slice(None) for d in range(len(shape)))
    x[first] = 6e4 if dtype is np.float16 else 1e38  # for which the lanes are not wide enough
    weights = np.arange(np.prod([n for d, n in enumerate(shape) if d not in axes])) % 3 + 1
    weights = weights.reshape([1 if d in axes else n for d, n in enumerate(shape)])

    def results():
        options = {"activation": "relu", "residual": dout, "weights": weights}
        y, cache = batchnorm_forward(x, gamma, beta, axis=axes)
        with np.errstate(all="ignore"):
            z, gated = batchnorm_forward(x, gamma, beta, axis=axes, **options)
            second = batchnorm_double_backward(x, gamma, beta, dout, cache)
        m = moments(x, axis=axes)
        found = [y, z, *batchnorm_backward(dout, cache), *batchnorm_backward(dout, gated)]
        return [one_nan(a) for a in (*found, *second, m.mean, m.m2)]

    with engine("base", 1):
        expected = results()
    for isa, n_threads in ENGINES:
        with engine(isa, n_threads):
            assert_same_bits(results(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 4, 5, 6), (40, 3, 2), (6, 200, 30)], ids=str)
def test_axes_that_merge_are_one(shape, dtype):
    """Features side by side are as those of (N, C): the same bits."""
    axes = tuple(range(1, len(shape)))
    x, dout, gamma, beta = problem(shape, axes, dtype)
    rows = [a.reshape(len(x), -1) for a in (x, dout)]
    _, plain = batchnorm_forward(rows[0], gamma.ravel(), beta.ravel())
    for order in (axes, axes[::-1], tuple(d - len(shape) for d in axes)):
        y, cache = batchnorm_forward(x, gamma, beta, axis=order)
        got = [y, *batchnorm_backward(dout, cache), cache.stats]
        should = [*batchnorm_forward(rows[0], gamma.ravel(), beta.ravel())[:1]]
        should += [*batchnorm_backward(rows[1], plain), plain.stats]
        assert_same_bits([a.reshape(b.shape) for a, b in zip(got, should, strict=True)], should)


def test_one_axis_in_a_tuple():
    x, gamma = normal((6, 4, 3), np.float32), normal(4, np.float32, 1)
    results = [batchnorm_forward(x, gamma, axis=axis) for axis in (1, (1,), (-2,))]
    assert [cache.axis for _, cache in results] == [1, 1, 1]
    for y, _ in results[1:]:
        assert_same_bits([y], [results[0][0]])


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.parametrize(("shape", "axes"), CASES, ids=str)
def test_twins(shape, axes, options, mode):
    """Both modules on both caches; and what the caches say."""
    x, dout, gamma, beta = problem(shape, axes, np.float64)
    given = {"axis": axes}
    if options == "all":
        weights = np.arange(shape[-1]) % 2 + 1.0 if len(shape) - 1 not in axes else 2.0
        given |= {"activation": "leaky_relu", "residual": dout[::-1], "weights": weights}
    results, caches = [], []
    for module in (bn_fast, reference):
        param = settings(shape, axes, mode)
        y, cache = module.batchnorm_forward(x, gamma, beta, param, **given)
        results.append([y, param["running_mean"], param["running_var"]])
        caches.append(cache)
    for cache in caches:
        for module in (bn_fast, reference):
            results.append(module.batchnorm_backward(dout, cache))
            if options == "none":
                results[-1] += module.batchnorm_double_backward(x, gamma, None, dout, cache)
    for found, expected in [(results[0], results[1]), *((r, results[2]) for r in results[3:])]:
        assert [a.shape for a in found] == [a.shape for a in expected]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    lengths = tuple(shape[d] if d in axes else 1 for d in range(axes[0], len(shape)))
    for cache in caches:
        mean, inv_var, _, _, five_gamma = cache
        assert mean.shape == inv_var.shape == five_gamma.shape == lengths
    assert caches[0].var.shape == lengths


@pytest.mark.parametrize("module", [bn_fast, reference])
def test_a_plain_tuple_of_every_activation(module):
    """As NumPy code makes it from x.mean(axis=0)."""
    x, dout, gamma, beta = problem((9, 3, 4, 5), (1, 2, 3), np.float64)
    mean, var = x.mean(axis=0), x.var(axis=0)
    r = 1 / np.sqrt(var + 1e-5)
    _, cache = batchnorm_forward(x, gamma, beta, axis=(1, 2, 3))
    expected = batchnorm_backward(dout, cache)
    for lead in ((), (1,)):
        five = [a.reshape(*lead, *a.shape) for a in (mean, r, gamma)]
        found = module.batchnorm_backward(dout, (five[0], five[1], x, (x - mean) * r, five[2]))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("module", [bn_fast, reference])
@pytest.mark.parametrize(("shape", "axes"), CASES, ids=str)
def test_pieces(shape, axes, module):
    x, dout, gamma, beta = problem(shape, axes, np.float64)
    out, cache = batchnorm_forward(x, gamma, beta, axis=axes)
    dx, dgamma, dbeta = batchnorm_backward(dout, cache)
    others = [d for d in range(len(shape)) if d not in axes]
    cuts = [slice(None)] * len(shape)
    parts = []
    for rows in (slice(0, 2), slice(2, 2), slice(2, None)) if others else (slice(None),):
        if others:
            cuts[others[0]] = rows
        parts.append(tuple(cuts))
    whole = module.moments(x[parts[0]], axis=axes)
    for part in parts[1:]:
        whole = whole.merge(module.moments(x[part], axis=axes))
    assert whole.mean.shape == whole.m2.shape == whole.var().shape == gamma.shape
    inv_std = 1 / np.sqrt(whole.var() + 1e-5)
    pairs = [module.backward_reduce(dout[p], x[p], whole.mean, inv_std, axis=axes) for p in parts]
    s, t = (sum(column) for column in zip(*pairs, strict=True))
    near = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(s, dbeta, **near)
    np.testing.assert_allclose(t * inv_std, dgamma, **near)
    for p in parts:
        y = module.normalize(x[p], whole, gamma=gamma, beta=beta, axis=axes)
        np.testing.assert_allclose(y, out[p], **near)
        y = module.normalize(x[p], whole.mean, whole.var(), gamma, beta, axis=axes)
        np.testing.assert_allclose(y, out[p], **near)
        given = whole.mean, inv_std, gamma, s, t, whole.count
        np.testing.assert_allclose(
            module.backward_apply(dout[p], x[p], *given, axis=axes), dx[p], **near
        )


def test_moments_of_tiny_deviations():
    """Whose inverse leaves float64's range: they are looked at again, feature by feature."""
    x = normal((30, 3, 4), np.float64)
    x[:, 1, 2] *= 2.0**-1030
    x[:, 2, 0] *= 2.0**-1040
    m = moments(x, axis=(1, 2))
    flat_m = moments(x.reshape(30, 12))
    assert_same_bits([m.mean.ravel(), m.std().ravel()], [flat_m.mean, flat_m.std()])
    again = normalize(x, m, eps=0, axis=(1, 2))
    assert_same_bits([again.reshape(30, 12)], [normalize(x.reshape(30, 12), flat_m, eps=0)])


@pytest.mark.parametrize("where", ["x", "dout"])
@pytest.mark.parametrize(("shape", "axes"), CASES, ids=str)
def test_in_place(shape, axes, where):
    x, dout, gamma, beta = problem(shape, axes, np.float32, "permuted")
    y, cache = batchnorm_forward(x, gamma, beta, axis=axes)
    expected = batchnorm_backward(dout, cache)
    over = LAYOUTS["permuted"]((x if where == "x" else dout).copy())
    if where == "x":
        assert_same_bits([batchnorm_forward(over, gamma, beta, axis=axes, out=over)[0]], [y])
    else:
        assert_same_bits(batchnorm_backward(over, cache, out=over), expected)


def test_nan_stays_in_its_feature():
    x, dout, gamma, beta = problem((5, 4, 3, 6), (1, 3), np.float32)
    expected, cache = batchnorm_forward(x, gamma, beta, axis=(1, 3))
    gradients = batchnorm_backward(dout, cache)
    x = x.copy()
    x[2, 1, 0, 4] = np.nan
    y, cache = batchnorm_forward(x, gamma, beta, axis=(1, 3))
    spoilt = np.zeros((1, 4, 1, 6), bool)
    spoilt[0, 1, 0, 4] = True
    assert (np.isnan(y) == spoilt).all()
    results = zip((y, *batchnorm_backward(dout, cache)), (expected, *gradients), strict=True)
    for a, b in results:
        own = np.broadcast_to(spoilt if a.ndim == 4 else spoilt[0, :, 0], a.shape)
        assert_same_bits([a[~own]], [b[~own]])


@pytest.mark.parametrize("module", [bn_fast, reference])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axis": ()}, ValueError, "axis must name one or more axes"),
        ({"axis": (1, 1)}, ValueError, "axis|repeated"),
        ({"axis": (1, -2)}, ValueError, "axis|repeated"),
        ({"axis": (1, 3)}, ValueError, "axis"),
        ({"axis": (1, 1.0)}, TypeError, "integer"),
        ({"axis": (1, 2), "gamma": np.ones(4)}, ValueError, r"gamma must have shape \(4, 3\)"),
        ({"axis": (1, 2), "gamma": np.ones((3, 4))}, ValueError, r"gamma must .*got \(3, 4\)"),
        ({"axis": (1, 2), "beta": np.ones(12)}, ValueError, r"beta must have shape \(4, 3\)"),
        ({"axis": (0, 2), "beta": np.ones((6, 3))}, None, ""),
        ({"axis": (0, 2), "beta": np.ones((6, 1, 3))}, None, ""),
    ],
)
def test_errors(options, error, message, module):
    x = normal((6, 4, 3), np.float64)
    if error is None:
        module.batchnorm_forward(x, **options)
    else:
        with pytest.raises(error, match=message):
            module.batchnorm_forward(x, **options)
