r"""Layer, RMS, group and instance normalization in plain NumPy.

Twins of the functions of the same names, written as one writes them in NumPy: arithmetic in the
dtype of x (float32 for half types), sums in float64. They say what is computed, and serve where
nothing can be compiled.

All four are one computation. M is the number of values of a statistic (a row; of a sample, a group
of channels or one), [ ] the mean over them, r = 1/sqrt(var + eps), and dout, dgamma, dbeta, dx are
the gradients of the loss with respect to out, gamma, beta and x::

    mean = [x]    var = [(x - mean)**2]    x_hat = (x - mean)*r    out = gamma*x_hat + beta

Within a statistic x_hat depends on x as in batch normalization (`batch` derives it)::

    d x_hat_k / d x_i = r * (delta_ik - 1/M - x_hat_k*x_hat_i/M)

and the loss depends on x_hat by t = gamma*dout, so that dx_i = sum_k t_k * (d x_hat_k / d x_i)::

    dx = r * (t - [t] - x_hat*[t*x_hat])

gamma varies within the statistic, hence stands inside the means: batch norm's formula, with gamma
in front, is another. RMS norm has mean = 0; without (x - mean) the term 1/M, and [t], drop out::

    dx = r * (t - x_hat*[t*x_hat])

All samples, and all places of an image, share gamma and beta. Over these are the sums ::

    dbeta = sum dout      dgamma = sum dout*x_hat

Only in what a statistic is over, and what gamma runs along, do the norms differ. Of (N, C, H, W)::

                                     a statistic is over      gamma runs along
    layer, RMS norm, axis=-1         W                        W
    layer, RMS norm, axis=(1, 2, 3)  C, H, W                  C, H, W
    group norm                       C/G neighbours, H, W     C
    instance norm                    H, W                     C

References
----------
.. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016,
   https://arxiv.org/abs/1607.06450.
.. [2] B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019,
   https://arxiv.org/abs/1910.07467.
.. [3] Wu and He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494.
.. [4] D. Ulyanov, A. Vedaldi and V. Lempitsky, "Instance Normalization: The Missing Ingredient for
   Fast Stylization", 2016, https://arxiv.org/abs/1607.08022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks, _norm_checks
from .._cache import Axes, NormCache
from .._norm_checks import GRADIENTS, RMS_GRADIENTS, NormCall, refusing
from .._types import Array, parameter_dtype


def _sum(a: Array, over: tuple[int, ...]) -> Array:
    total: Array = a.sum(axis=over, dtype=np.float64, keepdims=True)
    return total


def _mean(a: Array, axes: Axes) -> Array:
    """For each statistic, in the dtype of a; 0 of no values."""
    return (_sum(a, axes.over) / max(axes.n_values, 1)).astype(a.dtype)


def _centered(a: Array, axes: Axes) -> tuple[Array, Array, Array]:
    """a - mean, and the mean in two parts: its first sum, and the mean of what that has left.

    At an offset the first difference is exact, and what is rounded after it is small. Of a constant
    it leaves 0: what the rounding of the first mean leaves has few bits, and its sum is exact.
    """
    near = _mean(a, axes)
    rest = _mean(a - near, axes)
    return (a - near) - rest, near, rest


def _normalized(values: Array, axes: Axes, eps: float, has_mean: bool) -> tuple[Array, Array]:
    """x_hat, and the statistics as `NormCache` keeps them."""
    stats = np.zeros((4, math.prod(axes.stats_shape)))
    if values.size == 0:
        return values, stats
    mean, mean_low, inv_std, var = (row.reshape(axes.stats_shape) for row in stats)
    centered = values
    if has_mean:
        centered, near, rest = _centered(values, axes)
        np.add(near, rest, out=mean, dtype=np.float64)
        mean_low[...] = (near - mean) + rest
    # Squares of 1e25 leave float32's range. A power of two takes them there and back.
    largest = np.abs(centered).max(axis=axes.over, keepdims=True)
    exponent = np.frexp(np.maximum(largest, math.sqrt(eps)))[1]
    scaled = np.ldexp(centered, -exponent)
    scaled_var = _mean(scaled * scaled, axes)
    std = np.sqrt(scaled_var + np.ldexp(eps, -2 * exponent)).astype(values.dtype)
    # 0 for a constant without eps: x - mean is 0 there, and so is its gradient.
    scale = np.divide(1, std, out=np.zeros_like(std), where=std != 0)
    inv_std[...] = np.ldexp(scale.astype(np.float64), -exponent)
    with np.errstate(over="ignore"):
        var[...] = np.ldexp(scaled_var.astype(np.float64), 2 * exponent)
    return scaled * scale, stats


def _against(parameter: Array, axes: Axes, dtype: np.dtype[Any]) -> Array:
    return parameter.astype(dtype).reshape(axes.parameter_shape)


def _deliver(result: Array, x: Array, out: Array | None) -> Array:
    """In the shape, dtype and memory order of x."""
    if out is None:
        out = np.empty_like(x)
    out[...] = result.reshape(x.shape)
    return out


def _forward(norm: str, call: NormCall) -> tuple[Array, NormCache]:
    x, gamma, beta, axes, eps, out = call
    dtype = parameter_dtype(x.dtype)
    values = x.reshape(axes.shape).astype(dtype, copy=False)
    y, stats = _normalized(values, axes, eps, norm != "rmsnorm")
    if gamma is not None:
        y = y * _against(gamma, axes, dtype)
    if beta is not None:
        y = y + _against(beta, axes, dtype)
    overwritten = f"{norm}_forward" if call.overwrites_x else ""
    beta_shape = None if beta is None else beta.shape
    cache = NormCache(norm, x, gamma, beta_shape, axes, stats, eps, True, overwritten)
    return _deliver(y, x, out), cache


def _backward(
    norm: str,
    dout: ArrayLike,
    cache: NormCache | Sequence[Any],
    out: Array | None,
    needs: Sequence[str],
) -> dict[str, Array | None]:
    """The gradients that are wanted, by their names; None for the others."""
    g, kept, out, wanted = _norm_checks.backward(norm, dout, cache, out, needs)
    x, axes = kept.x, kept.axes
    dtype = parameter_dtype(x.dtype)
    g = g.reshape(axes.shape).astype(dtype, copy=False)
    mean, mean_low, r, _ = (row.reshape(axes.stats_shape) for row in kept.stats)
    centered = (x.reshape(axes.shape).astype(np.float64) - mean) - mean_low
    if not kept.exact_mean and norm != "rmsnorm":  # its rounding is still to be taken off
        centered, _, _ = _centered(centered, axes)
    x_hat = (centered * r).astype(dtype)

    gradients: dict[str, Array | None] = dict.fromkeys(GRADIENTS)
    others = tuple(d for d in range(g.ndim) if d not in axes.along)
    if "dgamma" in wanted and kept.gamma is not None:
        gradients["dgamma"] = _sum(g * x_hat, others).astype(dtype).reshape(kept.gamma.shape)
    if "dbeta" in wanted and kept.beta_shape is not None:
        gradients["dbeta"] = _sum(g, others).astype(dtype).reshape(kept.beta_shape)
    if "dx" in wanted:
        t = g if kept.gamma is None else g * _against(kept.gamma, axes, dtype)
        if norm != "rmsnorm" and t.size:
            # Before the product: [x_hat] = 0, so it is the same, and no digits go to a common part.
            t, _, _ = _centered(t, axes)
        dx = r.astype(dtype) * (t - x_hat * _mean(t * x_hat, axes))
        spent = out is not None and np.shares_memory(out, x)
        gradients["dx"] = _deliver(dx, x, out)
        if spent:
            kept.overwritten = f"{norm}_backward"
    return gradients


@refusing
def layernorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    ln_param: Mapping[str, Any] | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    eps: float | None = None,
    out: Array | None = None,
) -> tuple[Array, NormCache]:
    """Twin of `bn_fast.layernorm_forward`: every row to mean 0 and variance 1.

    For each row of M values, which is what x has along the normalized axes::

        mean = sum x / M        var = sum (x - mean)**2 / M
        x_hat = (x - mean) / sqrt(var + eps)        out = gamma*x_hat + beta

    Examples
    --------
    >>> from bn_fast import reference
    >>> out, cache = reference.layernorm_forward([[1.0, 3.0], [10.0, 30.0]], [1, 2], [0, 5], eps=0)
    >>> out
    array([[-1.,  7.],
           [-1.,  7.]])
    """
    number = _norm_checks.epsilon(ln_param, "ln_param", eps)
    return _forward("layernorm", _norm_checks.rows(x, gamma, beta, axis, number, out))


def layernorm_backward(
    dout: ArrayLike,
    cache: NormCache | Sequence[Any],
    *,
    out: Array | None = None,
    needs: Sequence[str] = GRADIENTS,
) -> tuple[Any, ...]:
    """Twin of `bn_fast.layernorm_backward`.

    Within a row, with r = 1/sqrt(var + eps), the chain rule through x_hat, mean and var gives
    d x_hat_k / d x_i = r*(delta_ik - 1/M - x_hat_k*x_hat_i/M). The gradient with respect to x_hat
    is t = gamma*dout, hence, with [ ] for the mean over the row::

        dx = r * (t - [t] - x_hat*[t*x_hat])

    gamma and beta are those of all rows, over which their gradients are sums::

        dgamma = sum dout*x_hat        dbeta = sum dout
    """
    return tuple(_backward("layernorm", dout, cache, out, needs).values())


@refusing
def rmsnorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    rms_param: Mapping[str, Any] | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    eps: float | None = None,
    out: Array | None = None,
) -> tuple[Array, NormCache]:
    """Twin of `bn_fast.rmsnorm_forward`: every row to a mean square of 1.

    For each row of M values::

        x_hat = x / sqrt(sum x**2 / M + eps)        out = gamma*x_hat

    Examples
    --------
    >>> from bn_fast import reference
    >>> out, cache = reference.rmsnorm_forward([[1.0, 7.0], [3.0, -3.0]], [5, 1], eps=0)
    >>> out
    array([[ 1. ,  1.4],
           [ 5. , -1. ]])
    """
    number = _norm_checks.epsilon(rms_param, "rms_param", eps)
    return _forward("rmsnorm", _norm_checks.rows(x, gamma, None, axis, number, out))


def rmsnorm_backward(
    dout: ArrayLike,
    cache: NormCache | Sequence[Any],
    *,
    out: Array | None = None,
    needs: Sequence[str] = RMS_GRADIENTS,
) -> tuple[Any, ...]:
    """Twin of `bn_fast.rmsnorm_backward`.

    With r = (sum x**2 / M + eps)**(-1/2) and x_hat = r*x, d r / d x_i = -r**3 * x_i / M, so that
    d x_hat_k / d x_i = r*(delta_ik - x_hat_k*x_hat_i/M). With t = gamma*dout, and [ ] for the mean
    over a row::

        dx = r * (t - x_hat*[t*x_hat])        dgamma = sum dout*x_hat, over all rows

    It is layer norm's gradient without the term of the mean.
    """
    gradients = _backward("rmsnorm", dout, cache, out, needs)
    return gradients["dx"], gradients["dgamma"]


@refusing
def groupnorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    num_groups: int,
    gn_param: Mapping[str, Any] | None = None,
    *,
    axis: int = 1,
    eps: float | None = None,
    out: Array | None = None,
) -> tuple[Array, NormCache]:
    """Twin of `bn_fast.groupnorm_forward`: each group of a sample to mean 0 and variance 1.

    For each sample and group, over the M values of its C/G channels and all places::

        mean = sum x / M        var = sum (x - mean)**2 / M
        x_hat = (x - mean) / sqrt(var + eps)        out = gamma*x_hat + beta

    with the channel's own gamma and beta.

    Examples
    --------
    >>> from bn_fast import reference
    >>> out, cache = reference.groupnorm_forward([[1.0, 3.0, 10.0, 30.0]], None, None, 2, eps=0)
    >>> out
    array([[-1.,  1., -1.,  1.]])
    """
    number = _norm_checks.epsilon(gn_param, "gn_param", eps)
    call = _norm_checks.groups(x, gamma, beta, num_groups, axis, number, out)
    return _forward("groupnorm", call)


def groupnorm_backward(
    dout: ArrayLike,
    cache: NormCache,
    *,
    out: Array | None = None,
    needs: Sequence[str] = GRADIENTS,
) -> tuple[Any, ...]:
    """Twin of `bn_fast.groupnorm_backward`.

    As in a row of layer norm (see `layernorm_backward`), gamma differs among the M values of a
    statistic, and t = gamma*dout stands inside the means::

        dx = r * (t - [t] - x_hat*[t*x_hat])

    A channel's gamma is that of all samples and places, over which are the sums::

        dgamma = sum dout*x_hat        dbeta = sum dout
    """
    return tuple(_backward("groupnorm", dout, cache, out, needs).values())


@refusing
def instancenorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    in_param: Mapping[str, Any] | None = None,
    *,
    axis: int = 1,
    eps: float | None = None,
    out: Array | None = None,
) -> tuple[Array, NormCache]:
    """Twin of `bn_fast.instancenorm_forward`: each channel of a sample to mean 0 and variance 1.

    For each sample and channel, over the M values of all places::

        mean = sum x / M        var = sum (x - mean)**2 / M
        x_hat = (x - mean) / sqrt(var + eps)        out = gamma*x_hat + beta

    Examples
    --------
    >>> from bn_fast import reference
    >>> out, cache = reference.instancenorm_forward([[[1.0, 3.0], [10.0, 30.0]]], eps=0)
    >>> out
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    number = _norm_checks.epsilon(in_param, "in_param", eps)
    return _forward("instancenorm", _norm_checks.channels(x, gamma, beta, axis, number, out))


