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
    largest = np.abs(t).max(initial=0)
    if weights is not None:  # the sums come back to each element by its share
        w = np.broadcast_to(np.asarray(weights, np.longdouble), g.shape)
        share = (w / w.sum(axis=others, keepdims=True)).max(initial=0)
        sums = [np.abs(a).max(initial=0) for a in (gradients[1], gradients[2], x_hat)]
        largest = max(largest, share * (sums[1] + sums[2] * sums[0]))
    dx_scale = float(np.abs(gamma * inv_std).max(initial=0) * largest)
    scales = [float(np.abs(a).sum(axis=others).max(initial=0)) for a in (t * x_hat, g)]
    # What the oracle itself rounds: of a constant feature with weights x_hat is not quite 0.
    low = float(np.finfo(np.longdouble).eps * np.abs(inv_std).max(initial=0))
    scales[0] += low * scales[1] * float(np.abs(np.asarray(x, np.float64)).max(initial=0))
    return Gradients(*gradients, dx_scale, *scales)
