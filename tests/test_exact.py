"""Data whose answers need no rounding, and the ends of the range: M = 0, 1, 2, eps = 0."""

import numpy as np
import pytest

from bn_fast import batchnorm_backward, batchnorm_forward
from bn_fast._core import core

from . import oracle
from .arrays import DTYPES, LAYOUTS, normal
from .judge import assert_same_bits, check, roundings

pytestmark = pytest.mark.parametrize("dtype", DTYPES)


def feature_shape(ndim, axis):
    return [-1 if d == axis else 1 for d in range(ndim)]


@pytest.mark.parametrize("layout", ["C", "Fortran", "sliced", "features last"])
@pytest.mark.parametrize("offset", [0, 7, -(2**20)])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((2, 3), 1),
        ((4, 1), 1),
        ((64, 5), 1),
        ((128, 200), 1),
        ((4096, 33), 1),
        ((33, 1024), 0),
        ((4, 6, 16), 1),
        ((4, 3, 16, 32), 1),
        ((4, 2, 8, 16, 3), -1),
    ],
    ids=str,
)
def test_answers_without_rounding(dtype, shape, axis, offset, layout):
    """x = offset +- 3 in equal parts and eps = 7: var + eps = 16, x_hat = +- 3/4, exactly."""
    n, ndim = shape[axis], len(shape)
    axis %= ndim
    rng = np.random.default_rng(0)
    m = np.prod(shape) // n
    sign = rng.permuted(np.tile([1, -1], (n, m // 2)), axis=1)
    by_feature = [n, *(shape[d] for d in range(ndim) if d != axis)]
    sign = np.moveaxis(sign.reshape(by_feature), 0, axis)
    offsets = offset + np.arange(n) % 5
    x = LAYOUTS[layout]((offsets.reshape(feature_shape(ndim, axis)) + 3 * sign).astype(dtype))
    gamma = rng.integers(-4, 5, n).astype(dtype)
    beta = rng.integers(-4, 5, n).astype(dtype)
    dout = rng.integers(-8, 9, shape)
    param = {"mode": "train", "eps": 7, "momentum": 0.5}
    param |= {"running_mean": np.full(n, 2, dtype), "running_var": np.full(n, 3, dtype)}

    out, cache = batchnorm_forward(x, gamma, beta, param, axis=axis)
    dx, dgamma, dbeta = batchnorm_backward(LAYOUTS[layout](dout.astype(dtype)), cache)

    others = tuple(d for d in range(ndim) if d != axis)
    g = gamma.reshape(feature_shape(ndim, axis))
    np.testing.assert_array_equal(
        out, g * sign * dtype(0.75) + beta.reshape(feature_shape(ndim, axis))
    )
    np.testing.assert_array_equal(dbeta, dout.sum(axis=others))
    np.testing.assert_array_equal(dgamma, (dout * sign * 0.75).sum(axis=others))
    np.testing.assert_array_equal(param["running_mean"], (offsets + 2) / 2)
    np.testing.assert_array_equal(param["running_var"], np.full(n, 6))
    mean, inv_std, *_ = cache
    np.testing.assert_array_equal(mean.ravel(), offsets)
    np.testing.assert_array_equal(inv_std.ravel(), np.full(n, 0.25))
    # M is a power of two, so that the divisions by it are exact in float64.
    slope = (sign * 0.75) * (dout * sign * 0.75).sum(axis=others, keepdims=True) / m
    expected = g / 4.0 * (dout - dout.sum(axis=others, keepdims=True) / m - slope)
    assert roundings(dx, expected) <= 2


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, 0.1, -1e6, 16777217.0, 1e-30, 3e-42, -1e30, "near max", "max"]
)
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("shape", [(3, 4), (1000, 17), (5, 3, 7, 7), (2, 3, 30, 40)], ids=str)
def test_constant_features_give_exactly_beta(dtype, shape, eps, value):
    largest = {"near max": np.finfo(dtype).max / 128, "max": np.finfo(dtype).max}
    x = np.full(shape, largest.get(value, value), dtype)
    x[:, 0] = normal(shape, dtype)[:, 0]  # a neighbor that is not
    dout = normal(shape, dtype, 1)
    gamma, beta = normal(shape[1], dtype, 2), normal(shape[1], dtype, 3)
    out, cache = batchnorm_forward(x, gamma, beta, {"mode": "train", "eps": eps})
    dx, dgamma, _ = batchnorm_backward(dout, cache)
    b = beta.reshape(feature_shape(x.ndim, 1))
    np.testing.assert_array_equal(out[:, 1:], np.broadcast_to(b, shape)[:, 1:])
    # x_hat is 0; what a sum of M terms may leave of it is no more than a rounding of each.
    assert np.abs(dgamma[1:]).max() <= np.finfo(dtype).eps * np.abs(dout).sum()
    expected = oracle.backward(dout, x, gamma, 1, eps)
    check("dx", dx[:, 1:], expected.dx[:, 1:], x)
    if eps == 0:
        np.testing.assert_array_equal(dx[:, 1:], 0)


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (1, 600), (1, 3, 1, 1)], ids=str)
def test_one_value_for_each_feature(dtype, shape, eps):
    """M = 1: out = beta, dx = 0."""
    x, dout = normal(shape, dtype), normal(shape, dtype, 1)
    gamma, beta = normal(shape[1], dtype, 2), normal(shape[1], dtype, 3)
    out, cache = batchnorm_forward(x, gamma, beta, {"mode": "train", "eps": eps})
    dx, dgamma, dbeta = batchnorm_backward(dout, cache)
    np.testing.assert_array_equal(out.ravel(), beta)
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(dgamma, 0)
    np.testing.assert_array_equal(dbeta, dout.ravel())


