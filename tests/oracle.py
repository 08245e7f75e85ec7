"""The longdouble oracle of `bn_fast.reference`, and what it adds up; other norms from it."""

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
    scales = [largest(_finite(a).sum(axis=others)) for a in (t * x_hat, g)]
    biggest = largest(t)
    if mean is None and not centered:  # sums of terms that may all be alike, times x_hat's largest
        w = np.ones(1) if weights is None else weights
        w = np.broadcast_to(np.asarray(w, np.longdouble), g.shape)
        share = (w / w.sum(axis=others, keepdims=True)).max(initial=0)
        biggest = max(biggest, share * (scales[1] + largest(x_hat) * scales[0]))
    dx_scale = largest(gamma * inv_std) * biggest
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


class Rows(NamedTuple):
    """x of a norm as rows, one for each statistic, and the way back. For other arrays likewise."""

    cut: object  # an array like x -> long double, shape (n_statistics, M)
    join: object  # the way back
    spread: object  # a parameter -> as rows
    gather: object  # what rows have for a parameter -> its sums over all that share it


def _rows(norm, shape, axis, num_groups):
    """Written for its own sake, by moving axes to where a textbook has them."""
    if norm in ("layernorm", "rmsnorm"):
        axes = axis if isinstance(axis, tuple) else (axis,)
        axes = sorted(a % len(shape) for a in axes)
        last = range(-len(axes), 0)
        others = [n for d, n in enumerate(shape) if d not in axes]
        lengths = [shape[d] for d in axes]
        m = int(np.prod(lengths))
        n = int(np.prod(others))
        return Rows(
            lambda a: np.moveaxis(a, axes, last).astype(np.longdouble).reshape(n, m),
            lambda rows: np.moveaxis(rows.reshape(*others, *lengths), last, axes),
            lambda p: np.broadcast_to(np.asarray(p, np.longdouble).reshape(m), (n, m)),
            lambda rows: rows.sum(axis=0).reshape(lengths),
        )
    moved = np.moveaxis(np.empty(shape), axis, 1).shape
    n, c, places = moved[0], moved[1], int(np.prod(moved[2:]))
    g = c if norm == "instancenorm" else num_groups
    cut = (n * g, c // g * places)
    return Rows(
        lambda a: np.moveaxis(a, axis, 1).astype(np.longdouble).reshape(cut),
        lambda rows: np.moveaxis(rows.reshape(moved), 1, axis),
        lambda p: np.tile(np.repeat(np.asarray(p, np.longdouble), places), n).reshape(cut),
        lambda rows: rows.reshape(n, c, places).sum(axis=(0, 2)),
    )


def norm(norm, x, gamma, beta, dout, axis, eps=1e-5, num_groups=None):
    """out, mean and 1/sqrt(var + eps) of each statistic, and the gradients, in long double.

    Each row is taken around its first value, which is exact: what differs in it is its own size.
    So is gamma*dout, where a constant makes no difference to dx.
    """
    to = _rows(norm, np.shape(x), axis, num_groups)
    rows, g = to.cut(np.asarray(x)), to.cut(np.asarray(dout))
    gamma, beta = to.spread(gamma), to.spread(beta)
    t = g * gamma
    ones, m = np.ones(len(rows)), rows.shape[1]
    if norm == "rmsnorm":
        mean = np.zeros(len(rows), np.longdouble)
        std = np.sqrt((rows * rows).sum(axis=1) / m + eps)
        inv_std = np.divide(1, std, where=std != 0, out=np.zeros_like(std))
        x_hat = rows * inv_std[:, None]
        dx = inv_std[:, None] * (t - x_hat * (t * x_hat).sum(axis=1, keepdims=True) / m)
        size = np.abs(t)
    else:
        shifted = rows - rows[:, :1]
        x_hat, mean, var = oracle_forward(shifted, ones, 0 * ones, axis=0, eps=eps)
        mean += rows[:, 0]
        std = np.sqrt(var + eps)
        inv_std = np.divide(1, std, where=std != 0, out=np.zeros_like(std))
        first, gamma_first = g[:, :1], gamma[:, :1]
        with np.errstate(invalid="ignore"):
            t = (g - first) * gamma + first * (gamma - gamma_first)
        dx = oracle_backward(t, shifted, ones, axis=0, eps=eps)[0]
        size = np.abs(t - t.mean(axis=1, keepdims=True))
    scales = (size * inv_std[:, None]).max(), *(to.gather(abs(a)).max() for a in (g * x_hat, g))
    gradients = to.join(dx), to.gather(g * x_hat), to.gather(g)
    out = to.join(x_hat * gamma + beta)
    return out, mean, inv_std, Gradients(*gradients, *map(float, scales))
