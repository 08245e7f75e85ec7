"""Any shape, axis, strides, dtype and parameters, against the oracle; and finite differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bn_fast import batchnorm_backward, batchnorm_forward

from . import oracle
from .arrays import DTYPES, normal, strided, unaligned
from .judge import assert_same_bits, check, check_gradients

# No database: the package under test may be installed where nothing can be written.
few = settings(max_examples=250, deadline=None, database=None, derandomize=True)


@st.composite
def arrays(draw, shape):
    """An array of this shape in any order and direction, with gaps, repeats and odd addresses."""
    ndim = len(shape)
    seed = draw(st.integers(0, 2**16))
    values = normal(shape, draw(st.sampled_from(DTYPES)), seed) + draw(st.sampled_from([0, 100]))
    repeated = tuple(slice(0, 1) if draw(st.integers(0, 9)) == 0 else slice(None) for _ in shape)
    values = values[repeated]
    steps = draw(st.tuples(*[st.sampled_from([1, 1, 1, -1, 2, -3])] * ndim))
    array = strided(values, draw(st.permutations(range(ndim))), steps)
    form = draw(st.sampled_from(["", "", "", "byte-swapped", "unaligned", "integers"]))
    if form == "byte-swapped":
        array = array.astype(array.dtype.newbyteorder())
    elif form == "unaligned":
        array = unaligned(array)
    elif form == "integers":
        array = (4 * array).astype(np.int16)
    array = np.broadcast_to(array, shape)
    return array


@st.composite
def problems(draw):
    shape = draw(st.lists(st.integers(1, 12), min_size=2, max_size=5))
    if draw(st.booleans()):
        long = draw(st.integers(0, len(shape) - 1))
        shape = [min(n, 4) for n in shape]
        shape[long] = draw(st.integers(1, 600))
    shape = tuple(shape)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    x, dout = draw(arrays(shape)), draw(arrays(shape))
    parameters = st.lists(
        st.floats(-4, 4, width=16).filter(lambda v: v == 0 or abs(v) > 0.1),
        min_size=shape[axis],
        max_size=shape[axis],
    )
    return x, dout, draw(parameters), draw(parameters), axis


@few
@given(problems(), st.sampled_from(["train", "test"]), st.sampled_from([1e-5, 1e-3, 0.5]))
def test_any_problem(problem, mode, eps):
    x, dout, gamma, beta, axis = problem
    before = x.tobytes(), dout.tobytes()
    param = {"mode": mode, "eps": eps}
    mean = var = None
    if mode == "test":
        mean = param["running_mean"] = normal(x.shape[axis], np.float32)
        var = param["running_var"] = 1 + normal(x.shape[axis], np.float64) ** 2
    out, cache = batchnorm_forward(x, gamma, beta, param, axis=axis)
    gradients = batchnorm_backward(dout, cache)

    dtype = np.float64 if x.dtype.kind == "i" else x.dtype.newbyteorder("=")
    like = np.broadcast_to(np.zeros((), dtype), x.shape)
    converted = dout.astype(dtype)
    terms = np.abs(gamma).max() + np.abs(beta).max()
    check("out", out, oracle.forward(x, gamma, beta, axis, eps, mean, var), like, 6, terms)
    expected = oracle.backward(converted, x, gamma, axis, eps, mean, var)
    check_gradients(gradients, expected, like, 6, cancels=True)
    assert before == (x.tobytes(), dout.tobytes())

    view = x.astype(dtype)
    batchnorm_forward(view, gamma, beta, {**param}, axis=axis, out=view)
    check("in place", view, oracle.forward(x, gamma, beta, axis, eps, mean, var), like, 6, terms)


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((3, 2, 4), 1), ((2, 3, 2, 2), -1)])
def test_finite_differences(shape, axis, mode):
    """Central differences of sum(out * dout) with h = 1e-5: truncation and rounding near 1e-9."""
    n, h = shape[axis], 1e-5
    x, dout = 1 + normal(shape, np.float64), normal(shape, np.float64, 1)
    gamma, beta = normal(n, np.float64, 2), normal(n, np.float64, 3)

    def forward():
        param = {"mode": mode, "running_var": np.full(n, 0.5)}
        return batchnorm_forward(x, gamma, beta, param, axis=axis)

    gradients = batchnorm_backward(dout, forward()[1])
    for values, gradient in zip((x, gamma, beta), gradients, strict=True):
        for index in np.ndindex(values.shape):
            value = values[index]
            values[index] = value + h
            high = (forward()[0] * dout).sum()
            values[index] = value - h
            low = (forward()[0] * dout).sum()
            values[index] = value
            assert gradient[index] == pytest.approx((high - low) / (2 * h), rel=1e-7, abs=1e-8)


def test_layouts_of_the_same_values_agree():
    """To within roundings, and exactly where the memory order is the same."""
    x, gamma, beta = normal((30, 8), np.float32), np.ones(8), np.zeros(8)
    out = batchnorm_forward(x, gamma, beta)[0]
    gap = strided(x, (0, 1), (1, 1))
    assert_same_bits([batchnorm_forward(gap, gamma, beta)[0]], [out])
    check("transposed", batchnorm_forward(x.T.copy(), gamma, beta, axis=0)[0].T, out, x)
