"""Batch normalization in plain NumPy.

Twins of the functions of the same names, written as one writes them in NumPy: arithmetic in the
dtype of x, statistics in two passes. They say what is computed, and serve where nothing can be
compiled. Their float32 is that of NumPy, whose sums over the first axis lose digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ._arrays import (
    Array,
    Axis,
    BNParam,
    Gradients,
    _against,
    _as_given,
    _computable,
    _count,
    _count_of,
    _deliver,
    _feature_shapes,
    _float_array,
    _inv_std,
    _mean,
    _parameter_shapes,
    _running_average,
    _shape,
    _shaped,
    _sum,
    _weights,
)
from ._caches import (
    ACTIVATIONS,
    Cache,
    FrozenCache,
    OptionsCache,
    _before_activation,
    _through_activation,
)
from .derivations import batchnorm_backward_element_wise

GRADIENTS = "dx", "dgamma", "dbeta", "dresidual"
STATISTICS = "dmean", "dvar"


def batchnorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    bn_param: BNParam | None = None,
    *,
    axis: Axis = 1,
    out: Array | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[Array, Cache]:
    """Twin of `bn_fast.batchnorm_forward`, which says what arguments, results and errors are.

    The cache is a plain tuple of five arrays, `Cache`, which keeps options as attributes. `out` may
    overlap x in any way: the cache then keeps a copy of what x was.

    Notes
    -----
    For each feature::

        mean = sum x / M        var = sum (x - mean)**2 / M
        x_hat = (x - mean) / sqrt(var + eps)        out = gamma*x_hat + beta
        running = momentum*running + (1 - momentum)*batch

    With weights, whose sum is W::

        mean = sum w*x / W      var = sum w*(x - mean)**2 / W

    with options, out = activation(gamma*x_hat + beta + residual). An element of weight 0 has no
    influence on the statistics, not even as NaN. W = 0 leaves the running averages alone, and
    x_hat = 0.

    ``running_var`` averages var, or with ``ddof`` 1 var * M/(M - 1), with weights
    var * W/(W - 1). In test mode mean and var are the running averages. A feature of variance 0
    gives beta, with eps = 0 as well: in train mode 1/sqrt(0) is taken as 0. So does M = 1.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> bn_param = {"mode": "train", "eps": 0}
    >>> out, cache = reference.batchnorm_forward(x, [1, 2], [0, 5], bn_param)
    >>> out
    array([[-1.,  3.],
           [ 1.,  7.]])
    >>> bn_param["running_var"]
    array([ 0.1, 10. ])
    """
    stored = _float_array(x, "x")
    x = _computable(stored)
    if x.ndim < 2:
        raise ValueError(f"x must have 2 or more dimensions, got shape {x.shape}")
    own, against_x = _feature_shapes(x, axis)
    shapes, given_beta = (_shape(gamma), _shape(beta)), beta
    scale = _against(1 if gamma is None else gamma, "gamma", x, axis, x.dtype)
    beta = _against(0 if beta is None else beta, "beta", x, axis, x.dtype)

    param = {"mode": "train"} if bn_param is None else bn_param
    if param["mode"] not in ("train", "test"):
        raise ValueError(f"bn_param['mode'] must be 'train' or 'test', got {param['mode']!r}")
    train = param["mode"] == "train"
    eps = float(param.get("eps", 1e-5))
    if not 0 <= eps < math.inf:
        raise ValueError(f"bn_param['eps'] must be finite and at least 0, got {eps}")
    momentum = float(param.get("momentum", 0.9))
    if not math.isfinite(momentum):
        raise ValueError(f"bn_param['momentum'] must be finite, got {momentum}")
    ddof = param.get("ddof", 0)
    if ddof not in (0, 1):
        raise ValueError(f"bn_param['ddof'] must be 0 or 1, got {ddof!r}")
    running_mean = _running_average(param, "running_mean", x, axis)
    running_var = _running_average(param, "running_var", x, axis)
    if (running_var < 0).any():
        feature = int(np.argmax(running_var < 0))
        raise ValueError(
            f"bn_param['running_var'] must not be negative, got {running_var.flat[feature]}"
            f" for feature {feature}"
        )

    if activation is not None and activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be None or one of {names}, got {activation!r}")
    if not math.isfinite(negative_slope):
        raise ValueError(f"negative_slope must be finite, got {negative_slope}")
    if residual is not None:
        residual = _float_array(residual, "residual").astype(stored.dtype, copy=False)
        if residual.shape != x.shape:
            raise ValueError(f"residual must have the shape of x, {x.shape}, got {residual.shape}")
    w = None if weights is None else _weights(weights, x, axis)
    count = _count_of(weights, x, axis)
    few = np.ravel(count)[(np.ravel(count) > 0) & (np.ravel(count) <= ddof)]
    if train and few.size:
        raise ValueError(
            "bn_param['ddof'] must be 0 for a batch that has no unbiased variance: it has"
            f" {few[0]:g} values for a feature"
        )

    mean = _mean(x, scale, w) if train else running_mean.astype(x.dtype).reshape(against_x)
    centered = x - mean
    var = (
        _mean(centered * centered, scale, w)
        if train
        else running_var.astype(x.dtype).reshape(against_x)
    )
    inv_std = _inv_std(var, eps, train)
    seen = np.broadcast_to(np.asarray(count) > 0, own)  # else it is an empty batch
    if train:
        inv_std = np.where(seen.reshape(against_x), inv_std, 0)
    x_hat = centered * inv_std
    if train:
        unbiased = 1 + ddof / np.where(np.asarray(count) > ddof, count - ddof, np.inf)
        unbiased = unbiased.astype(x.dtype)
        batch = mean.reshape(own), var.reshape(own) * unbiased
        running_mean, running_var = (
            np.where(
                seen.reshape(old.shape),
                momentum * old + (1 - momentum) * new.reshape(old.shape),
                old,
            )
            for old, new in zip((running_mean, running_var), batch, strict=True)
        )

    if out is not None and np.may_share_memory(out, stored):
        stored = stored.copy()
    if residual is not None and out is not None and np.may_share_memory(out, residual):
        residual = residual.copy()
    z = _before_activation(scale, x_hat, beta, residual)
    y = ACTIVATIONS[activation][0](z, negative_slope) if activation else z
    y = _deliver(y.astype(stored.dtype, copy=False), out)
    if bn_param is not None:
        bn_param["running_mean"] = running_mean
        bn_param["running_var"] = running_var
    kept = gamma if gamma is None else scale if np.ndim(gamma) else np.asarray(gamma, x.dtype)
    five = mean, inv_std, stored, x_hat, kept
    plain = len(own) == 1 and shapes == (own, own)
    if plain and activation is None and residual is None and w is None:
        return y, (Cache if train else FrozenCache)(*five)
    cache = OptionsCache(*five)
    cache.frozen = not train
    cache.activation, cache.negative_slope = activation, negative_slope
    cache.beta, cache.residual, cache.weights = given_beta, residual, w
    cache.parameter_shapes = shapes
    return y, cache


def batchnorm_backward(
    dout: ArrayLike,
    cache: Sequence[Any],
    *,
    out: Array | None = None,
    needs: Sequence[str] = GRADIENTS,
) -> tuple[Any, ...]:
    """Twin of `bn_fast.batchnorm_backward`: the closed form of the element-wise derivation.

    Arguments, results and errors are those of that. The cache may be bn_fast's or any five arrays;
    `out` may overlap dout in any way, and x or x_hat if the cache is not used again.

    See Also
    --------
    batchnorm_backward_element_wise : the formula and its derivation

    Notes
    -----
    After a forward pass in test mode x has no influence on the statistics: dx = gamma*r*dout. Then
    `needs` may name dmean and dvar, which come last::

        dmean = -gamma*r*dbeta          dvar = -gamma*r**2*dgamma/2

    dout goes through the activation first. That is dresidual, and the dout of all formulas. With
    weights 1/M is w/W in dx; the sums are over all elements, but for those of weight 0 whose x or
    dout is not finite.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> out, cache = reference.batchnorm_forward(x, [1], [0])
    >>> dx, dgamma, dbeta = reference.batchnorm_backward([[1], [0], [0]], cache)
    >>> dx.round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    >>> dbeta
    array([1.])
    """
    known = *GRADIENTS, *STATISTICS
    unknown = [name for name in needs if name not in known]
    if unknown:
        raise ValueError(f"needs must be of {', '.join(known)}, got {unknown[0]!r}")
    dx, dgamma, dbeta = batchnorm_backward_element_wise(dout, cache)
    gradients = [dx, dgamma, dbeta]
    if getattr(cache, "residual", None) is not None:
        mean, _, _, x_hat, gamma = cache
        dout, gamma = np.array(dout, dx.dtype), _shaped(gamma, 1, np.asarray(mean, dx.dtype))
        gradients.append(_through_activation(dout, gamma, np.asarray(x_hat), cache))
    given = _statistics_gradients(dout, cache) if set(STATISTICS).intersection(needs) else ()
    if "dx" in needs:
        gradients[0] = _deliver(dx, out)
    named = *zip(GRADIENTS, gradients, strict=False), *zip(STATISTICS, given, strict=False)
    return tuple(a if name in needs else None for name, a in named)


def _statistics_gradients(dout: ArrayLike, cache: Sequence[Any]) -> tuple[Array, Array]:
    """dmean and dvar of test mode, from y = gamma*(x - mean)*(var + eps)**(-1/2) + beta."""
    weights = getattr(cache, "weights", None)
    without = weights is not None and not np.any(weights)
    if without or not getattr(cache, "frozen", False):
        raise ValueError("needs may name dmean and dvar after a forward call in test mode alone")
    mean, inv_std, x, _, gamma = cache
    mean, inv_std = (np.asarray(a, _computable(np.asarray(x)).dtype) for a in (mean, inv_std))
    # With gamma and beta that are there, of each feature.
    each = OptionsCache(mean, inv_std, x, cache[3], _shaped(gamma, 1, mean))
    for name in ("frozen", "activation", "negative_slope", "beta", "residual", "weights"):
        setattr(each, name, getattr(cache, name, None))
    own = tuple(n for n in mean.shape if n != 1) or (1,)
    each.parameter_shapes = own, own
    _, dgamma, dbeta = batchnorm_backward_element_wise(dout, each)
    scale = (each[4] * inv_std.reshape(mean.shape)).reshape(own)
    return -scale * dbeta, -scale * inv_std.reshape(own) * dgamma / 2


batchnorm_backward_alt = batchnorm_backward


def batchnorm_double_backward(
    ddx: ArrayLike | None,
    ddgamma: ArrayLike | None,
    ddbeta: ArrayLike | None,
    dout: ArrayLike,
    cache: Sequence[Any],
) -> Gradients:
    """Twin of `bn_fast.batchnorm_double_backward`, which has the derivation; without options.

    Notes
    -----
    With < > for the mean over a feature's values, A = <ddx>, B = <ddx*x_hat>, C = <dout>,
    D = <dout*x_hat>, E = <(ddx - A)*(dout - C)>, and w = ddgamma - gamma*r*B::

        dx = r*w*(dout - C) - gamma*r**2*D*(ddx - A)
             - r*x_hat*(gamma*r*(E - 3*B*D) + ddgamma*D)
        dgamma = r*M*(E - B*D)
        ddout = gamma*r*(ddx - A) + w*x_hat + ddbeta

    After a forward pass in test mode::

        dx = ddgamma*r*dout     dgamma = r*sum ddx*dout
        ddout = gamma*r*ddx + ddgamma*x_hat + ddbeta

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x, dout = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> out, cache = reference.batchnorm_forward(x, [1], [0])
    >>> dx, dgamma, dbeta = reference.batchnorm_backward(dout, cache)
    >>> reference.batchnorm_double_backward(dx, None, None, dout, cache)[1].round(4)
    array([0.0816])
    """
    mean, inv_std, x, x_hat, gamma = cache
    options = (getattr(cache, name, None) for name in ("activation", "residual", "weights"))
    if any(option is not None for option in options):
        raise ValueError("cache must be of a call without activation, residual and weights")
    stored = _float_array(x, "cache's x")
    dtype = _computable(stored).dtype
    mean = np.asarray(mean, dtype)
    r, gamma = np.asarray(inv_std, dtype).reshape(mean.shape), _shaped(gamma, 1, mean)
    x_hat = np.asarray(x_hat, dtype)
    given = []
    for name, array in (("dout", dout), ("ddx", np.zeros_like(stored) if ddx is None else ddx)):
        array = _computable(_float_array(array, name).astype(stored.dtype, copy=False))
        if array.shape != stored.shape:
            raise ValueError(f"{name} must have shape {stored.shape}, got {array.shape}")
        given.append(array)
    g, u = given
    shapes = _parameter_shapes(cache, mean)
    for name, values, shape in zip(("ddgamma", "ddbeta"), (ddgamma, ddbeta), shapes, strict=True):
        if values is not None and np.shape(values) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {np.shape(values)}")
    a, b = (_shaped(values, 0, mean) for values in (ddgamma, ddbeta))
    dx: Array
    if getattr(cache, "frozen", False):
        dx = a * r * g
        dgamma = r * _sum(u * g, mean)
        ddout = gamma * r * u + a * x_hat + b
    else:
        u_mean_free, g_mean_free = u - _mean(u, mean), g - _mean(g, mean)
        along_u, along_g = _mean(u * x_hat, mean), _mean(g * x_hat, mean)
        product = _mean(u_mean_free * g_mean_free, mean)
        w = a - gamma * r * along_u
        slope = gamma * r * (product - 3 * along_u * along_g) + a * along_g
        dx = r * w * g_mean_free - gamma * r**2 * along_g * u_mean_free - r * x_hat * slope
        dgamma = r * _count(stored, mean) * (product - along_u * along_g)
        ddout = gamma * r * u_mean_free + w * x_hat + b
    dx, ddout = (result.astype(stored.dtype, copy=False) for result in (dx, ddout))
    return dx, _as_given(dgamma, shapes[0]), ddout


def spatial_batchnorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    bn_param: BNParam | None = None,
    *,
    out: Array | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[Array, Cache]:
    """`batchnorm_forward` for images, x of shape (N, C, H, W): statistics over N, H and W.

    Parameters, results and errors are those of `batchnorm_forward` with ``axis=1``.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = np.arange(16.0).reshape(2, 2, 2, 2)
    >>> out, cache = reference.spatial_batchnorm_forward(x, np.ones(2), np.zeros(2))
    >>> cache.mean.reshape(-1)
    array([5.5, 9.5])
    """
    if np.ndim(x) != 4:
        raise ValueError(f"x must have 4 dimensions (N, C, H, W), got shape {np.shape(x)}")
    return batchnorm_forward(
        x,
        gamma,
        beta,
        bn_param,
        axis=1,
        out=out,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        weights=weights,
    )


spatial_batchnorm_backward = batchnorm_backward
