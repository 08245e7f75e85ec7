"""The cache: what it keeps, what it unpacks to, and NumPy code on either side of it."""

import gc
import pickle
import sys
import tracemalloc
import weakref

import numpy as np
import pytest

from bn_fast import (
    batchnorm_backward,
    batchnorm_double_backward,
    batchnorm_forward,
    moments,
)
from bn_fast._cache import Cache

from . import oracle
from .arrays import DTYPES, normal
from .judge import assert_same_bits, check, check_gradients


def seed_backward(dout, cache):
    """The first seed's NumPy code."""
    (mean, inv_var, x, x_hat, gamma) = cache
    N, _ = x_hat.shape
    dgamma = np.sum(dout * x_hat, axis=0)
    dbeta = np.sum(dout, axis=0)
    term1 = dout * gamma * inv_var
    term2 = -gamma * (1.0 / N) * inv_var * np.sum(dout, axis=0)
    term3 = -gamma * (1.0 / N) * (x - mean) * inv_var**3 * np.sum(dout * (x - mean), axis=0)
    dx = term1 + term2 + term3
    return dx, dgamma, dbeta


def numpy_cache(x, gamma, axis, shape, eps=1e-5):
    """The tuple that NumPy code would make, its parameters of the given shape."""
    others = tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    mean = x.mean(axis=others, keepdims=True)
    inv_var = 1 / np.sqrt(x.var(axis=others, keepdims=True) + eps)
    x_hat = (x - mean) * inv_var
    return mean.reshape(shape), inv_var.reshape(shape), x, x_hat, gamma.reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_seeds_backward_takes_our_cache(dtype):
    x, dout = 2 + 3 * normal((50, 7), dtype), normal((50, 7), dtype, 1)
    gamma, beta = normal(7, dtype, 2), normal(7, dtype, 3)
    _, cache = batchnorm_forward(x, gamma, beta)
    got = seed_backward(dout, cache)
    # NumPy's own sums, in the dtype, are a little worse than ours.
    check_gradients(got, oracle.backward(dout, x, gamma), x, 40)
    assert len(cache) == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis", "parameter"),
    [
        ((50, 7), 1, (7,)),
        ((50, 7), 0, (50, 1)),
        ((5, 3, 4, 4), 1, (3, 1, 1)),
        ((5, 4, 4, 3), -1, (3,)),
        ((5, 4, 3), 0, (5, 1, 1)),
    ],
)
def test_unpacks_to_the_seeds_five(dtype, shape, axis, parameter):
    x = 2 + 3 * normal(shape, dtype)
    n = shape[axis]
    gamma = np.arange(n)
    _, cache = batchnorm_forward(x, gamma, np.zeros(n), axis=axis)
    mean, inv_var, same_x, x_hat, same_gamma = cache
    assert same_x is x
    for a in (mean, inv_var, same_gamma):
        assert a.shape == parameter
        assert a.dtype == dtype
    np.testing.assert_array_equal(same_gamma.ravel(), gamma)
    expected = numpy_cache(x.astype(np.longdouble), gamma, axis, parameter)
    check("mean", mean, expected[0], x)
    check("inv_var", inv_var, expected[1], x)
    check("x_hat", x_hat, expected[3], x)
    assert_same_bits([cache[0], cache[3], cache[-1]], [mean, x_hat, same_gamma])
    with pytest.raises(IndexError):
        cache[5]
    assert cache.var.shape == parameter
    assert cache.var.dtype == np.float64
    others = tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    check("var", cache.var.ravel().astype(dtype), x.astype(np.longdouble).var(axis=others), x)
    assert cache.count == x.size // n
    cache.var[...] = -1  # a copy: the statistics stay
    assert (cache.var > 0).all()


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize(
    ("weights", "count"),
    [(None, 6), ([[1]] * 6, 6), (0.5, 3), ([[True]] * 2 + [[False]] * 4, 2), (0, 0)],
    ids=str,
)
def test_count_and_var(weights, count, mode):
    x = normal((6, 3), np.float64)
    param = {"mode": mode, "running_var": np.arange(3)}
    _, cache = batchnorm_forward(x, np.ones(3), np.zeros(3), param, weights=weights)
    cache = pickle.loads(pickle.dumps(cache))
    assert cache.count == count
    expected = moments(x, weights=weights).var() if mode == "train" else np.arange(3)
    np.testing.assert_allclose(cache.var, expected, rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [tuple, list])