@pytest.mark.parametrize("shape", [(2, 1), (2, 7), (2, 600), (1, 5, 2), (1, 3, 2, 1)], ids=str)
def test_two_values_for_each_feature(dtype, shape):
    """M = 2: x_hat = +- sqrt(var/(var + eps)), and of dx only the eps in it is left.

    dx = gamma r (dout_0 - dout_1)/2 eps/(var + eps), some 1e-5 of the terms that cancel.
    """
    x, dout = normal(shape, dtype), normal(shape, dtype, 1)
    gamma, beta = normal(shape[1], dtype, 2), normal(shape[1], dtype, 3)
    out, cache = batchnorm_forward(x, gamma, beta)
    dx, dgamma, dbeta = batchnorm_backward(dout, cache)
    check("out", out, oracle.forward(x, gamma, beta), x)
    expected = oracle.backward(dout, x, gamma)
    check("dgamma", dgamma, expected.dgamma, x)
    check("dbeta", dbeta, expected.dbeta, x)
    first, second = (np.moveaxis(a, 1, 0).reshape(-1, 2).T for a in (x, dout))
    half = (np.longdouble(first[0]) - first[1]) / 2
    total = half**2 + np.longdouble(1e-5)
    expected = gamma * (np.longdouble(second[0]) - second[1]) / 2 * 1e-5 / total**1.5
    check("dx", np.moveaxis(dx, 1, 0).reshape(-1, 2)[:, 0], expected, x)


@pytest.mark.parametrize("shape", [(50, 9), (6, 4, 9)], ids=str)
def test_eps_zero(dtype, shape):
    x, dout = normal(shape, dtype), normal(shape, dtype, 1)
    gamma, beta = normal(shape[1], dtype, 2), normal(shape[1], dtype, 3)
    out, cache = batchnorm_forward(x, gamma, beta, {"mode": "train", "eps": 0})
    check("out", out, oracle.forward(x, gamma, beta, 1, 0), x)
    check("dx", batchnorm_backward(dout, cache)[0], oracle.backward(dout, x, gamma, 1, 0).dx, x)


def test_test_mode_without_variance_divides_by_zero(dtype):
    param = {"mode": "test", "eps": 0, "running_mean": np.ones(1), "running_var": np.zeros(1)}
    x = np.array([[0], [1], [2]], dtype)
    out, _ = batchnorm_forward(x, np.ones(1), np.zeros(1), param)
    np.testing.assert_array_equal(out, np.array([[-np.inf], [np.nan], [np.inf]], dtype))


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((0, 5), 1), ((0, 3, 4, 4), 1), ((4, 3, 0), 1), ((2, 0, 3), 2), ((5, 0), 0)],
    ids=str,
)
def test_empty_batch(dtype, shape, axis, mode):
    """M = 0: nothing to do, sums are 0, and the running averages stay as they were."""
    n = shape[axis]
    param = {"mode": mode, "running_mean": np.arange(n, dtype=dtype), "running_var": np.ones(n)}
    before = param.copy()
    x = np.zeros(shape, dtype)
    out, cache = batchnorm_forward(x, np.ones(n), np.zeros(n), param, axis=axis)
    dx, dgamma, dbeta = batchnorm_backward(np.zeros(shape, dtype), cache)
    assert out.shape == dx.shape == shape
    assert out.dtype == dx.dtype == dtype
    assert_same_bits([dgamma, dbeta], [np.zeros(n, dtype)] * 2)
    _, unspent = batchnorm_forward(x, out=x, axis=axis)
    assert batchnorm_backward(x, unspent, out=x)[0] is x  # nothing has been overwritten
    assert batchnorm_backward(x, unspent, out=x)[0] is x
    for name in ("running_mean", "running_var"):
        np.testing.assert_array_equal(param[name], before[name])
        assert param[name] is not before[name]
    assert len(list(cache)) == 5


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize(("shape", "axis"), [((4, 0), 1), ((0, 0), 1), ((0, 3, 2), 0)], ids=str)
def test_no_features(dtype, shape, axis, mode):
    param, none = {"mode": mode}, np.zeros(0)
    x = np.zeros(shape, dtype)
    out, cache = batchnorm_forward(x, none, none, param, axis=axis)
    dx, dgamma, dbeta = batchnorm_backward(x, cache)
    assert out.shape == dx.shape == shape
    assert dgamma.shape == dbeta.shape == param["running_mean"].shape == (0,)


def test_gamma_zero_gives_exactly_beta(dtype):
    x, beta = normal((40, 6), dtype), normal(6, dtype, 1)
    out, cache = batchnorm_forward(x, np.zeros(6), beta)
    np.testing.assert_array_equal(out, np.broadcast_to(beta, x.shape))
    dx, dgamma, _ = batchnorm_backward(x, cache)
    np.testing.assert_array_equal(dx, 0)
    assert (dgamma > 1).all()


def test_a_mean_of_few_digits_is_applied_in_the_lanes_of_its_dtype(dtype):
    """What is left of the mean beside its value in x's dtype may be next to nothing, at any scale.
    Wide lanes, which hold it, would round some elements otherwise, and cost twice the time."""
    x = normal((3136, 1000), dtype)
    ones, zeros = np.ones(1000, dtype), np.zeros(1000, dtype)
    out, stats, *_ = core.forward(x, ones, zeros, 1, None, None, None, 1)
    mean, mean_low, inv_std, _ = stats
    shift = mean.astype(dtype)
    bias = -((mean - shift) + mean_low) * inv_std
    if dtype is np.float32:
        assert (bias == 0).any()  # next to nothing where low parts are kept: 1e-33
    lanes = (x - shift) * inv_std.astype(dtype) + bias.astype(dtype)
    assert_same_bits([out], [lanes])