def instancenorm_backward(
    dout: ArrayLike,
    cache: NormCache,
    *,
    out: Array | None = None,
    needs: Sequence[str] = GRADIENTS,
) -> tuple[Any, ...]:
    """Twin of `bn_fast.instancenorm_backward`.

    With t = gamma*dout, and [ ] for the mean over the M places of a sample's channel::

        dx = r * (t - [t] - x_hat*[t*x_hat])

    gamma is one number for all of them, and dx that of batch normalization (`batch` derives it) of
    a single sample with N*C channels. It is the same for all samples, and the sums are over
    samples and places::

        dgamma = sum dout*x_hat        dbeta = sum dout
    """
    return tuple(_backward("instancenorm", dout, cache, out, needs).values())


@refusing
def spatial_groupnorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    G: int,
    gn_param: Mapping[str, Any] | None = None,
    *,
    eps: float | None = None,
    out: Array | None = None,
) -> tuple[Array, NormCache]:
    """Twin of `bn_fast.spatial_groupnorm_forward`: `groupnorm_forward` for images."""
    number = _norm_checks.epsilon(gn_param, "gn_param", eps)
    call = _norm_checks.groups(x, gamma, beta, G, 1, number, out, name="G", images=True)
    return _forward("groupnorm", call)


spatial_groupnorm_backward = groupnorm_backward


