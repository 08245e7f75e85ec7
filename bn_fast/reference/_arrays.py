"""What all of it is made of: arguments as arrays, shapes of features, sums and means of them."""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[np.floating[Any]]
BNParam = MutableMapping[str, Any]
Axis = int | tuple[int, ...]  # a tuple: several feature axes
Gradients = tuple[Array, Any, Any]  # those of gamma and beta are None where these were


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
