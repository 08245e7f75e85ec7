"""Arguments of layer, RMS, group and instance norm in, one description of the call out.

`_checks` is this for batch norm, with the same errors. `rows`, `groups` and `channels` describe a
forward call as a `NormCall`, `backward` does so for a backward call; of what they return nothing
needs to be asked again. Nothing here writes to anything.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from . import _checks
from ._cache import Axes, NormCache
from ._checks import (
    _as_parameter,
    _axes,
    _axis,
    _input,
    _is_array,
    _kind,
    _output,
    _real_array,
    _unfit,
)
from ._core import core
from ._types import DTYPES, Array, is_bfloat16

P = ParamSpec("P")
R = TypeVar("R")

GRADIENTS = "dx", "dgamma", "dbeta"
RMS_GRADIENTS = "dx", "dgamma"

# What neighbours take, and what to do here instead.
_REFUSED = {
    "weights": "take out what shall not count before the call",
    "mask": "take out what shall not count before the call",
    "residual": "add it to x before the call, or to the result after it",
    "activation": "apply it to the result",
}


class NormCall(NamedTuple):
    """A forward call whose arguments fit each other."""

    x: Array  # native, aligned, of a type that can be computed with; any strides
    gamma: Array | None  # float32 or float64, in the shape given: ravelled it runs along axes.along
    beta: Array | None
    axes: Axes
    eps: float
    out: Array | None  # x itself or apart from it, and apart from gamma and beta

    @property
    def overwrites_x(self) -> bool:
        return self.out is not None and core.is_same(self.out, self.x)


def refusing(function: Callable[P, R]) -> Callable[P, R]:
    """A forward function that says of options which batch norm has, or another library, what to do
    instead."""

    @wraps(function)
    def forward(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            for name in kwargs:
                if name in _REFUSED:
                    message = f"{function.__name__} takes no {name}: {_REFUSED[name]}"
                    raise TypeError(message) from None
            raise

    return forward


def epsilon(param: Any, name: str, eps: Any) -> float:
    """eps of a call that may have it in its dict or by its name; `name` is the dict's."""
    if param is not None and not isinstance(param, Mapping):
        raise TypeError(
            f"{name} must be a dict or None, got {_kind(param)}: a number goes by its name, eps="
        )
    if param is not None:
        _checks.known_keys(param, name, ("eps",))
        if "eps" in param:
            if eps is not None:
                raise ValueError(
                    f"eps must be given once, got {_kind(eps)} and {name}['eps'] {param['eps']!r}"
                )
            return _checks.epsilon(param["eps"], f"{name}['eps']")
    return 1e-5 if eps is None else _checks.epsilon(eps)


# Forward


def call(
    norm: str, x: Any, gamma: Any, beta: Any, num_groups: Any, axis: Any, eps: float, out: Any
) -> NormCall:
    if norm == "groupnorm":
        return groups(x, gamma, beta, num_groups, axis, eps, out)
    if norm == "instancenorm":
        return channels(x, gamma, beta, axis, eps, out)
    return rows(x, gamma, beta, axis, eps, out)


def rows(x: Any, gamma: Any, beta: Any, axis: Any, eps: float, out: Any) -> NormCall:
    """Layer and RMS norm: the statistics are over the axes that gamma and beta run along."""
    x = _input(x, "x")
    if x.ndim < 1:
        raise ValueError("x must have 1 or more dimensions, got a single number")
    over = _axes(axis, x.ndim)
    shapes = (tuple([x.shape[d] for d in over]),)

    def what() -> str:
        return f"that of {f'axis {over[0]}' if len(over) == 1 else f'axes {over}'} of x"

    axes = axes_of_rows(x.shape, over)
    return _fitted(x, gamma, beta, axes, eps, out, shapes, what, _onnx_axis)


def groups(
    x: Any,
    gamma: Any,
    beta: Any,
    num_groups: Any,
    axis: Any,
    eps: float,
    out: Any,
    *,
    name: str = "num_groups",
    images: bool = False,
) -> NormCall:
    """Group norm: one statistic for each sample and group of neighbours along axis.

    `images`: of shape (N, C, H, W), for which gamma and beta may have shape (1, C, 1, 1).
    """
    x, channels = _channels(_checks.images(x) if images else x, axis)
    n = x.shape[channels]
    n_groups = _checks.integer(num_groups, name)
    if n_groups < 1 or n % n_groups:
        raise ValueError(
            f"{name} must be at least 1 and divide the {n} channels of axis {channels} of x,"
            f" got {n_groups}"
        )

    def hint(shape: tuple[int, ...], x: Array) -> str:
        if shape != (n_groups,):
            return ""
        return (
            "; one value for each group is what opset 18 of ONNX had, and np.repeat"
            f"(value, {n // n_groups}) makes one for each channel of it"
        )

    shapes = ((n,), (1, n, 1, 1)) if images else ((n,),)
    axes = axes_of_groups(x.shape, channels, n_groups)
    what = partial(_each_channel, channels)
    return _fitted(x, gamma, beta, axes, eps, out, shapes, what, hint)


