"""PyTorch in float64 as an oracle that shares nothing with this package."""

import numpy as np
import pytest

from bn_fast import batchnorm_backward, batchnorm_forward

from .arrays import normal

torch = pytest.importorskip("torch")


def torch_results(x, dout, gamma, beta, mean, var, training, eps, momentum):
    x, gamma, beta = (torch.tensor(a, requires_grad=True) for a in (x, gamma, beta))
    mean, var = torch.tensor(mean), torch.tensor(var)
    y = torch.nn.functional.batch_norm(x, mean, var, gamma, beta, training, 1 - momentum, eps)
    y.backward(torch.tensor(dout))
    arrays = (y.detach(), x.grad, gamma.grad, beta.grad, mean, var)
    return [a.numpy() for a in arrays]


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize("shape", [(40, 7), (4000, 3), (5, 6, 9), (4, 3, 14, 14), (2, 3, 4, 5, 6)])
def test_agrees_with_torch(shape, mode):
    x, dout = 2 + 3 * normal(shape, np.float64), normal(shape, np.float64, 1)
    n = shape[1]
    gamma, beta, mean, var = (normal(n, np.float64, seed) for seed in range(2, 6))
    var = var**2
    eps, momentum = 1e-3, 0.7
    expected = torch_results(x, dout, gamma, beta, mean, var, mode == "train", eps, momentum)
    if mode == "train":  # torch's running variance is divided by M - 1
        m = x.size // n
        unbiased = expected[-1]
        expected[-1] = momentum * var + (unbiased - momentum * var) * (m - 1) / m
    param = {"mode": mode, "eps": eps, "momentum": momentum}
    param |= {"running_mean": mean, "running_var": var}
    out, cache = batchnorm_forward(x, gamma, beta, param)
    got = [out, *batchnorm_backward(dout, cache), param["running_mean"], param["running_var"]]
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()))


def test_tensors_are_accepted():
    x = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    out, cache = batchnorm_forward(x, torch.ones(2), torch.zeros(2))
    np.testing.assert_array_equal(out, batchnorm_forward(x.numpy(), np.ones(2), np.zeros(2))[0])
    assert np.shares_memory(cache.x, x.numpy())
