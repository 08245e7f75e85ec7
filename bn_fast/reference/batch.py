r"""Batch normalization in plain NumPy, its derivations, and an oracle.

Three kinds of functions, none of which calls compiled code:

- Twins of the public functions, of the same names, written as one writes them in NumPy: arithmetic
  in the dtype of x, statistics in two passes. They say what is computed, and serve where nothing
  can be compiled. Their float32 is that of NumPy, whose sums over the first axis lose digits.
- ``batchnorm_backward_*``: the backward pass once for each of three derivations, which go by the
  names three pathways, column-wise and element-wise.
- ``oracle_*``: the same results in long double, by other arithmetic, to judge all others by.

The derivations write r = 1/sqrt(var + eps), x_hat = (x - mean) * r, M for the number of values
for each feature, and dout, dgamma, dbeta, dx for the gradients of the loss with respect to out,
gamma, beta and x. All end in the same closed form::

    dbeta = sum dout      dgamma = sum dout*x_hat
    dx = gamma*r * (dout - dbeta/M - x_hat*dgamma/M)

References
----------
.. [1] Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
   Reducing Internal Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167.
.. [2] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance:
   Analysis and Recommendations", The American Statistician 37(3), 1983.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[np.floating[Any]]
BNParam = MutableMapping[str, Any]
Axis = int | tuple[int, ...]  # a tuple: several feature axes
Gradients = tuple[Array, Any, Any]  # those of gamma and beta are None where these were
GRADIENTS = "dx", "dgamma", "dbeta", "dresidual"
STATISTICS = "dmean", "dvar"


class Cache(NamedTuple):
    """What `batchnorm_forward` leaves for the backward pass: a plain tuple of five arrays.

    mean, inv_var and gamma are shaped to broadcast against x, and of its dtype, as is x_hat (of
    float32 for half types). inv_var is the
    tuple's traditional name for 1/sqrt(var + eps), the inverse of the standard deviation.
    """

    mean: Array
    inv_var: Array
    x: Array
    x_hat: Array
    gamma: Any  # an array, or None


class FrozenCache(Cache):
    """The cache of test mode: its statistics are given, so no gradient passes through them.

    The five arrays cannot say so. A cache of any type may, by an attribute `frozen` that is true.
    """

    __slots__ = ()

    frozen = True


class OptionsCache(Cache):
    """The cache of a call with options, which its attributes keep under their names.

    So they do with beta, and with the shapes in which gamma and beta were given (None: not at all)
    where one is not (C,).
    """

    frozen: bool
    activation: str | None
    negative_slope: float
    beta: ArrayLike | None
    parameter_shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    residual: Array | None
    weights: Array | None


class _Prepared(NamedTuple):
    """A cache in order for the derivations.

    share is what an element has in its mean: 1/M, or its weight by the sum of weights. counts says
    which elements the sums of the backward pass are over.
    """

    mean: Array
    inv_std: Array
    x: Array
    x_hat: Array
    gamma: Array
    share: Array | float
    counts: NDArray[np.bool_] | bool


# An activation is a function of z = gamma*x_hat + beta (+ residual), and the way of a gradient
# through it; both know negative_slope. At z = 0 the slope is that from below; NaN comes through.
ACTIVATIONS: dict[str, tuple[Callable[[Array, float], Array], Callable[..., Array]]] = {
    "relu": (
        lambda z, slope: np.where(z <= 0, 0, z),
        lambda dout, z, slope: np.where(z <= 0, 0, dout),
    ),
    "leaky_relu": (
        lambda z, slope: np.where(z <= 0, slope * z, z),
        lambda dout, z, slope: np.where(z <= 0, slope * dout, dout),
    ),
}


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


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """Those of the features in ascending order."""
    axes: tuple[int, ...] = tuple(sorted(normalize_axis_tuple(axis, ndim)))
    if not axes:
        raise ValueError("axis must name one or more axes, got none")
    return axes


def _feature_shapes(x: NDArray[Any], axis: Axis) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """That of values for each feature, and the shape in which they broadcast against x."""
    axes = _axes(axis, x.ndim)
    against_x = tuple(x.shape[d] if d in axes else 1 for d in range(axes[0], x.ndim))
    return tuple(x.shape[d] for d in axes), against_x


def _shape(value: ArrayLike | None) -> tuple[int, ...] | None:
    return None if value is None else np.shape(value)


def _as_given(gradient: Array, shape: tuple[int, ...] | None) -> Any:
    """The gradient of a parameter that was given in that shape; None: that was not given."""
    if shape is None:
        return None
    return gradient.sum() if shape == () else gradient.reshape(shape)


def _parameter_shapes(cache: Sequence[Any], mean: Array) -> tuple[Any, ...]:
    """As the cache says; of a plain tuple those of the mean along its axes."""
    own = tuple(n for n in mean.shape if n != 1)
    own = own if len(own) > 1 else (mean.size,)
    known = None if cache[4] is None else own if np.ndim(cache[4]) else (), own
    shapes: tuple[Any, ...] = getattr(cache, "parameter_shapes", known)
    return shapes


def _shaped(value: ArrayLike | None, default: float, like: Array) -> Array:
    """A parameter, None for its default, in another's shape and dtype."""
    array = np.asarray(default if value is None else value, like.dtype)
    return array.reshape(like.shape) if array.ndim else np.full(like.shape, array)


