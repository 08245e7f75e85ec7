"""Offsets beyond 4 GiB, and arrays of more than 2^31 elements (`large`: pytest -m large)."""

import mmap
import sys

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from bn_fast import batchnorm_backward, batchnorm_forward

from . import oracle
from .arrays import DTYPES, normal
from .judge import assert_same_bits, check, check_gradients

pytestmark = pytest.mark.skipif(sys.maxsize < 2**32, reason="addresses of 32 bits")


def sparse(n_bytes):
    """Zeros that take memory only where they are written to."""
    try:
        return np.frombuffer(mmap.mmap(-1, n_bytes), np.uint8)
    except OSError as error:
        pytest.skip(f"no address space for {n_bytes} bytes: {error}")


def far_apart(shape, strides, dtype):
    """An array with strides of many MiB; negative ones start at the far end."""
    reach = sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True))
    assert reach > 2**32
    start = sum(-(n - 1) * s for n, s in zip(shape, strides, strict=True) if s < 0)
    return np.ndarray(shape, dtype, sparse(reach + 8), start, strides)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((600, 8), (2**23, 8)),  # rows
        ((600, 8), (-(2**23), 8)),
        ((40, 50), (8, 2**27)),  # features
        ((40, 50), (8, -(2**27))),
        ((3, 5, 70), (2**32, -(2**29), 8)),  # runs
        ((4, 6, 5, 20), (2**28, 8, -(2**30), 512)),
        ((300, 2, 9), (2**12, 2**32 + 2**12, 64)),
        ((9, 3, 5), (2**20, 2**25, 2**31)),  # elements
    ],
)
def test_offsets(shape, strides, dtype):
    """Of x, dout and the output alike; the values as those of an array that is close by."""
    x, dout, out = (far_apart(shape, strides, dtype) for _ in range(3))
    x[...], dout[...] = 3 + 2 * normal(shape, dtype, 1), normal(shape, dtype, 2)
    n = shape[1]
    gamma, beta = 1 + normal(n, dtype, 3) / 4, normal(n, dtype, 4)
    assert batchnorm_forward(x, gamma, beta, out=out)[0] is out
    check("out", np.ascontiguousarray(out), oracle.forward(x, gamma, beta), x)
    near, cache = batchnorm_forward(x, gamma, beta)
    assert_same_bits([near], [out])
    dx, dgamma, dbeta = batchnorm_backward(dout, cache, out=out)
    assert dx is out
    expected = oracle.backward(dout, x, gamma)
    check_gradients((np.ascontiguousarray(dx), dgamma, dbeta), expected, x)
    assert_same_bits(batchnorm_backward(dout, cache), (dx, dgamma, dbeta))
    param = {"mode": "test", "running_mean": gamma, "running_var": gamma**2}
    batchnorm_forward(x, gamma, beta, param, out=out)
    expected = oracle.forward(x, gamma, beta, 1, 1e-5, gamma, gamma**2)
    check("out", np.ascontiguousarray(out), expected, x)
    _, cache = batchnorm_forward(x, gamma, beta)
    dx = batchnorm_backward(dout, cache)[0]
    assert_same_bits([batchnorm_backward(dout, cache, out=dout)[0]], [dx])


# More than 2^31 elements.  x and dout are one block over and over, and take no memory; the output
# takes 8 GiB.  M and what is summed grow with the repeats, all else is that of the block.
SHAPES = [
    ((2**15 + 1, 2**10, 64), 2),  # rows of features
    ((2**11 + 1, 2**10, 3, 350), 2),  # runs
    ((2**14 + 1, 3, 44000), 1),  # runs that are cut
    ((2**12 + 1, 2**19 + 5, 1), 2),  # one feature
]


@pytest.fixture(scope="module")
def memory():
    return sparse(9 * 2**30).view(np.float32)


def assert_repeats(a):
    """Every block is the first, bit for bit."""
    step = max(1, 2**24 // a[0].size)
    for k in range(0, len(a), step):
        assert (a[k : k + step] == a[0]).all(), f"block {k} or one of the next {step}"


@pytest.mark.large
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_elements(memory, shape, axis):
    size, n, repeats = int(np.prod(shape)), shape[axis], shape[0]
    assert size > 2**31
    out = memory[:size].reshape(shape)
    block, block_dout = (normal((1, *shape[1:]), np.float32, seed) for seed in (1, 2))
    x, dout = (np.broadcast_to(a, shape) for a in (block, block_dout))
    gamma, beta = 1 + normal(n, np.float32, 3) / 4, normal(n, np.float32, 4)

    _, cache = batchnorm_forward(x, gamma, beta, axis=axis, out=out)
    assert_repeats(out)
    check("out", out[:1], oracle.forward(block, gamma, beta, axis), x)

    dx, dgamma, dbeta = batchnorm_backward(dout, cache, out=out)
    assert_repeats(dx)
    expected = oracle.backward(block_dout, block, gamma, axis)
    check("dx", dx[:1], expected.dx, x)
    check("dgamma", dgamma, expected.dgamma * repeats, x, scale=expected.dgamma_scale)
    check("dbeta", dbeta, expected.dbeta * repeats, x, scale=expected.dbeta_scale)

    param = {"mode": "test", "running_mean": gamma, "running_var": gamma**2}
    batchnorm_forward(x, gamma, beta, param, axis=axis, out=out)
    assert_repeats(out)
    expected = oracle.forward(block, gamma, beta, axis, 1e-5, gamma, gamma**2)
    check("out", out[:1], expected, x)
    batchnorm_forward(out, gamma, beta, axis=axis, out=out)  # over itself
    assert_repeats(out)


@pytest.mark.large
def test_features(memory):
    """More features than rows, of which each is the one before it, shifted; five are judged."""
    n_rows, n = shape = 2**11 + 1, 2**20 + 5
    out = memory[: n_rows * n].reshape(shape)
    x, dout = (
        as_strided(normal(n + step * n_rows, np.float32, step), shape, (4 * step, 4))
        for step in (17, 19)
    )
    gamma, beta = 1 + normal(n, np.float32, 3) / 4, normal(n, np.float32, 4)
    some = [0, 1, n // 2, n - 2, n - 1]
    near, near_dout = x[:, some], dout[:, some]
    _, cache = batchnorm_forward(x, gamma, beta, out=out)
    check("out", out[:, some], oracle.forward(near, gamma[some], beta[some]), x)
    dx, dgamma, dbeta = batchnorm_backward(dout, cache, out=out)
    expected = oracle.backward(near_dout, near, gamma[some])
    check_gradients((dx[:, some], dgamma[some], dbeta[some]), expected, x)