def channels(x: Any, gamma: Any, beta: Any, axis: Any, eps: float, out: Any) -> NormCall:
    """Instance norm: one statistic for each sample and channel."""
    x, channel = _channels(x, axis)
    axes = axes_of_channels(x.shape, channel)
    shapes, what = ((x.shape[channel],),), partial(_each_channel, channel)
    return _fitted(x, gamma, beta, axes, eps, out, shapes, what)


def _each_channel(channels: int) -> str:
    return f"one value for each channel along axis {channels} of x"


def axes_of_rows(shape: tuple[int, ...], over: tuple[int, ...]) -> Axes:
    return Axes(shape, over, over)


def axes_of_channels(shape: tuple[int, ...], channels: int) -> Axes:
    over = tuple(d for d in range(1, len(shape)) if d != channels)
    return Axes(shape, over, (channels,))


def axes_of_groups(shape: tuple[int, ...], channels: int, n_groups: int) -> Axes:
    each = shape[channels] // n_groups
    cut = (*shape[:channels], n_groups, each, *shape[channels + 1 :])
    over = tuple(d for d in range(1, len(cut)) if d != channels)
    return Axes(cut, over, (channels, channels + 1))


def _channels(x: Any, axis: Any) -> tuple[Array, int]:
    x = _input(x, "x")
    if x.ndim < 2:
        raise ValueError(
            f"x must have 2 or more dimensions, (N, C, ...), got shape {x.shape}: a single sample"
            " becomes a batch as x[np.newaxis]"
        )
    channel = _axis(axis, x.ndim)
    if channel == 0:
        raise ValueError(
            f"axis must not be 0, which is the batch, got {axis}: a single sample becomes a batch"
            " as x[np.newaxis]"
        )
    return x, channel


def _onnx_axis(shape: tuple[int, ...], x: Array) -> str:
    """ONNX's axis=k means all axes from k on."""
    for k in range(1, x.ndim):
        if shape == x.shape[k:]:
            return f"; it would fit axis=tuple(range({k}, x.ndim))"
    return ""


def _fitted(
    x: Array,
    gamma: Any,
    beta: Any,
    axes: Axes,
    eps: float,
    out: Any,
    shapes: tuple[tuple[int, ...], ...],
    what: Callable[[], str],
    hint: Callable[[tuple[int, ...], Array], str] = lambda shape, x: "",
) -> NormCall:
    gamma = _parameter(gamma, "gamma", shapes, what, x, hint)
    beta = _parameter(beta, "beta", shapes, what, x, hint)
    out = _output(out, {"x": x, "gamma": gamma, "beta": beta})
    return NormCall(x, gamma, beta, axes, eps, out)


def _parameter(
    value: Any,
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    what: Callable[[], str],
    x: Array,
    hint: Callable[[tuple[int, ...], Array], str],
) -> Array | None:
    """gamma or beta as float32 or float64, in the one of the shapes that it has."""
    if value is None:
        return None
    array = _real_array(value, name)
    if array.shape not in shapes:
        advice = hint(array.shape, x)
        if not advice and array.ndim > 1 and array.size != math.prod(shapes[0]):
            todo = "multiply the result by" if name == "gamma" else "add to the result"
            advice = f"; what differs between samples, {todo} after a call with {name}=None"
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must have shape {expected}, {what()}, got {array.shape}{advice}")
    return _as_parameter(array)


# Backward


def backward(
    norm: str, dout: Any, cache: Any, out: Any, needs: Any
) -> tuple[Array, NormCache, Array | None, set[str]]:
    """dout, the cache, out, and which gradients are wanted, for the backward function of `norm`.

    To write dx over the cache's x is allowed; whoever does it says so in cache.overwritten.
    """
    gradients = RMS_GRADIENTS if norm == "rmsnorm" else GRADIENTS
    wanted = _checks.needs(needs, out, gradients)
    if not isinstance(cache, NormCache):
        cache = _foreign_cache(norm, cache)
    elif cache.norm == norm:
        _check_cache(cache)
    else:
        raise ValueError(f"cache must come from {norm}_forward, got that of {cache.norm}_forward")
    if cache.overwritten:
        raise ValueError(
            f"cache cannot be used: {cache.overwritten} wrote its output over the x that it keeps"
        )
    dout = _checks.gradient(dout, cache.x)
    inputs = {"dout": dout, "x": cache.x, "gamma": cache.gamma}
    return dout, cache, _output(out, inputs), wanted