def _before_activation(
    gamma: Array, x_hat: Array, beta: Array, residual: ArrayLike | None
) -> Array:
    z = gamma * x_hat + beta
    return z if residual is None else z + np.asarray(residual, z.dtype)


def _weights(weights: ArrayLike, x: Array, axis: Axis) -> Array:
    """The weights in the dtype and shape of x, each feature's divided by a power of two near the
    largest.

    That changes no mean, and neither squares nor sums leave the range because of it.
    """
    w = np.asarray(weights)
    if w.dtype.kind not in "biuf":
        raise TypeError(f"weights must be bool or real numbers, got {w.dtype}")
    w = w.astype(np.float64)
    if not (np.isfinite(w) & (w >= 0)).all():
        raise ValueError("weights must be finite and at least 0")
    axes = _axes(axis, x.ndim)
    lengths = (1,) * (x.ndim - w.ndim) + w.shape
    if w.ndim != x.ndim and any(lengths[d : d + 1] != (1,) for d in axes):
        raise ValueError(
            f"weights must have length 1 along axis {axis} of x, or the shape of x, got {w.shape}"
        )
    try:
        w = np.broadcast_to(w, x.shape)
    except ValueError:
        raise ValueError(f"weights must broadcast to x {x.shape}, got {w.shape}") from None
    others = tuple(d for d in range(x.ndim) if d not in axes)
    exponent = np.frexp(w.max(axis=others, keepdims=True, initial=0))[1]
    scaled: Array = np.ldexp(w, 1 - exponent).astype(x.dtype)
    return scaled


def _count_of(weights: ArrayLike | None, x: Array, axis: Axis) -> Any:
    """M, or the sum of weights; an array where these differ between features."""
    axes = _axes(axis, x.ndim)
    n_values = x.size // max(math.prod(x.shape[d] for d in axes), 1)
    if weights is None:
        return n_values
    w = np.asarray(weights, np.float64)
    lengths = (1,) * (x.ndim - w.ndim) + w.shape
    if all(lengths[d] == 1 for d in axes):
        return float(w.sum()) * n_values / max(w.size, 1)
    others = tuple(d for d in range(x.ndim) if d not in axes)
    return np.broadcast_to(w, x.shape).sum(axis=others)


def _float_array(value: ArrayLike, name: str) -> Array:
    """Floats of 16, 32 and 64 bits as they are, but native; integers and bool as float64."""
    array: NDArray[Any] = np.asarray(value)
    if array.dtype.kind in "biu":
        return array.astype(np.float64)
    if _is_bfloat16(array.dtype):
        return array
    if array.dtype.kind != "f" or array.itemsize not in (2, 4, 8):
        raise TypeError(
            f"{name} must be float16, bfloat16, float32, float64, integer or bool, got"
            f" {array.dtype}"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """The type of the package ml_dtypes, which a cast to float32 or back needs no import of."""
    return dtype.itemsize == 2 and dtype.type.__name__ == "bfloat16"


def _computable(array: Array) -> Array:
    return array.astype(np.float32) if array.itemsize == 2 else array


def _parameter(value: ArrayLike, name: str, x: Array, axis: Axis) -> NDArray[Any]:
    """A value for each feature, or one for all, in the shape given."""
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" and not _is_bfloat16(array.dtype):
        raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}")
    own, against_x = _feature_shapes(x, axis)
    lengths = (1,) * (x.ndim - array.ndim) + array.shape
    along = lengths == (1,) * (x.ndim - len(against_x)) + against_x
    if array.shape not in (own, ()) and not along:
        raise ValueError(f"{name} must have shape {own}, or broadcast to it, got {array.shape}")
    return array


def _against(value: Any, name: str, x: Array, axis: Axis, dtype: DTypeLike = np.float64) -> Array:
    """A value for each feature, in a shape that broadcasts against x."""
    array = _parameter(value, name, x, axis).astype(dtype)
    own, against_x = _feature_shapes(x, axis)
    return (array if array.ndim else np.full(own, array)).reshape(against_x)


