"""The longdouble oracle of `bn_fast.reference`, and the size of what it adds up."""

from typing import NamedTuple

import numpy as np

from bn_fast.reference import oracle_backward, oracle_double_backward, oracle_forward


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


def normalized(x, axis=1, eps=1e-5, mean=None, var=None, weights=None):
    """x_hat, mean, var: the forward pass without gamma and beta."""
    n = np.shape(x)[axis]
    given = {"axis": axis, "eps": eps, "mean": mean, "var": var, "weights": weights}
    return oracle_forward(x, np.ones(n), np.zeros(n), **given)


def backward(
    dout, x, gamma, axis=1, eps=1e-5, mean=None, var=None, weights=None, forward_pass=None,
    gated=False,
):  # fmt: skip
    """forward_pass: what `normalized` gives for the same arguments, if it is there already.

    gated: dout has come through an activation, so that what its values have in common is not
    known, and taken off, before they are added up.
    """
    given = {"axis": axis, "eps": eps, "mean": mean, "var": var, "weights": weights}
    gradients = oracle_backward(dout, x, gamma, **given)
    others = tuple(d for d in range(np.ndim(x)) if d != axis % np.ndim(x))
    x_hat, _, var = forward_pass or normalized(x, **given)
    g = np.asarray(dout, np.longdouble)
    centered = mean is None and weights is None and g.size and not gated
    t = g - g.mean(axis=others, keepdims=True) if centered else g
    std = np.sqrt(var + np.longdouble(eps))
    inv_std = np.divide(1, std, where=std != 0, out=np.zeros_like(std))
    biggest = largest(t)
    if weights is not None:  # the sums come back to each element by its share
        w = np.broadcast_to(np.asarray(weights, np.longdouble), g.shape)
        share = (w / w.sum(axis=others, keepdims=True)).max(initial=0)
        sums = [largest(a) for a in (gradients[1], gradients[2], x_hat)]
        biggest = max(biggest, share * (sums[1] + sums[2] * sums[0]))
    dx_scale = largest(gamma * inv_std) * biggest
    scales = [largest(_finite(a).sum(axis=others)) for a in (t * x_hat, g)]
    # What the oracle itself rounds: of a constant feature with weights x_hat is not quite 0.
    low = np.finfo(np.longdouble).eps * largest(inv_std)
    scales[0] += low * scales[1] * largest(np.asarray(x, np.float64))
    return Gradients(*gradients, dx_scale, *scales)


def double_backward(ddx, ddgamma, ddbeta, dout, x, gamma, axis=1, mean=None, var=None, eps=1e-5):
    """The exact results, and the size of what each one adds up: the terms may cancel."""
    given = {"axis": axis, "mean": mean, "var": var, "eps": eps}
    results = oracle_double_backward(ddx, ddgamma, ddbeta, dout, x, gamma, **given)
    others = tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    n = x.shape[axis]
    x_hat, _, batch_var = oracle_forward(x, np.ones(n), np.zeros(n), **given)
    shape = [n if d == axis % x.ndim else 1 for d in range(x.ndim)]
    v = batch_var if var is None else np.asarray(var, np.longdouble)
    std = np.sqrt(v + np.longdouble(eps))
    r = np.divide(1, std, where=std != 0, out=np.zeros_like(std)).reshape(shape)
    gamma, ddgamma, ddbeta = (np.reshape(a, shape) for a in (gamma, ddgamma, ddbeta))
    u, g = np.asarray(ddx, np.longdouble), np.asarray(dout, np.longdouble)

    def mean_size(a):
        return _finite(a).mean(axis=others, keepdims=True)

    if mean is None:
        u = u - u.mean(axis=others, keepdims=True)
        g = g - g.mean(axis=others, keepdims=True)
    b, d, e = mean_size(u * x_hat), mean_size(g * x_hat), mean_size(u * g)
    a = np.abs(gamma) * r
    dx = np.abs(ddgamma) * r * np.abs(g)
    ddout = a * np.abs(u) + np.abs(ddgamma * x_hat) + np.abs(ddbeta)
    dgamma = r * e * (x.size // n)
    if mean is None:
        dx = dx + r * a * (b * np.abs(g) + d * np.abs(u) + np.abs(x_hat) * (e + 3 * b * d))
        ddout = ddout + a * b * np.abs(x_hat)
        dgamma = dgamma + r * b * d * (x.size // n)
    return results, [largest(size) for size in (dx, dgamma, ddout)]


def _finite(a):
    """Sizes, 0 for what is not finite: that has no say in how large the rest is."""
    return np.where(np.isfinite(a), np.abs(a), 0)


def largest(a):
    return _finite(a).max(initial=0)


def total(a):
    """The sum of the sizes."""
    return _finite(a).sum()
