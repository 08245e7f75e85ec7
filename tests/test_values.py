"""Forward and backward against the oracle, over dtype, layout and shape."""

import numpy as np
import pytest

from bn_fast import batchnorm_backward, batchnorm_forward

from . import oracle
from .arrays import DTYPES, LAYOUTS, SHAPES, TALL, normal, problem
from .judge import assert_same_bits, check, check_gradients

CASES = [(*case, layout) for case in SHAPES for layout in LAYOUTS] + [
    (*case, layout) for case in TALL for layout in ("C", "sliced backwards", "features last")
]


@pytest.fixture(params=CASES, ids=str, scope="module")
def case(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: dtype.__name__, scope="module")
def dtype(request):
    return request.param


def frozen_settings(n_features, dtype):
    mean = 2.9 + normal(n_features, dtype, 5) / 8
    var = 4 + normal(n_features, dtype, 6) ** 2
    return {"mode": "test", "running_mean": mean, "running_var": var}


def follows_memory_order(result, x):
    """Whether result, which is dense, has its axes in the same order in memory as x."""
    return result.strides == np.empty_like(x, dtype=result.dtype).strides


def test_train_mode(case, dtype):
    shape, axis, layout = case
    x, dout, gamma, beta = problem(shape, axis, dtype, layout)
    before = x.tobytes(), dout.tobytes(), gamma.tobytes(), beta.tobytes()
    out, cache = batchnorm_forward(x, gamma, beta, axis=axis)
    gradients = batchnorm_backward(dout, cache)
    check("out", out, oracle.forward(x, gamma, beta, axis), x, scale=abs(beta).max())
    repeats = layout.startswith("broadcast")  # and a value's roundings with it
    check_gradients(gradients, oracle.backward(dout, x, gamma, axis), x, cancels=repeats)
    assert follows_memory_order(out, x)
    assert follows_memory_order(gradients[0], x)
    assert before == (x.tobytes(), dout.tobytes(), gamma.tobytes(), beta.tobytes())


def test_test_mode(case, dtype):
    shape, axis, layout = case
    x, dout, gamma, beta = problem(shape, axis, dtype, layout)
    param = frozen_settings(shape[axis], dtype)
    mean, var = param["running_mean"], param["running_var"]
    out, cache = batchnorm_forward(x, gamma, beta, param, axis=axis)
    expected = oracle.forward(x, gamma, beta, axis, 1e-5, mean, var)
    check("out", out, expected, x, scale=abs(beta).max())
    gradients = batchnorm_backward(dout, cache)
    check_gradients(gradients, oracle.backward(dout, x, gamma, axis, 1e-5, mean, var), x)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_where_the_result_is_written_changes_no_bit(case, dtype, mode):
    """New, into an array of another order, over x, over dout: the same bits."""
    shape, axis, layout = case
    x, dout, gamma, beta = problem(shape, axis, dtype, layout)
    param = frozen_settings(shape[axis], dtype) | {"mode": mode}

    def forward(x, out=None):
        return batchnorm_forward(x, gamma, beta, dict(param), axis=axis, out=out)

    expected, cache = forward(x)
    gradients = batchnorm_backward(dout, cache)
    apart = np.full(shape[::-1], np.nan, dtype).T
    assert forward(x, apart)[0] is apart
    assert_same_bits([apart], [expected])
    apart[...] = np.nan
    again = batchnorm_backward(dout, cache, out=apart)
    assert again[0] is apart
    assert_same_bits(again, gradients)

    if not (x.flags.writeable and x.flags.aligned and x.dtype.isnative):
        return

    def clone(a):  # with its strides, on which the order of summation depends
        return LAYOUTS[layout](np.array(a, order="C"))

    over_dout = clone(dout)
    assert_same_bits(batchnorm_backward(over_dout, cache, out=over_dout), gradients)
    over_x = clone(x)
    _, cache = forward(over_x)
    assert_same_bits(batchnorm_backward(dout, cache, out=over_x), gradients)
    over_x = clone(x)
    assert forward(over_x, over_x)[0] is over_x
    assert_same_bits([over_x], [expected])


@pytest.mark.parametrize("shape", [(40, 5), (3, 40, 7), (2, 3, 8, 16), (9, 3, 300)], ids=str)
@pytest.mark.parametrize("dout_layout", ["C", "Fortran", "reversed", "features last"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("broadcast")])
@pytest.mark.parametrize("mode", ["train", "test"])
def test_x_and_dout_of_different_layouts(shape, layout, dout_layout, mode):
    x, dout, gamma, beta = problem(shape, 1, np.float32)
    x, dout = LAYOUTS[layout](x), LAYOUTS[dout_layout](dout)
    param = frozen_settings(shape[1], np.float32) | {"mode": mode}
    mean, var = (param["running_mean"], param["running_var"]) if mode == "test" else (None, None)
    _, cache = batchnorm_forward(x, gamma, beta, param)
    expected = oracle.backward(dout, x, gamma, 1, 1e-5, mean, var)
    check_gradients(batchnorm_backward(dout, cache), expected, x)