def _running_average(param: BNParam, key: str, x: Array, axis: Axis) -> Array:
    """A new array, at least as precise as the caller's and as x."""
    value = param.get(key)
    if value is None:
        return np.zeros(_feature_shapes(x, axis)[0], x.dtype)
    value = _parameter(value, f"bn_param[{key!r}]", x, axis)
    if value.ndim == 0:
        raise ValueError(f"bn_param[{key!r}] must have a value for each feature, got {value}")
    return value.astype(np.result_type(value.dtype, x.dtype))


def _sum(a: Array, like: Array, where: NDArray[np.bool_] | bool = True) -> Array:
    """The sum of `a` in the shape of `like`, which broadcasts against it: one for each feature."""
    lengths = (1,) * (a.ndim - like.ndim) + like.shape
    others = tuple(d for d, length in enumerate(lengths) if length == 1)
    total: Array = a.sum(axis=others, keepdims=True, where=where)
    return total.reshape(like.shape)


def _count(a: Array, like: Array) -> int:
    """M, how many values of `a` each one of `like` stands for; 1 for none, which divides 0 by 1."""
    return max(a.size // max(like.size, 1), 1)


def _mean(a: Array, like: Array, w: Array | None = None) -> Array:
    mean: Array
    if w is None:
        mean = _sum(a, like) / _count(a, like)
    else:
        total = _sum(w, like)
        mean = _sum(w * a, like, w > 0) / np.where(total > 0, total, 1)
    return mean


def _inv_std(var: Array, eps: float, train: bool) -> Array:
    std: Array = np.sqrt(var + eps)
    # 0 for a constant feature without eps: x - mean is 0 there, and so is its gradient. Given
    # statistics get the infinity of NumPy's division.
    where = std != 0 if train else True
    inv_std: Array = np.divide(1, std, out=np.zeros_like(std), where=where)
    return inv_std


def _deliver(result: Array, out: Array | None) -> Array:
    """Write the finished result to `out` if there is one, and so not before all else succeeded."""
    if out is None:
        return result
    if not isinstance(out, np.ndarray) or out.dtype != result.dtype:
        raise TypeError(
            f"out must be an ndarray of {result.dtype}, got {getattr(out, 'dtype', type(out))}"
        )
    if out.shape != result.shape:
        raise ValueError(f"out must have shape {result.shape}, got {out.shape}")
    out[...] = result
    return out


class _Backward(Protocol):
    def __call__(self, dout: ArrayLike, cache: Sequence[Any]) -> Gradients: ...


def _derivation(train_mode: Callable[[Array, _Prepared], Gradients]) -> _Backward:
    """A backward function from a derivation: arguments put in order, and test mode answered.

    With frozen statistics out = gamma*r*x + constant, so there is nothing to derive.
    """

    def backward(dout: ArrayLike, cache: Sequence[Any]) -> Gradients:
        mean, inv_var, x, x_hat, gamma = cache
        stored = _float_array(x, "cache's x")
        x = _computable(stored)
        mean = np.asarray(mean, x.dtype)
        inv_var, gamma = np.asarray(inv_var, x.dtype).reshape(mean.shape), _shaped(gamma, 1, mean)
        x_hat = np.asarray(x_hat, x.dtype)
        dout = _float_array(dout, "dout").astype(stored.dtype, copy=False)
        dout = _computable(dout)
        if dout.shape != x.shape:
            raise ValueError(f"dout must have the shape of x, {x.shape}, got {dout.shape}")
        dout = _through_activation(dout, gamma, x_hat, cache)
        share: Array | float = 1 / _count(x, mean)
        counts: NDArray[np.bool_] | bool = True
        w = getattr(cache, "weights", None)
        if w is not None:
            total: Array = _sum(w, mean)
            share = w / np.where(total > 0, total, 1)
            counts = (w > 0) | (np.isfinite(x) & np.isfinite(dout))
            x, x_hat = (np.where((w > 0) | np.isfinite(a), a, 0) for a in (x, x_hat))
        prepared = _Prepared(mean, inv_var, x, x_hat, gamma, share, counts)
        dx: Array
        if getattr(cache, "frozen", False):
            dgamma, dbeta = _parameter_gradients(dout, prepared)
            dx = prepared.gamma * prepared.inv_std * dout
        else:
            dx, dgamma, dbeta = train_mode(dout, prepared)
        sums = zip((dgamma, dbeta), _parameter_shapes(cache, mean), strict=True)
        return dx.astype(stored.dtype, copy=False), *(_as_given(a, shape) for a, shape in sums)

    # Not functools.wraps, after which `help` would show the signature of the derivation.
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(backward, name, getattr(train_mode, name))
    return backward


def _through_activation(dout: Array, gamma: Array, x_hat: Array, cache: Sequence[Any]) -> Array:
    """The gradient with respect to what the activation of a cache's call was applied to."""
    activation = getattr(cache, "activation", None)
    if activation is None:
        return dout
    beta, residual, slope = (getattr(cache, a) for a in ("beta", "residual", "negative_slope"))
    beta = _shaped(beta, 0, gamma)
    z = _before_activation(gamma, x_hat, beta, residual)
    return ACTIVATIONS[activation][1](dout, z, slope)


def _parameter_gradients(dout: Array, cache: _Prepared) -> tuple[Array, Array]:
    """dgamma and dbeta, from z = gamma*x_hat + beta: each value of a feature adds its part."""
    dgamma = _sum(dout * cache.x_hat, cache.mean, cache.counts)
    return dgamma, _sum(dout, cache.mean, cache.counts)


@_derivation
def batchnorm_backward_three_pathways(dout: Array, cache: _Prepared) -> Gradients:
    """The gradients by three pathways: x_i acts on out_j directly, through mean, and through var.

    Parameters
    ----------
    dout : array_like, shape of x
        Gradient with respect to the output of `batchnorm_forward`.
    cache : Cache or sequence of five arrays
        From `batchnorm_forward`, or ``(mean, inv_var, x, x_hat, gamma)`` as NumPy code makes it
        for the train mode; the first two and gamma broadcast against x.

    Returns
    -------
    dx : ndarray, shape and dtype of x
    dgamma, dbeta : ndarray, shape (C,), dtype of x (float32 for half types)

    Raises
    ------
    TypeError
        If dout or x is not of a dtype that `batchnorm_forward` takes.
    ValueError
        If the shapes do not fit.

    Notes
    -----
    The chain rule adds up all ways from x_i to x_hat_j = (x_j - mean) * (var + eps)**(-1/2)::

        d x_hat_j / d x_i =   delta_ij * r                                      direct
                            + (-r) * (1/M)                                      mean
                            + (-1/2 * (x_j - mean) * r**3)
                              * (2/M * (x_i - mean))                            variance

    where d var / d x_i has no part through the mean: d var / d mean = -2/M * sum (x_k - mean) = 0.
    Then dx_i = gamma * sum_j dout_j * (d x_hat_j / d x_i), a sum for each pathway::

        dx_i = gamma*r * dout_i
             - gamma*r/M * sum_j dout_j
             - gamma*r**3/M * (x_i - mean) * sum_j dout_j * (x_j - mean)

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> out, cache = reference.batchnorm_forward(x, [1], [0])
    >>> dx, dgamma, dbeta = reference.batchnorm_backward_three_pathways([[1], [0], [0]], cache)
    >>> dx.round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    mean, inv_std, x, _, gamma, share, counts = cache
    centered = x - mean
    direct = gamma * inv_std * dout
    through_mean = -gamma * inv_std * share * _sum(dout, mean, counts)
    through_var = -gamma * inv_std**3 * share * centered * _sum(dout * centered, mean, counts)
    return direct + through_mean + through_var, *_parameter_gradients(dout, cache)


@_derivation
def batchnorm_backward_column_wise(dout: Array, cache: _Prepared) -> Gradients:
    """The gradients column by column, each by its matrix of derivatives: for small M.

    Parameters
    ----------
    dout : array_like, shape (M, C)
        Gradient with respect to the output of `batchnorm_forward`.
    cache : Cache or sequence of five arrays
        As for `batchnorm_backward_three_pathways`, of an x of shape (M, C).

    Returns
    -------
    dx : ndarray, shape and dtype of x
    dgamma, dbeta : ndarray, shape (C,), dtype of x (float32 for half types)

    Raises
    ------
    TypeError
        If dout or x is not of a dtype that `batchnorm_forward` takes.
    ValueError
        If the shapes do not fit, or x is not of shape (M, C) with the features last.

    Notes
    -----
    One column at a time, x is a vector of length M, and two steps lead to x_hat. I is the
    identity matrix, 1 the vector of ones, T means transposed:

    1. v = x - mean = (I - 1 1T/M) x, a linear map, so dv/dx = I - 1 1T/M.
    2. x_hat = g(v) v, with the real-valued g(v) = (vT v/M + eps)**(-1/2) = r. For such a product
       the derivative is g I + v (dg/dv)T, the product rule. Here dg/dv = -r**3/M * v, so
       d x_hat/dv = r I - r**3/M * v vT = r * (I - x_hat x_hatT/M).

    Together ::

        J = d x_hat/dx = r * (I - x_hat x_hatT/M) (I - 1 1T/M)
        dx = gamma * JT dout

    vT 1 = 0 makes it r * (I - 1 1T/M - x_hat x_hatT/M), from which the closed form is read off.
    The code keeps the product of the two matrices. It takes M*M numbers of memory.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> out, cache = reference.batchnorm_forward(x, [1], [0])
    >>> dx, dgamma, dbeta = reference.batchnorm_backward_column_wise([[1], [0], [0]], cache)
    >>> dx.round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    mean, inv_std, x, x_hat, gamma, share, counts = cache
    if x.ndim != 2 or mean.shape != (x.shape[1],):
        raise ValueError(
            f"cache's x and mean must have shapes (M, C) and (C,), got {x.shape} and {mean.shape}"
        )
    identity = np.eye(len(x), dtype=x.dtype)
    shares = np.broadcast_to(share, x.shape)
    counted = np.where(counts, dout, 0)
    dx = np.empty_like(dout)
    for j in range(x.shape[1]):
        centering = identity - shares[:, j]
        scaling = identity - np.outer(x_hat[:, j], x_hat[:, j] * shares[:, j])
        jacobian = inv_std[j] * scaling @ centering
        dx[:, j] = gamma[j] * jacobian.T @ counted[:, j]
    return dx, *_parameter_gradients(dout, cache)


@_derivation
def batchnorm_backward_element_wise(dout: Array, cache: _Prepared) -> Gradients:
    """The gradients element by element with the quotient rule: the closed form.

    Parameters
    ----------
    dout : array_like, shape of x
        Gradient with respect to the output of `batchnorm_forward`.
    cache : Cache or sequence of five arrays
        As for `batchnorm_backward_three_pathways`.

    Returns
    -------
    dx : ndarray, shape and dtype of x
    dgamma, dbeta : ndarray, shape (C,), dtype of x (float32 for half types)

    Raises
    ------
    TypeError
        If dout or x is not of a dtype that `batchnorm_forward` takes.
    ValueError
        If the shapes do not fit.

    Notes
    -----
    x_hat_k = f_k / g is a quotient, f_k = x_k - mean and g = sqrt(var + eps). With
    d mean / d x_i = 1/M and d var / d x_i = 2/M**2 * sum_t (x_i - x_t) = 2/M * (x_i - mean)::

        d f_k / d x_i = delta_ik - 1/M
        d g / d x_i = 1/(2*g) * 2/M * (x_i - mean) = x_hat_i / M
        d x_hat_k / d x_i = (g * (delta_ik - 1/M) - f_k * x_hat_i/M) / g**2
                          = (M*delta_ik - 1 - x_hat_k*x_hat_i) / (M*g)

    The sum dx_i = gamma * sum_k dout_k * (d x_hat_k / d x_i) is the closed form::

        dx_i = gamma*r * (dout_i - sum_k dout_k / M - x_hat_i * sum_k dout_k*x_hat_k / M)

    The text that this derivation is from has its element-wise formulas right, and misprints two
    of their vectorized lines, where J is a row of M ones: it has ``dbeta = J beta`` for
    ``dbeta = J dout``, and ``dgamma = J (gamma * dout)`` for ``dgamma = J (x_hat * dout)``.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> out, cache = reference.batchnorm_forward(x, [1], [0])
    >>> dx, dgamma, dbeta = reference.batchnorm_backward_element_wise([[1], [0], [0]], cache)
    >>> dx.round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    _, inv_std, _, x_hat, gamma, share, _ = cache
    dgamma, dbeta = _parameter_gradients(dout, cache)
    return gamma * inv_std * (dout - share * (dbeta + x_hat * dgamma)), dgamma, dbeta


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


# The pieces: statistics and gradients of a batch in several parts.


class Moments(NamedTuple):
    """Twin of `bn_fast.Moments`: count, mean and sum of squared deviations, in float64."""

    count: Any
    mean: Array
    m2: Array

    def var(self, ddof: float = 0) -> Array:
        divisor = np.asarray(self.count - ddof)
        return self.m2 / np.where(divisor > 0, divisor, np.nan)

    def std(self, ddof: float = 0) -> Array:
        return np.sqrt(self.var(ddof))

    def merge(self, other: Moments) -> Moments:
        """The moments of both parts together, by Chan, Golub and LeVeque's formulas."""
        count = self.count + other.count
        share = other.count / np.where(count == 0, 1, count)
        a, b = (np.where(np.asarray(m.count) == 0, 0, m.mean) for m in (self, other))
        mean = np.where(np.asarray(count) == 0, np.nan, a + (b - a) * share)
        return Moments(count, mean, self.m2 + other.m2 + (b - a) ** 2 * (self.count * share))


def moments(x: ArrayLike, *, axis: Axis = 1, weights: ArrayLike | None = None) -> Moments:
    """Twin of `bn_fast.moments`, in two passes and float64.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> reference.moments(np.array([[1.0, 10.0], [3.0, 30.0]])).var()
    array([  1., 100.])
    """
    x = _float_array(x, "x").astype(np.float64)
    w = np.ones_like(x) if weights is None else _weights(weights, x, axis)
    count = _count_of(weights, x, axis)
    axes = _axes(axis, x.ndim)
    values = np.where(w == 0, 0, x)
    others = tuple(d for d in range(x.ndim) if d not in axes)

    def mean_of(values: Array) -> Array:
        total = w.sum(axis=others)
        mean: Array = (w * values).sum(axis=others) / np.where(total > 0, total, np.nan)
        return mean

    mean = mean_of(values)
    against_x = mean.reshape(tuple(n if d in axes else 1 for d, n in enumerate(x.shape)))
    var = mean_of((values - against_x) ** 2)
    return Moments(count, mean, np.where(np.asarray(count) > 0, var * count, 0))


def normalize(
    x: ArrayLike,
    mean: Moments | ArrayLike,
    var: ArrayLike | None = None,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: Axis = 1,
    out: Array | None = None,
) -> Array:
    """Twin of `bn_fast.normalize`: test mode with the statistics as arguments, or in a `Moments`.

    Examples
    --------
    >>> from bn_fast import reference
    >>> reference.normalize([[1.0], [3.0]], [2.0], [1.0], eps=0)
    array([[-1.],
           [ 1.]])
    """
    if isinstance(mean, Moments):
        mean, var = mean.mean, mean.var()
    like = np.asarray(x)
    mean, var = (
        _against(values, name, like, axis) for values, name in ((mean, "mean"), (var, "var"))
    )
    param = {"mode": "test", "eps": eps, "running_mean": mean, "running_var": var}
    return batchnorm_forward(x, gamma, beta, param, axis=axis, out=out)[0]


def backward_reduce(
    dout: ArrayLike, x: ArrayLike, mean: ArrayLike, inv_std: ArrayLike, *, axis: Axis = 1
) -> tuple[Array, Array]:
    """Twin of `bn_fast.backward_reduce`; `inv_std` is not read.

    Examples
    --------
    >>> from bn_fast import reference
    >>> reference.backward_reduce([[1.0], [0.0]], [[3.0], [5.0]], [4.0], [1.0])
    (array([1.]), array([-1.]))
    """
    x, dout = _float_array(x, "x"), _float_array(dout, "dout")
    mean = _against(mean, "mean", x, axis)
    g = dout.astype(np.float64)
    own = _feature_shapes(x, axis)[0]
    return _sum(g, mean).reshape(own), _sum(g * (x - mean), mean).reshape(own)


def backward_apply(
    dout: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None,
    sum_dout: ArrayLike,
    sum_dout_xmu: ArrayLike,
    count: Any,
    *,
    axis: Axis = 1,
    out: Array | None = None,
) -> Array:
    """Twin of `bn_fast.backward_apply`, in float64.

    Examples
    --------
    >>> from bn_fast import reference
    >>> reference.backward_apply([[1.0], [0.0]], [[3.0], [5.0]], [4], [0.5], [2], [1], [-1], 2)
    array([[ 0.375],
           [-0.375]])
    """
    x, dout = _float_array(x, "x"), _float_array(dout, "dout")
    names = "mean", "inv_std", "gamma", "sum_dout", "sum_dout_xmu"
    given = mean, inv_std, 1 if gamma is None else gamma, sum_dout, sum_dout_xmu
    mean, r, gamma, s, p = (_against(*a, x, axis) for a in zip(given, names, strict=True))
    m = np.maximum(count, 1)
    m = _against(m, "count", x, axis)
    dx = gamma * r * (dout - s / m - (x - mean) * r**2 * (p / m))
    return _deliver(dx.astype(x.dtype), out)


# The oracle. NumPy adds values that lie side by side in pairs of pairs, but over any other axis one
# after the other: so each feature's values are brought side by side first, as rows (C, M).


def oracle_forward(
    x: ArrayLike,
    gamma: ArrayLike,
    beta: ArrayLike,
    *,
    eps: float = 1e-5,
    axis: Axis = 1,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """Batch normalization in long double, to judge others by.

    Parameters
    ----------
    x : array_like, 1 or more dimensions
        Input, of any real dtype.
    gamma, beta : array_like, shape (C,)
    eps : float, default 1e-5
    axis : int or tuple of int, default 1
        The feature axis of x; ``C = x.shape[axis]``. Several: C places along them in C order.
    mean, var : array_like, shape (C,), optional
        Given statistics, as in test mode; both or none. Without them those of x, var being the
        biased variance.
    weights : array_like, optional
        Weight of each element in the statistics, broadcasting to x; the sum of each feature's is
        not 0. Without them 1.

    Returns
    -------
    out : ndarray of longdouble, shape of x
    mean, var : ndarray of longdouble, shape (C,)

    Raises
    ------
    ValueError
        If shapes do not fit, or one of mean and var is given without the other.

    Notes
    -----
    Where a long double has 64 bits (x86), for finite x: mean is right to the last digits of a long
    double; x - mean is computed with a mean of two parts, the second being what the rounding of
    the first has left, so an offset costs nothing; sums are pairwise [2]_. The largest error of
    out is below 1e-18 of its largest value up to a million rows, a hundredth of a float64
    rounding. Squares do not overflow up to values of 1e2400. A constant feature gives exactly
    beta, for eps = 0 too. Where long double is float64 (Windows, ARM Macs) it is the
    same algorithm in float64, good to judge float32 by. It takes up to 3 arrays of 16 bytes for
    each element of x; x of shape (1000000, 24) takes 2 seconds.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.
    .. [2] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample
       Variance", The American Statistician 37(3), 1983: two passes, the second corrected.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = 1e9 + np.array([[-1.0], [1.0]])
    >>> out, mean, var = reference.oracle_forward(x, [2], [5], eps=0)
    >>> out.astype(float)
    array([[3.],
           [7.]])
    >>> var.astype(float)
    array([1.])
    """
    w = _oracle_weights(weights, x, axis)
    y, used_mean, used_var, inv_std = _oracle_statistics(x, eps, axis, mean, var, w)
    y *= inv_std * _as_column(gamma, y)
    y += _as_column(beta, y)
    return _from_rows(y, x, axis), used_mean.reshape(-1), used_var.reshape(-1)


def oracle_backward(
    dout: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike,
    *,
    eps: float = 1e-5,
    axis: Axis = 1,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Gradients:
    """Gradients of batch normalization in long double, to judge others by.

    Parameters
    ----------
    dout, x : array_like, of the same shape, 1 or more dimensions
        Gradient with respect to the output, and input; of any real dtype.
    gamma : array_like, shape (C,)
    eps : float, default 1e-5
    axis : int or tuple of int, default 1
        The feature axis of x; ``C = x.shape[axis]``. Several: C places along them in C order.
    mean, var : array_like, shape (C,), optional
        Given statistics, through which no gradient passes; both or none.
    weights : array_like, optional
        As in `oracle_forward`.

    Returns
    -------
    dx : ndarray of longdouble, shape of x
    dgamma, dbeta : ndarray of longdouble, shape (C,)

    Raises
    ------
    ValueError
        If shapes do not fit, or one of mean and var is given without the other.

    Notes
    -----
    The closed form of the module's head, on statistics as exact as those of `oracle_forward`.
    For the batch's own statistics the mean is taken off dout first: the sum of x_hat is 0, so
    this changes neither dgamma nor dx, and a common offset of dout costs no digits. dx is right to
    about 1e-18 of the largest of ``gamma*r*(dout - mean of dout)``, dgamma and dbeta of the sum of
    the magnitudes of their terms.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> dx, dgamma, dbeta = reference.oracle_backward([[1.0], [0.0], [0.0]], x, [1])
    >>> dx.astype(float).round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    if np.shape(dout) != np.shape(x):
        raise ValueError(f"dout must have the shape of x, {np.shape(x)}, got {np.shape(dout)}")
    train = mean is None
    w = _oracle_weights(weights, x, axis)
    x_hat, _, _, inv_std = _oracle_statistics(x, eps, axis, mean, var, w)
    x_hat *= inv_std
    g = _as_rows(dout, axis)
    if w is not None:
        counts = (w > 0) | (np.isfinite(_as_rows(x, axis)) & np.isfinite(g))
        dbeta = g.sum(axis=1, where=counts)
        dgamma = (g * x_hat).sum(axis=1, keepdims=True, where=counts)
        if train:
            x_hat *= dgamma
            x_hat += dbeta[:, None]
            g -= np.where(w > 0, x_hat * w, 0) / w.sum(axis=1, keepdims=True)
    else:
        dbeta = g.sum(axis=1)
        if train:
            _center(g)
        dgamma = (g * x_hat).sum(axis=1, keepdims=True)
        if train:
            x_hat *= dgamma / max(x_hat.shape[1], 1)
            g -= x_hat
    g *= inv_std * _as_column(gamma, g)
    return _from_rows(g, x, axis), dgamma.reshape(-1), dbeta


def oracle_double_backward(
    ddx: ArrayLike,
    ddgamma: ArrayLike,
    ddbeta: ArrayLike,
    dout: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike,
    *,
    eps: float = 1e-5,
    axis: Axis = 1,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
) -> Gradients:
    """Gradients of the gradients of batch normalization in long double, to judge others by.

    Parameters
    ----------
    ddx, dout, x : array_like, of the same shape, 1 or more dimensions
    ddgamma, ddbeta, gamma : array_like, shape (C,)
    eps, axis, mean, var
        As for `oracle_backward`.

    Returns
    -------
    dx : ndarray of longdouble, shape of x
    dgamma : ndarray of longdouble, shape (C,)
    ddout : ndarray of longdouble, shape of x

    Notes
    -----
    The formulas of `batchnorm_double_backward`, on statistics as exact as those of
    `oracle_forward`.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x, dout = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> dx = reference.oracle_backward(dout, x, [1])[0]
    >>> dgamma = reference.oracle_double_backward(dx, [0], [0], dout, x, [1])[1]
    >>> dgamma.astype(float).round(4)
    array([0.0816])
    """
    x_hat, _, _, r = _oracle_statistics(x, eps, axis, mean, var, None)
    x_hat *= r
    u, g = _as_rows(ddx, axis), _as_rows(dout, axis)
    a, b, gamma = (_as_column(values, x_hat) for values in (ddgamma, ddbeta, gamma))
    m = max(x_hat.shape[1], 1)
    if mean is not None:
        dgamma = r * (u * g).sum(axis=1, keepdims=True)
        results = a * r * g, gamma * r * u + a * x_hat + b
    else:
        _center(u)
        _center(g)
        along_u, along_g, product = (
            pair.sum(axis=1, keepdims=True) / m for pair in (u * x_hat, g * x_hat, u * g)
        )
        dgamma = r * m * (product - along_u * along_g)
        w = a - gamma * r * along_u
        slope = gamma * r * (product - 3 * along_u * along_g) + a * along_g
        dx = r * w * g - gamma * r**2 * along_g * u - r * x_hat * slope
        results = dx, gamma * r * u + w * x_hat + b
    dx, ddout = (_from_rows(rows, x, axis) for rows in results)
    return dx, dgamma.reshape(-1), ddout


def _oracle_statistics(
    x: ArrayLike,
    eps: float,
    axis: Axis,
    mean: ArrayLike | None,
    var: ArrayLike | None,
    w: Array | None,
) -> tuple[Array, Array, Array, Array]:
    """x - mean as rows; mean, var and 1/sqrt(var + eps) as columns."""
    rows = _as_rows(x, axis)
    if mean is None and var is None:
        batch_mean = _center(rows, w)
        batch_var = _oracle_mean(rows * rows, w)
        return rows, batch_mean, batch_var, _inv_std(batch_var, eps, True)
    if mean is None or var is None:
        raise ValueError("mean and var must both be given, or neither")
    given_mean, given_var = _as_column(mean, rows), _as_column(var, rows)
    rows -= given_mean
    return rows, given_mean, given_var, _inv_std(given_var, eps, False)


def _oracle_weights(weights: ArrayLike | None, x: ArrayLike, axis: Axis) -> Array | None:
    """The weights as rows (C, M)."""
    return None if weights is None else _as_rows(np.broadcast_to(weights, np.shape(x)), axis)


def _oracle_mean(rows: Array, w: Array | None) -> Array:
    """The mean of each row as a column; elements of weight 0 may be NaN."""
    if w is None:
        mean: Array = rows.sum(axis=1, keepdims=True) / max(rows.shape[1], 1)
        return mean
    mean = (rows * w).sum(axis=1, keepdims=True, where=w > 0) / w.sum(axis=1, keepdims=True)
    return mean


def _center(rows: Array, w: Array | None = None) -> Array:
    """Take its mean off each row, in place, and return the means as a column.

    Twice: what the rounding of the first mean leaves is itself a mean of few bits, whose second
    sum is right to the last digit, and exact for a constant row.
    """
    mean = _oracle_mean(rows, w)
    rows -= mean
    rest = _oracle_mean(rows, w)
    rows -= rest
    mean += rest
    return mean


def _as_rows(a: ArrayLike, axis: Axis) -> Array:
    """A copy in long double of shape (C, M), the values of each feature side by side."""
    array = np.asarray(a)
    axes = _axes(axis, array.ndim)
    moved = np.moveaxis(array, axes, range(len(axes)))
    rows = np.array(moved, np.longdouble, order="C")
    n = len(axes)
    return rows.reshape(math.prod(moved.shape[:n]), math.prod(moved.shape[n:]))


def _from_rows(rows: Array, x: ArrayLike, axis: Axis) -> Array:
    """Undo `_as_rows`: the shape of x."""
    axes = _axes(axis, np.ndim(x))
    shape = np.moveaxis(np.asarray(x), axes, range(len(axes))).shape
    return np.moveaxis(rows.reshape(shape), range(len(axes)), axes)


def _as_column(parameter: ArrayLike, rows: Array) -> Array:
    return np.asarray(parameter, np.longdouble).reshape(len(rows), 1)