# Forward alone, for inference.


@refusing
def layer_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int | tuple[int, ...] = -1,
    out: Array | None = None,
) -> Array:
    """Twin of `bn_fast.layer_norm`: `layernorm_forward` without a cache."""
    call = _norm_checks.rows(x, gamma, beta, axis, _checks.epsilon(eps), out)
    return _forward("layernorm", call)[0]


@refusing
def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int | tuple[int, ...] = -1,
    out: Array | None = None,
) -> Array:
    """Twin of `bn_fast.rms_norm`: `rmsnorm_forward` without a cache."""
    call = _norm_checks.rows(x, gamma, None, axis, _checks.epsilon(eps), out)
    return _forward("rmsnorm", call)[0]


@refusing
def group_norm(
    x: ArrayLike,
    num_groups: int,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Twin of `bn_fast.group_norm`: `groupnorm_forward` without a cache."""
    call = _norm_checks.groups(x, gamma, beta, num_groups, axis, _checks.epsilon(eps), out)
    return _forward("groupnorm", call)[0]


@refusing
def instance_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Twin of `bn_fast.instance_norm`: `instancenorm_forward` without a cache."""
    call = _norm_checks.channels(x, gamma, beta, axis, _checks.epsilon(eps), out)
    return _forward("instancenorm", call)[0]
