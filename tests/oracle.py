"""The longdouble oracle of `bn_fast.reference`, and the size of what it adds up."""

from typing import NamedTuple

import numpy as np

from bn_fast.reference import oracle_backward, oracle_forward


class Gradients(NamedTuple):
    """The gradients, and the size of what was added up for each.

    dx_scale is the largest term of dx, the other two are the sums of the terms' magnitudes: sums
    may cancel, and each term has been rounded before it is added.
    """

    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    dx_scale: float
    dgamma_scale: float
    dbeta_scale: float


def forward(x, gamma, beta, axis=1, eps=1e-5, mean=None, var=None):
    return oracle_forward(x, gamma, beta, axis=axis, eps=eps, mean=mean, var=var)[0]


def backward(dout, x, gamma, axis=1, eps=1e-5, mean=None, var=None):
    given = {"axis": axis, "eps": eps, "mean": mean, "var": var}
    n = np.shape(x)[axis]
    gradients = oracle_backward(dout, x, gamma, **given)
    others = tuple(d for d in range(np.ndim(x)) if d != axis % np.ndim(x))
    x_hat, _, var = oracle_forward(x, np.ones(n), np.zeros(n), **given)
    g = np.asarray(dout, np.longdouble)
    t = g - g.mean(axis=others, keepdims=True) if mean is None and g.size else g
    std = np.sqrt(var + np.longdouble(eps))
    inv_std = np.divide(1, std, where=std != 0, out=np.zeros_like(std))
    dx_scale = float(np.abs(gamma * inv_std).max(initial=0) * np.abs(t).max(initial=0))
    scales = (float(np.abs(a).sum(axis=others).max(initial=0)) for a in (t * x_hat, g))
    return Gradients(*gradients, dx_scale, *scales)