@pytest.mark.parametrize(
    ("shape", "axis", "parameter"),
    [
        ((50, 7), 1, (7,)),
        ((50, 7), 1, (1, 7)),
        ((7, 50), 0, (7, 1)),
        ((50, 1), 1, (1,)),
        ((50, 1), 1, (1, 1)),
        ((6, 3, 4, 4), 1, (1, 3, 1, 1)),
        ((6, 3, 4, 4), 1, (3, 1, 1)),
        ((6, 1, 4, 4), 1, (1, 1, 1, 1)),
        ((6, 4, 4, 3), 3, (3,)),
        ((6, 4, 4, 3), 3, (1, 1, 1, 3)),
        ((400, 300), 1, (300,)),
    ],
)
def test_our_backward_takes_the_tuple_of_numpy_code(dtype, shape, axis, parameter, form):
    x, dout = 2 + 3 * normal(shape, dtype), normal(shape, dtype, 1)
    gamma = normal(shape[axis], dtype, 2)
    cache = form(numpy_cache(x, gamma, axis, parameter))
    cache[3][...] = np.nan  # x_hat, which we do not read
    check_gradients(batchnorm_backward(dout, cache), oracle.backward(dout, x, gamma, axis), x, 40)


def test_the_gradient_is_that_of_the_tuples_own_numbers():
    """Also where its mean is not that of x: three terms, each from what the tuple holds."""
    x, dout = normal((50, 3), np.float64), normal((50, 3), np.float64, 1)
    cache = np.array([0.5, 0, -1]), np.array([2.0, 1, 0.5]), x, None, np.array([1, 2, 3])
    got = batchnorm_backward(dout, cache)
    expected = seed_backward(dout, (*cache[:3], (x - cache[0]) * cache[1], cache[4]))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["forward", "backward"])
def test_overwritten_x_is_never_used(how):
    x, dout = normal((20, 4), np.float64), normal((20, 4), np.float64, 1)
    if how == "forward":
        _, cache = batchnorm_forward(x, np.ones(4), np.zeros(4), out=x)
    else:
        _, cache = batchnorm_forward(x, np.ones(4), np.zeros(4))
        batchnorm_backward(dout, cache, out=x)
    kept, out = x.copy(), np.full_like(x, 7)
    with pytest.raises(ValueError, match=f"cache .*batchnorm_{how} wrote"):
        batchnorm_backward(dout, cache, out=out)
    with pytest.raises(ValueError, match=f"batchnorm_{how} wrote"):
        tuple(cache)
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_array_equal(out, 7)


def test_output_beside_x_spends_nothing():
    """Neither an output of its own, nor one over dout, nor one over an x that was converted, nor
    an empty one."""
    x, dout = normal((20, 4), np.float64), normal((20, 4), np.float64, 1)
    _, cache = batchnorm_forward(x, np.ones(4), np.zeros(4), out=np.empty_like(x))
    expected = batchnorm_backward(dout, cache)
    assert_same_bits(batchnorm_backward(dout, cache, out=np.empty_like(x)), expected)
    over = dout.copy()
    assert_same_bits(batchnorm_backward(over, cache, out=over), expected)
    assert_same_bits(batchnorm_backward(dout, cache), expected)

    integers = np.arange(80).reshape(20, 4) ** 2
    _, cache = batchnorm_forward(integers.copy(), np.ones(4), np.zeros(4))
    expected = batchnorm_backward(dout, cache)
    _, cache = batchnorm_forward(integers, np.ones(4), np.zeros(4), out=integers.view(np.float64))
    assert_same_bits(batchnorm_backward(dout, cache), expected)

    empty = np.zeros((0, 4))
    _, cache = batchnorm_forward(empty, np.ones(4), np.zeros(4), out=empty)
    for _ in range(2):
        dx, dgamma, _ = batchnorm_backward(np.zeros((0, 4)), cache, out=empty)
        assert dx is empty
        assert not dgamma.any()