def _check_cache(cache: NormCache) -> None:
    """Refuse a cache that does not fit itself, as one that was changed by hand."""
    x, axes, gamma, stats, shape = cache.x, cache.axes, cache.gamma, cache.stats, cache.beta_shape
    floats = isinstance(x, np.ndarray) and (x.dtype in DTYPES or is_bfloat16(x.dtype))
    if not (floats and _is_array(x, (x.dtype,), x.shape)):
        raise _unfit(cache, "x", "an array of floats")
    if not (isinstance(axes, Axes) and axes_fit(cache)):
        raise _unfit(cache, "axes", f"those of an x {x.shape}")
    n, n_stats = math.prod(axes.parameter_shape), math.prod(axes.stats_shape)
    floats = isinstance(gamma, np.ndarray) and _is_array(gamma, DTYPES[1:], gamma.shape)
    if gamma is not None and not (floats and gamma.size == n):
        raise _unfit(cache, "gamma", f"None or {n} numbers of float32 or float64")
    if shape is not None and not (isinstance(shape, tuple) and math.prod(shape) == n):
        raise _unfit(cache, "beta_shape", f"None or that of {n} numbers")
    if not (_is_array(stats, DTYPES[2:], (4, n_stats)) and stats.flags.c_contiguous):
        raise _unfit(cache, "stats", f"(4, {n_stats}) of float64, C-contiguous")
    if not (isinstance(cache.eps, float) and math.isfinite(cache.eps)):
        raise _unfit(cache, "eps", "a finite number")


def axes_fit(cache: NormCache) -> bool:
    """Whether they are those of this norm of an x of this shape."""
    try:
        return _fit(cache.norm, cache.x.shape, cache.axes)
    except (TypeError, ValueError, IndexError, ZeroDivisionError, AttributeError):
        return False


@lru_cache  # a network has a few, and asks again and again
def _fit(norm: str, shape: tuple[int, ...], axes: Axes) -> bool:
    if norm in ("layernorm", "rmsnorm"):
        return axes == axes_of_rows(shape, _axes(axes.over, len(shape)))
    channels = _axis(axes.along[0], len(shape))
    if norm == "instancenorm":
        return axes == axes_of_channels(shape, channels)
    n_groups = axes.shape[channels]
    divides = shape[channels] % n_groups == 0
    return divides and axes == axes_of_groups(shape, channels, n_groups)


def _foreign_cache(norm: str, cache: Any) -> NormCache:
    """A five-tuple (mean, inv_std, x, x_hat, gamma) that NumPy code made; x_hat is not read.

    The statistics are over the axes where theirs have length 1 and x has not.
    """
    expected = f"cache must come from {norm}_forward"
    if norm not in ("layernorm", "rmsnorm"):
        raise TypeError(f"{expected}: no other says what the groups are; got {_kind(cache)}")
    # No other sequence: the cache of batch norm is one, of the same five, and means another thing.
    if type(cache) not in (tuple, list) or len(cache) != 5:
        raise TypeError(
            f"{expected} or be a tuple (mean, inv_std, x, x_hat, gamma), got {_kind(cache)}"
        )
    mean, inv_std, x, _, gamma = cache
    x = _input(x, "cache's x")
    inv_std = _real_array(inv_std, "cache's inv_std")
    mean = _real_array(mean, "cache's mean")
    if norm == "rmsnorm":
        if mean.any():
            raise ValueError(
                "cache's mean must be 0 for RMS norm, which has none, got another: is this a cache"
                " of layer norm?"
            )
        mean = np.zeros_like(inv_std)
    for name, statistic in (("mean", mean), ("inv_std", inv_std)):
        pairs = zip(statistic.shape, x.shape, strict=False)
        if statistic.ndim != x.ndim or any(m not in (1, n) for m, n in pairs):
            raise ValueError(
                f"cache's {name} must have the shape of x, {x.shape}, but length 1 along the axes"
                f" of the statistics (keepdims=True), got {statistic.shape}"
            )
    if mean.shape != inv_std.shape:
        raise ValueError(
            f"cache's mean and inv_std must have one shape, got {mean.shape} and {inv_std.shape}"
        )
    over = tuple(d for d, n in enumerate(x.shape) if inv_std.shape[d] != n)
    axes = axes_of_rows(x.shape, over)
    shape = tuple(x.shape[d] for d in over)
    if gamma is not None:
        gamma = _real_array(gamma, "cache's gamma")
        lengths = (1,) * (x.ndim - gamma.ndim) + gamma.shape
        if gamma.shape != shape and lengths != axes.parameter_shape:
            raise ValueError(
                f"cache's gamma must have shape {shape}, that of axes {over} of x, or broadcast"
                f" against x along them, got {gamma.shape}"
            )
        shape, gamma = gamma.shape, _as_parameter(gamma)
    stats = np.full((4, inv_std.size), np.nan)
    stats[0], stats[1], stats[2] = mean.reshape(-1), 0, inv_std.reshape(-1)
    return NormCache(norm, x, gamma, shape, axes, stats, -1.0, exact_mean=False)
