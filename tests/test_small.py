"""Empty batches, no features, and one value for each feature: what every kind of call gives."""

import numpy as np
import pytest

import bn_fast
from bn_fast import batchnorm_backward, batchnorm_double_backward, batchnorm_forward, reference

from .arrays import DTYPES, HALVES, normal, problem, spread_weights
from .judge import assert_same_bits
from .problems import OPTIONS

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.usefixtures("threads_always"),
    pytest.mark.parametrize("n_threads", [1, 3]),
    pytest.mark.parametrize("dtype", [*DTYPES, *HALVES]),
]
EMPTY = [(0, 5), (0, 1), (4, 0), (1, 0), (0, 0), (3, 5, 0), (0, 3, 2, 2), (2, 0, 4, 4)]


def given(shape, dtype, options):
    x, dout, gamma, beta = problem(shape, 1, dtype)
    activation, has_residual, kind = options
    residual = normal(shape, dtype, 7) if has_residual else None
    weights = spread_weights(shape, 1, kind)
    return x, dout, gamma, beta, {
        "activation": activation, "residual": residual, "weights": weights,
    }  # fmt: skip


@pytest.mark.parametrize("options", [(None, False, None), *OPTIONS.values()], ids=str)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("mode", ["train", "test"])
def test_nothing_to_do(shape, options, mode, dtype, n_threads):
    bn_fast.set_num_threads(n_threads)
    x, dout, gamma, beta, options = given(shape, dtype, options)
    averages = {"running_mean": gamma.astype(float), "running_var": np.abs(beta.astype(float))}
    param = {"mode": mode, **averages}
    out, cache = batchnorm_forward(x, gamma, beta, param, **options)
    gradients = batchnorm_backward(dout, cache)
    parameters = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
    zeros = np.zeros(shape[1], parameters)
    sized = np.zeros(shape, dtype)
    extra = [sized] if options["residual"] is not None else []
    assert_same_bits([out, *gradients], [sized, sized, zeros, zeros, *extra])
    for key, value in averages.items():
        np.testing.assert_array_equal(param[key], value)
    over = x.copy()
    assert batchnorm_forward(over, gamma, beta, param, **options, out=over)[0] is over
    assert batchnorm_backward(dout, cache, needs=["dgamma"])[::2] == (None, None) + (None,) * (
        len(gradients) - 4
    )
    if options["activation"] is None and options["residual"] is None and options["weights"] is None:
        second = batchnorm_double_backward(dout, zeros, zeros, dout, cache)
        assert_same_bits(second, [sized, zeros, sized])


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_pieces_of_nothing(shape, dtype, n_threads):
    bn_fast.set_num_threads(n_threads)
    x, dout, gamma, beta = problem(shape, 1, dtype)
    n = shape[1]
    m = bn_fast.moments(x)
    assert m.count == (x.size // n if n else m.count)
    np.testing.assert_array_equal(m.m2, np.zeros(n))
    zeros, ones = np.zeros(n), np.ones(n)
    sums = bn_fast.backward_reduce(dout, x, zeros, ones)
    assert_same_bits(sums, [zeros, zeros])
    sized = np.zeros(shape, dtype)
    assert_same_bits([bn_fast.normalize(x, zeros, ones, gamma, beta)], [sized])
    for count in (0, 7):  # of the others
        dx = bn_fast.backward_apply(dout, x, zeros, ones, gamma, zeros, zeros, count)
        assert_same_bits([dx], [sized])


@pytest.mark.parametrize("options", [(None, False, None), *OPTIONS.values()], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (1, 3, 1, 1), (1, 600)], ids=str)
def test_one_value(shape, options, dtype, n_threads):
    """out is that of beta, dx and dgamma are 0; and running_var takes the variance, 0."""
    bn_fast.set_num_threads(n_threads)
    x, dout, gamma, beta, options = given(shape, dtype, options)
    param = {"mode": "train", "running_var": np.ones(shape[1])}
    out, cache = batchnorm_forward(x, gamma, beta, param, **options)
    dx, dgamma, dbeta, *dresidual = batchnorm_backward(dout, cache)
    single = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
    z = np.broadcast_to(beta.astype(single).reshape(-1, *[1] * (len(shape) - 2)), shape)
    if options["residual"] is not None:
        z = z + options["residual"].astype(single)
    g = dout.astype(single)
    if options["activation"]:
        act, through = reference.ACTIVATIONS[options["activation"]]
        z, g = act(z, 0.01).astype(single), through(g, z, 0.01).astype(single)
    np.testing.assert_allclose(out.astype(float), z.astype(dtype).astype(float), 1e-6)
    np.testing.assert_array_equal(dx.astype(single), np.zeros(shape))
    np.testing.assert_array_equal(dgamma, np.zeros(shape[1]))
    np.testing.assert_allclose(dbeta, g.ravel(), 1e-6)
    np.testing.assert_array_equal(param["running_var"], np.full(shape[1], 0.9))
    for a in dresidual:
        np.testing.assert_allclose(a.astype(float), g.astype(dtype).astype(float), 1e-6)