def test_test_mode_cache():
    x, dout = normal((20, 3, 5), np.float64), normal((20, 3, 5), np.float64, 1)
    gamma, mean, var = np.array([1.0, -2, 3]), np.array([0.5, 0, 1]), np.array([1.0, 4, 9])
    param = {"mode": "test", "eps": 0, "running_mean": mean, "running_var": var}
    _, cache = batchnorm_forward(x, gamma, np.zeros(3), param)
    dx, dgamma, dbeta = batchnorm_backward(dout, cache)
    r = np.array([1, 1 / 2, 1 / 3]).reshape(3, 1)
    np.testing.assert_allclose(dx, gamma.reshape(3, 1) * r * dout, rtol=1e-14)
    x_hat = (x - mean.reshape(3, 1)) * r
    np.testing.assert_allclose(dgamma, (dout * x_hat).sum((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(dbeta, dout.sum((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(cache[3], x_hat, rtol=1e-14)


def test_one_cache_serves_many_times_and_belongs_to_its_call():
    x = normal((20, 4), np.float64)
    dout = normal((20, 4), np.float64, 1)
    param = {"mode": "test", "running_mean": np.zeros(4), "running_var": np.ones(4)}
    _, cache = batchnorm_forward(x, np.ones(4), np.zeros(4), param)
    first = batchnorm_backward(dout, cache)
    param["running_var"] *= 4
    batchnorm_forward(x, np.full(4, 3.0), np.zeros(4), param)
    assert_same_bits(batchnorm_backward(dout, cache), first)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_nothing_of_the_size_of_x_is_kept(mode):
    x = normal((2000, 50), np.float64)
    gamma, beta = np.ones(50), np.zeros(50)
    references = sys.getrefcount(x)
    tracemalloc.start()
    try:
        out, cache = batchnorm_forward(x, gamma, beta, {"mode": mode})
        kept = tracemalloc.get_traced_memory()[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert out.nbytes <= kept < 1.05 * out.nbytes
    assert peak < 1.1 * out.nbytes
    assert sys.getrefcount(x) == references + 1
    assert cache.x is x
    alive = weakref.ref(x)
    del x, cache
    gc.collect()
    assert alive() is None


def test_backward_allocates_dx_alone():
    x = normal((2000, 50), np.float64)[:, ::-1]
    _, cache = batchnorm_forward(x, np.ones(50), np.zeros(50))
    tracemalloc.start()
    try:
        batchnorm_backward(x, cache)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.1 * x.nbytes


def _beside(array):
    return np.ones(array.shape[0] + 1)


# What a cache may be after somebody has changed it; the engine would read, or write, beside it.
CHANGED = {
    "stats of float32": ("stats", lambda c: c.stats.astype(np.float32)),
    "stats of one feature": ("stats", lambda c: c.stats[:, :1].copy()),
    "stats in Fortran's order": ("stats", lambda c: np.asfortranarray(c.stats)),
    "stats that step": ("stats", lambda c: np.repeat(c.stats, 2, axis=1)[:, ::2]),
    "no stats": ("stats", lambda c: None),
    "axis from the end": ("axis", lambda c: -1),
    "axis beyond": ("axis", lambda c: 7),
    "axis of a float": ("axis", lambda c: 1.0),
    "gamma too short": ("gamma", lambda c: c.gamma[:-1]),
    "gamma too long": ("gamma", lambda c: _beside(c.gamma)),
    "gamma of float16": ("gamma", lambda c: c.gamma.astype(np.float16)),
    "gamma of two dimensions": ("gamma", lambda c: c.gamma[None]),
    "gamma that steps": ("gamma", lambda c: np.repeat(c.gamma[:, None], 2, axis=1)[:, :1]),
    "byte-swapped gamma": ("gamma", lambda c: c.gamma.astype(">f8")),
    "x of integers": ("x", lambda c: c.x.astype(int)),
    "x of one dimension": ("x", lambda c: c.x[0, 0]),
    "x as a list": ("x", lambda c: c.x.tolist()),
    "x with more features": ("x", lambda c: np.ones((9, 5, 7))),
    "eps of text": ("eps", lambda c: "small"),
    "eps that is NaN": ("eps", lambda c: np.nan),
    "beta too short": ("beta", lambda c: c.beta[1:]),
    "beta as a number": ("beta", lambda c: 1.0),
    "residual too small": ("options.residual", lambda c: c.residual[1:]),
    "residual of another dtype": ("options.residual", lambda c: c.residual.astype(np.float32)),
    "weights too small": ("options.weights", lambda c: c.weights[1:]),
    "weights of bool": ("options.weights", lambda c: c.weights > 0),
    "an activation of its own": ("options.activation", lambda c: "swish"),
    "a slope of text": ("options.negative_slope", lambda c: "steep"),
    "options of its own": ("options", lambda c: (1, 2)),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", CHANGED)
def test_a_cache_that_does_not_fit_itself_is_refused(kind, large):
    shape = (800, 4, 70) if large else (9, 4, 7)  # with threads, and on the straight road
    x, n = normal(shape, np.float64), 4
    name, change = CHANGED[kind]
    for given in ({}, {"activation": "relu", "residual": x}, {"weights": np.arange(shape[2])}):
        if name.startswith("options.") and given == {}:
            continue
        _, cache = batchnorm_forward(x, np.ones(n), np.zeros(n), **given)
        field = name.removeprefix("options.")
        if name.startswith("options."):
            if getattr(cache, field) is None:
                continue
            cache.options = cache.options._replace(**{field: change(cache)})
        else:
            setattr(cache, name, change(cache))
        with pytest.raises(ValueError, match=r"cache cannot be used: its|dout must"):
            batchnorm_backward(x, cache)
        with pytest.raises(ValueError, match=r"cache cannot be used: its|dout must"):
            batchnorm_double_backward(x, None, None, x, cache)


def test_a_pickle_of_another_version_is_refused():
    _, cache = batchnorm_forward(np.ones((3, 2)), np.ones(2), np.zeros(2))
    state = cache.__getstate__()
    for slots in ({**state[1], "layout": 1}, {"x": cache.x}):
        with pytest.raises(ValueError, match="another version"):
            Cache.__new__(Cache).__setstate__((None, slots))
    again = pickle.loads(pickle.dumps(cache))
    assert_same_bits(batchnorm_backward(cache.x, again), batchnorm_backward(cache.x, cache))
