"""Arguments in, arrays that the engine can take out, or an error that names the argument.

TypeError: the wrong kind of thing (None, str, object, complex, a masked array). ValueError: the
right kind with a wrong shape, size or value. Nothing here writes to anything.
"""

import math
import operator
from collections.abc import Container, MutableMapping, Sequence
from typing import Any

import numpy as np
from numpy.exceptions import AxisError
from numpy.typing import NDArray

from ._cache import Cache, Options, feature_shape, shape_against
from ._core import core
from ._types import DTYPES, Array, Axis, Count, is_bfloat16, parameter_dtype

GRADIENTS = "dx", "dgamma", "dbeta", "dresidual"
STATISTICS = "dmean", "dvar"  # where mean and var were given
RUNNING = "running_mean", "running_var"


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of dtype {value.dtype}"
    return "None" if value is None else f"{type(value).__name__} {value!r:.60}"


def _real_array(value: Any, name: str) -> NDArray[Any]:
    """Any real array-like as an aligned, native ndarray of bool, integers or floats."""
    if type(value) is np.ndarray and value.dtype in DTYPES and value.flags.aligned:
        return value  # nothing needs to be asked
    expected = f"{name} must be an array of real numbers"
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{expected}, got a masked array, whose mask would be ignored")
    if value is None or isinstance(value, (str, bytes, dict, set)):
        raise TypeError(f"{expected}, got {_kind(value)}")
    try:
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            array = np.from_dlpack(value)
        else:
            array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError, BufferError) as error:
        # a ragged list, a tensor on another device or with a gradient
        raise TypeError(f"{expected}, got a {type(value).__name__}: {error}") from None
    if array.dtype.kind not in "biuf" and not is_bfloat16(array.dtype):
        raise TypeError(f"{expected}, got {_kind(array)}")
    if not (array.flags.aligned and array.dtype.isnative):
        array = array.astype(array.dtype.newbyteorder("="), order="K")
    return array


def _input(value: Any, name: str) -> Array:
    """x or dout: floats of 16, 32 and 64 bits as they are, integers and bool as float64."""
    array = _real_array(value, name)
    if array.dtype.kind in "biu":
        array = array.astype(np.float64, order="K")
    if array.dtype not in DTYPES and not is_bfloat16(array.dtype):
        raise TypeError(
            f"{name} must be float16, bfloat16, float32, float64, integer or bool, got"
            f" {array.dtype}"
        )
    return array


def _parameter(value: Any, name: str, n_features: int, axis: Axis) -> Array:
    """One real number per feature, as float32 or float64."""
    array = _real_array(value, name)
    if array.shape != (n_features,):
        raise ValueError(
            f"{name} must have shape ({n_features},), one value for each feature along axis {axis}"
            f" of x, got {array.shape}"
        )
    return _as_parameter(array)


def _affine(value: Any, name: str, x: Array, axis: Axis) -> Array | None:
    """gamma or beta as float32 or float64, in the shape given; None stays."""
    return None if value is None else _given(value, name, x, axis)


def _given(value: Any, name: str, x: Array, axis: Axis) -> Array:
    """One value for each feature, in a shape that broadcasts against x or (C,), or one for all."""
    array = _real_array(value, name)
    if not _is_per_feature(array.shape, x, axis):
        raise ValueError(
            f"{name} must have shape {feature_shape(x, axis)}, one value for each feature along"
            f" axis {axis} of x, or broadcast against x along it, got {array.shape}"
        )
    array = _as_parameter(array)
    return array if array.ndim < 2 else np.ascontiguousarray(array)


def _is_per_feature(shape: tuple[int, ...], x: Array, axis: Axis) -> bool:
    """Whether it says of each value to which feature it belongs."""
    if shape in ((), feature_shape(x, axis)):
        return True
    against_x = shape_against(x, axis)
    against_x = (1,) * (x.ndim - len(against_x)) + against_x
    return len(shape) <= x.ndim and (1,) * (x.ndim - len(shape)) + shape == against_x


def _as_parameter(array: NDArray[Any]) -> Array:
    """float32 and float64 as they are; half types, which float32 holds, as that."""
    if array.dtype == np.float32 or array.dtype == np.float64:
        return array
    half = array.dtype == np.float16 or is_bfloat16(array.dtype)
    return array.astype(np.float32 if half else np.float64)


def _axis(axis: Any, ndim: int) -> int:
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be an integer, got {_kind(axis)}") from None
    if not -ndim <= index < ndim:
        raise AxisError(f"axis must be in [-{ndim}, {ndim}) for x of {ndim} dimensions, got {axis}")
    return index % ndim


def _axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """The axes in ascending order; an integer is that one axis."""
    if not isinstance(axis, tuple):
        if not hasattr(axis, "__index__"):
            raise TypeError(f"axis must be an integer or a tuple of integers, got {_kind(axis)}")
        return (_axis(axis, ndim),)
    named = sorted(_axis(a, ndim) for a in axis)
    if not named or len(set(named)) < len(named):
        raise ValueError(f"axis must name one or more axes, each once, got {axis}")
    return tuple(named)


def n_features(x: Array, axis: Axis) -> int:
    return math.prod(feature_shape(x, axis))


def _output(out: Any, inputs: dict[str, Any]) -> Array | None:
    """The caller's output: like the first input in shape and dtype, apart from it or exactly it."""
    if out is None:
        return None
    name, like = next(iter(inputs.items()))
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be an ndarray or None, got {_kind(out)}")
    if out.dtype != like.dtype or not out.dtype.isnative:
        raise TypeError(f"out must have the dtype of {name}, {like.dtype}, got {out.dtype}")
    if out.shape != like.shape:
        raise ValueError(f"out must have the shape of {name}, {like.shape}, got {out.shape}")
    if not out.flags.writeable or not out.flags.aligned:
        raise ValueError("out must be writable and aligned, got a read-only or unaligned array")
    reach = 0
    steps = [(abs(s), n) for s, n in zip(out.strides, out.shape) if n > 1]
    for stride, length in sorted(steps) if out.size else ():  # empty: NumPy gives strides of 0
        if stride <= reach - (reach == 0) or stride < out.itemsize:
            raise ValueError(f"out must not overlap itself, got strides {out.strides}")
        reach += (length - 1) * stride
    output: Array = np.asarray(out)
    for name, array in inputs.items():
        if array is None or not np.may_share_memory(output, array):
            continue
        may_be_out = name in ("x", "dout", "residual")
        if not (may_be_out and core.is_same(output, array)) and np.shares_memory(output, array):
            place = f"{name} itself or apart from it" if may_be_out else f"apart from {name}"
            got = "a partial overlap" if may_be_out else "one that shares memory with it"
            raise ValueError(f"out must be {place}, got {got}")
    return output


def forward_arrays(
    x: Any, gamma: Any, beta: Any, axis: Any, out: Any
) -> tuple[Array, Array | None, Array | None, Axis, Array | None]:
    if core.is_plain(x, gamma, beta, axis, out):  # the straight road
        return x, gamma, beta, axis, out
    x, axis = array_and_axis(x, axis)
    gamma = _affine(gamma, "gamma", x, axis)
    beta = _affine(beta, "beta", x, axis)
    out = _output(out, {"x": x, "gamma": gamma})
    if out is not None and beta is not None and np.may_share_memory(out, beta):
        beta = beta.copy()  # it is read tile by tile, when there is output already
    return x, gamma, beta, axis, out


def options(
    x: Array,
    axis: Axis,
    out: Array | None,
    activation: Any,
    negative_slope: Any,
    residual: Any,
    weights: Any,
) -> Options:
    if activation is not None and not isinstance(activation, str):
        raise TypeError(f"activation must be None or a name, got {_kind(activation)}")
    if activation is not None and activation not in core.activations:
        names = ", ".join(map(repr, core.activations))
        raise ValueError(f"activation must be None or one of {names}, got {activation!r}")
    slope = finite(negative_slope, "negative_slope")
    overwritten = False
    if residual is not None:
        residual = _like(residual, "residual", x)
        if out is not None:
            _output(out, {"residual": residual})
            overwritten = activation is not None and core.is_same(out, residual)
    total: Count = 0.0
    given: Count | None = None
    if weights is not None:
        weights, total, given = element_weights(weights, x, axis)
    return Options(activation, slope, residual, weights, total, overwritten, given)


def element_weights(value: Any, x: Array, axis: Axis) -> tuple[Array | None, Count, Count]:
    """Weights in the shape and dtype of x, and their sum (None and 0 where all of a feature are
    equal); and the sum of those that were given. The sums are arrays where weights differ between
    features.

    The first are divided by a power of two near the largest of the feature. That changes no mean,
    and neither squares nor sums leave the range because of it.
    """
    w = _real_array(value, "weights").astype(np.float64)
    axes = (axis,) if isinstance(axis, int) else axis
    lengths = (1,) * (x.ndim - w.ndim) + w.shape
    differ = any(lengths[d : d + 1] != (1,) for d in axes)
    # (C,) could as well be meant for C samples: those that differ have all axes.
    fits = len(lengths) == x.ndim and (w.ndim == x.ndim or not differ)
    if not fits or any(m not in (1, n) for m, n in zip(lengths, x.shape, strict=True)):
        wanted = tuple(1 if d in axes else n for d, n in enumerate(x.shape))
        raise ValueError(
            f"weights must broadcast to {wanted}, which is x without axis {axis}, or have the shape"
            f" of x, {x.shape}, got {w.shape}"
        )
    lowest, highest = w.min(initial=math.inf), w.max(initial=0)
    if not (lowest >= 0 and highest < math.inf):
        raise ValueError(
            f"weights must be finite and at least 0, got {highest if lowest >= 0 else lowest}"
        )
    if differ:
        return _weights_of_features(w.reshape(lengths), x, axis)
    repeats = x.size // n_features(x, axis) // w.size if x.size else 0
    if highest < 1e290:  # so that no sum leaves the range; np.errstate takes 1 us
        given = float(w.sum()) * repeats
    else:
        with np.errstate(over="ignore"):
            given = float(w.sum()) * repeats
    if lowest == highest > 0 or w.size == 0:
        return None, 0.0, given
    w = np.ldexp(w, 1 - math.frexp(highest)[1]).astype(parameter_dtype(x.dtype), order="C")
    total = float(w.sum(dtype=np.float64)) * repeats
    # np.broadcast_to takes 1.5 us longer.
    strides = [0 if m == 1 else step for m, step in zip(w.shape, w.strides, strict=True)]
    whole = np.ndarray(x.shape, w.dtype, w, 0, [0] * (x.ndim - w.ndim) + strides)
    whole.flags.writeable = False
    return whole, total, given


def _weights_of_features(
    w: NDArray[np.float64], x: Array, axis: Axis
) -> tuple[Array | None, Count, NDArray[np.float64]]:
    """`element_weights` of those that differ between features."""
    axes = (axis,) if isinstance(axis, int) else axis
    others = tuple(d for d in range(x.ndim) if d not in axes)
    repeats = math.prod(x.shape[d] for d in others if w.shape[d] == 1)

    def total_of(values: Array) -> NDArray[np.float64]:
        """Of each feature, added up in pairs: its values side by side."""
        rows = np.moveaxis(values, axes, range(len(axes)))
        lengths, n_values = rows.shape[: len(axes)], math.prod(rows.shape[len(axes) :])
        rows = np.array(rows, np.float64, order="C").reshape(*lengths, n_values)
        each = np.empty(feature_shape(x, axis))
        each[...] = rows.sum(axis=-1) * repeats
        return each

    with np.errstate(over="ignore"):
        given = total_of(w)
    lowest = w.min(axis=others, keepdims=True, initial=math.inf)
    highest = w.max(axis=others, keepdims=True, initial=0)
    if x.size == 0 or ((lowest == highest).all() and (highest > 0).all()):
        return None, 0.0, given
    scaled = np.ldexp(w, 1 - np.frexp(highest)[1]).astype(parameter_dtype(x.dtype))
    total: Count = total_of(scaled).reshape(-1)
    return np.broadcast_to(scaled, x.shape), total if highest.any() else 0.0, given


def images(x: Any) -> Array:
    array = _input(x, "x")
    if array.ndim != 4:
        raise ValueError(f"x must have 4 dimensions (N, C, H, W), got shape {array.shape}")
    return array


def _number(value: Any, name: str) -> float:
    # float() would take the last four, and drop what makes them no real number
    refused = (str, bytes, bool, np.bool_, np.complexfloating, np.timedelta64)
    if isinstance(value, refused) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a real number, got {_kind(value)}")
    try:
        return float(value)
    except OverflowError:
        kind = type(value).__name__
        raise ValueError(f"{name} must be in the range of float64, got a larger {kind}") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, got {_kind(value)}") from None


def integer(value: Any, name: str) -> int:
    try:
        if not isinstance(value, (bool, np.bool)):
            return operator.index(value)  # NumPy's integers too
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer, got {_kind(value)}")


def finite(value: Any, name: str) -> float:
    number = _number(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def epsilon(value: Any, name: str = "eps") -> float:
    eps = _number(value, name)
    if not 0 <= eps < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {eps}")
    return eps


def variance(value: Any, name: str, n_features: int, axis: Axis) -> Array:
    return not_negative(_parameter(value, name, n_features, axis), name)


def not_negative(var: Array, name: str) -> Array:
    negative = np.flatnonzero(var < 0)
    if negative.size:
        raise ValueError(
            f"{name} must not be negative, got {var.flat[negative[0]]} for feature {negative[0]}"
        )
    return var


KEYS = "mode", "eps", "momentum", "ddof", *RUNNING  # of bn_param

# What other libraries call the keys of bn_param. Under these names they would be ignored.
_ALIASES = {
    "epsilon": "eps",
    "runningaverage": "running_mean",
    "runningavg": "running_mean",
    "movingmean": "running_mean",
    "movingaverage": "running_mean",
    "runningvariance": "running_var",
    "movingvar": "running_var",
    "movingvariance": "running_var",
} | {name.replace("_", ""): name for name in KEYS}


def known_keys(param: Any, name: str, known: Container[str]) -> None:
    """Refuse a key that looks like one that is known; others are ignored, as the course's are."""
    for key in param:
        if key not in known and isinstance(key, str):
            meant = _ALIASES.get(key.lower().translate({ord(c): None for c in "_- "}))
            if meant in known:
                raise ValueError(f"{name} has a key {key!r}: {meant!r} must be meant")


def settings(bn_param: Any, x: Array, axis: Axis, options: Options | None) -> tuple[Any, ...]:
    """What bn_param says: each value is checked, and read by the engine."""
    plain: tuple[Any, ...] | None = core.settings_of(bn_param, x, n_features(x, axis))
    if plain is not None:  # the straight road
        return plain
    if not isinstance(bn_param, MutableMapping):
        raise TypeError(f"bn_param must be a dict or None, got {_kind(bn_param)}")
    known_keys(bn_param, "bn_param", KEYS)
    try:
        mode = bn_param["mode"]
    except KeyError:
        raise KeyError("bn_param must have the key 'mode', 'train' or 'test'") from None
    if not isinstance(mode, str) or mode not in ("train", "test"):
        raise ValueError(f"bn_param['mode'] must be 'train' or 'test', got {mode!r}")
    checked: dict[str, Any] = {"mode": str(mode)}
    if "eps" in bn_param:
        checked["eps"] = epsilon(bn_param["eps"], "bn_param['eps']")
    if "momentum" in bn_param:
        checked["momentum"] = finite(bn_param["momentum"], "bn_param['momentum']")
    ddof = _number(bn_param.get("ddof", 0), "bn_param['ddof']")
    if ddof not in (0, 1):
        raise ValueError(f"bn_param['ddof'] must be 0 or 1, got {ddof:g}")
    for name in RUNNING:
        if bn_param.get(name) is not None:
            checked[name] = _average(bn_param[name], f"bn_param[{name!r}]", x, axis)
    if "running_var" in checked:
        not_negative(checked["running_var"], "bn_param['running_var']")
    correction: Count = 1.0
    if mode == "train" and ddof and x.size and not (options and options.without_weight):
        count: Count = x.size // n_features(x, axis)
        if options is not None and options.sum_weights is not None:
            count = options.sum_weights
        correction = unbiasing(count, int(ddof))
        few = np.ravel((correction == 0) & (np.asarray(count) > 0))
        if few.any():
            raise ValueError(
                "bn_param['ddof'] must be 0 for a batch that has no unbiased variance: it has"
                f" {np.ravel(count)[few.argmax()]:g} values for"
                f" {'each feature' if np.ndim(count) == 0 else f'feature {few.argmax()}'}"
            )
    read: tuple[Any, ...] = core.settings_of(checked, x, n_features(x, axis), 1.0)
    return *read[:5], correction


def _average(value: Any, name: str, x: Array, axis: Axis) -> Array:
    """A running average, which one number cannot be."""
    if _given(value, name, x, axis).ndim == 0:
        raise ValueError(
            f"{name} must have shape {feature_shape(x, axis)}, one value for each feature along"
            f" axis {axis} of x, got a single number"
        )
    return _each(value, name, x, axis)


def unbiasing(count: Count, ddof: int) -> Count:
    """What the biased variance is multiplied by, so that it divides by count - ddof; 0: that is
    not above 0."""
    if type(count) is not int and isinstance(count, np.ndarray):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(count > ddof, 1 + ddof / (count - ddof), 0.0)
    return 1 + ddof / (count - ddof) if count > ddof else 0.0


def needs(value: Any, out: Any, gradients: Sequence[str] = (*GRADIENTS, *STATISTICS)) -> set[str]:
    """Which gradients are wanted."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise TypeError(f"needs must be a sequence of names of gradients, got {_kind(value)}")
    names = list(value)
    for name in names:
        if name not in gradients:
            raise ValueError(f"needs must be of {', '.join(gradients)}, got {name!r}")
    if out is not None and "dx" not in names:
        raise ValueError("out is for dx, which needs does not name")
    return set(names)


def array_and_axis(x: Any, axis: Any) -> tuple[Array, Axis]:
    """x, and its feature axis, or axes if they are several."""
    x = _input(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x must have 2 or more dimensions, got {x.ndim}: shape {x.shape}")
    axes = _axes(axis, x.ndim)
    return x, axes[0] if len(axes) == 1 else axes


def gradient(dout: Any, x: Array) -> Array:
    return _like(dout, "dout", x)


def _like(value: Any, name: str, x: Array) -> Array:
    """An array in the shape of x, in its dtype."""
    array = _input(value, name)
    if array.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {x.shape}, got {array.shape}")
    converted: Array = array.astype(x.dtype, order="K", copy=False)
    return converted


def mean_and_var(mean: Any, var: Any, x: Array, axis: Axis) -> tuple[Array, Array]:
    return _each(mean, "mean", x, axis), not_negative(_each(var, "var", x, axis), "var")


def _each(value: Any, name: str, x: Array, axis: Axis) -> Array:
    """The same in one dimension."""
    array = _given(value, name, x, axis)
    n = n_features(x, axis)
    each: Array = np.broadcast_to(array, n) if array.ndim == 0 else array.reshape(n)
    return each


def frozen_parameters(
    x: Array, gamma: Any, beta: Any, axis: Axis, out: Any
) -> tuple[Array | None, Array | None, Array | None]:
    """gamma, beta and out of `normalize`."""
    gamma, beta = _affine(gamma, "gamma", x, axis), _affine(beta, "beta", x, axis)
    # gamma and beta are read tile by tile, when there is output already.
    return gamma, beta, _output(out, {"x": x, "gamma": gamma, "beta": beta})


def pieces(
    dout: Any, x: Any, mean: Any, inv_std: Any, axis: Any
) -> tuple[Array, Array, NDArray[np.float64], Axis]:
    """dout, x and axis, and stats as the engine keeps them.

    Their variance is 0, which lets the engine shift by the mean itself: eps may hide in inv_std.
    """
    x, axis = array_and_axis(x, axis)
    dout = gradient(dout, x)
    stats = np.zeros((4, n_features(x, axis)))
    stats[0] = _each(mean, "mean", x, axis)
    stats[2] = not_negative(_each(inv_std, "inv_std", x, axis), "inv_std")
    return dout, x, stats, axis


def sums(
    gamma: Any, sum_dout: Any, sum_dout_xmu: Any, x: Array, axis: Axis
) -> tuple[Array | None, Array, Array]:
    return (
        _affine(gamma, "gamma", x, axis),
        _each(sum_dout, "sum_dout", x, axis),
        _each(sum_dout_xmu, "sum_dout_xmu", x, axis),
    )


def total_count(count: Any, x: Array, axis: Axis) -> Count:
    """How many values each feature has in all parts together, of which x is one."""
    size = x.size
    if isinstance(count, np.ndarray) and count.ndim:
        counts = _real_array(count, "count").astype(np.float64, order="C")
        if counts.shape != feature_shape(x, axis):
            raise ValueError(
                f"count must be a number, or of shape {feature_shape(x, axis)}, got {counts.shape}"
            )
        wrong = np.flatnonzero(~((counts >= 0) & (counts < math.inf)))
        if wrong.size:
            raise ValueError(
                f"count must be finite and at least 0, got {counts.flat[wrong[0]]} for feature"
                f" {wrong[0]}"
            )
        return np.where(counts == 0, 1, counts).reshape(-1)  # whose sums are 0
    total = _number(count, "count")
    if not (1 <= total < math.inf or (total == 0 and size == 0)):
        raise ValueError(f"count must be finite and at least 1, got {total}")
    return total


def moments_of(
    count: Any, mean: Any, m2: Any
) -> tuple[Count, NDArray[np.float64], NDArray[np.float64]]:
    if isinstance(count, np.ndarray) and count.ndim:
        number: Count = _real_array(count, "count").astype(np.float64)
    else:
        number = _number(count, "count")
    few = np.ravel(number)
    few = few[~((few >= 0) & (few < math.inf))]
    if few.size:
        raise ValueError(f"count must be finite and at least 0, got {few[0]}")
    given = _real_array(mean, "mean")
    if given.ndim < 1:
        raise ValueError(f"mean must have one or more dimensions, got {given}")
    squares = _real_array(m2, "m2")
    if squares.shape != given.shape:
        raise ValueError(f"m2 must have the shape of mean, {given.shape}, got {squares.shape}")
    not_negative(squares, "m2")
    if np.ndim(number) and np.shape(number) != given.shape:
        raise ValueError(
            f"count must be a number, or have the shape of mean, {given.shape}, got"
            f" {np.shape(number)}"
        )
    return number, given.astype(np.float64), squares.astype(np.float64)


def _is_array(value: Any, dtypes: Container[Any], shape: tuple[int, ...]) -> bool:
    return (
        isinstance(value, np.ndarray) and value.dtype in dtypes and value.shape == shape
        and value.flags.aligned and value.dtype.isnative
    )  # fmt: skip


def _unfit(cache: Any, name: str, expected: str) -> ValueError:
    got = getattr(cache, name)
    kind = f"{got.shape} of {got.dtype}" if isinstance(got, np.ndarray) else _kind(got)
    return ValueError(
        f"cache cannot be used: its {name} must be {expected}, got {kind}; was it changed?"
    )


def _check_cache(cache: Cache) -> None:
    """Refuse a cache that does not fit itself, as one that was changed by hand: what it says is
    where the engine reads."""

    def require(holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise _unfit(cache, name, expected)

    x, axis, stats, options = cache.x, cache.axis, cache.stats, cache.options
    floats = isinstance(x, np.ndarray) and (x.dtype in DTYPES or is_bfloat16(x.dtype))
    require(floats and x.ndim >= 2 and _is_array(x, (x.dtype,), x.shape), "x", "an array of floats")
    axes = axis if isinstance(axis, tuple) and len(axis) > 1 else (axis,)
    known = all(type(d) is int and 0 <= d < x.ndim for d in axes)
    require(known and sorted(set(axes)) == list(axes), "axis", f"in [0, {x.ndim}), or of such")
    n = n_features(x, axis)
    for name in ("gamma", "beta"):
        a = getattr(cache, name)
        fits = a is None or (
            _is_array(a, DTYPES[1:], np.shape(a))
            and _is_per_feature(a.shape, x, axis)
            and (a.ndim < 2 or a.flags.c_contiguous)
        )
        require(fits, name, f"None or {feature_shape(x, axis)} of float32 or float64")
    whole = _is_array(stats, (np.float64,), (4, n)) and stats.flags.c_contiguous
    require(whole, "stats", f"(4, {n}) of float64, C-contiguous")
    require(isinstance(cache.eps, float) and math.isfinite(cache.eps), "eps", "a finite number")
    require(options is None or isinstance(options, Options), "options", "Options or None")
    if options is None:
        return
    activation, residual, weights = options.activation, options.residual, options.weights
    known = activation is None or (isinstance(activation, str) and activation in core.activations)
    require(known, "activation", "None or a name that bn_fast knows")
    require(isinstance(options.negative_slope, float), "negative_slope", "a number")
    for name, array, dtype in (
        ("residual", residual, x.dtype), ("weights", weights, parameter_dtype(x.dtype)),
    ):  # fmt: skip
        fits = array is None or _is_array(array, (dtype,), x.shape)
        require(fits, name, f"None or {x.shape} of {dtype}")
    total: Any = options.total
    fits = type(total) is float or (
        _is_array(total, (np.float64,), (n,)) and total.flags.c_contiguous
    )
    require(fits, "total", f"a number or ({n},) of float64")


def statistics_given(cache: Cache, wanted: set[str]) -> None:
    """Whether there is a gradient with respect to mean and var, where one is wanted."""
    without = cache.options is not None and cache.options.without_weight
    if wanted.intersection(STATISTICS) and (without or not cache.frozen):
        raise ValueError(
            "needs may name dmean and dvar after a forward call in test mode alone, where mean and"
            " var are given; this cache is of train mode"
        )


def backward_arrays(dout: Any, cache: Any, out: Any) -> tuple[Array, Cache, Array | None]:
    if isinstance(cache, Cache):
        _check_cache(cache)
    else:
        cache = _foreign_cache(cache)
    whole = not cache.overwritten and not cache.options
    if whole and core.is_plain_gradient(dout, cache.x, cache.gamma, out):  # the straight road
        return dout, cache, out
    if cache.overwritten:
        raise ValueError(
            f"cache cannot be used: {cache.overwritten} wrote its output over the x that it keeps"
        )
    inputs = {"x": cache.x, "gamma": cache.gamma}
    if cache.options:
        inputs["beta"] = cache.beta
    if cache.options and cache.options.activation and cache.options.residual is not None:
        if cache.options.residual_overwritten:
            raise ValueError(
                "cache cannot be used: batchnorm_forward wrote its output over the residual that it"
                " keeps"
            )
        if out is not None and np.may_share_memory(out, cache.options.residual):
            raise ValueError("out must be apart from the residual that cache keeps")
    x = cache.x
    dout = gradient(dout, x)
    return dout, cache, _output(out, {"dout": dout} | inputs)


def second_order_arrays(
    ddx: Any, ddgamma: Any, ddbeta: Any, dout: Any, cache: Any
) -> tuple[Array | None, Array, Array, Array, Cache]:
    dout, cache, _ = backward_arrays(dout, cache, None)
    if cache.options:
        raise ValueError("cache must be of a call without activation, residual and weights")
    x, axis = cache.x, cache.axis
    if ddx is not None:
        ddx = _like(ddx, "ddx", x)
    n = n_features(x, axis)
    ddgamma = _as_gradient(ddgamma, "ddgamma", cache.gamma, n)
    ddbeta = _as_gradient(ddbeta, "ddbeta", cache.beta, n)
    return ddx, ddgamma, ddbeta, dout, cache


def _as_gradient(value: Any, name: str, parameter: Array | None, n: int) -> NDArray[np.float64]:
    """The gradient of a parameter's gradient, for each feature; None: zeros."""
    if value is None:
        return np.zeros(n)
    array = _real_array(value, name)
    expected = "be None, as" if parameter is None else f"have shape {parameter.shape}, that of"
    if parameter is None or array.shape != parameter.shape:
        raise ValueError(f"{name} must {expected} {name[2:]}, got {array.shape}")
    each: NDArray[np.float64] = np.empty(n)
    each[...] = array.reshape(-1)
    return each


def _foreign_cache(cache: Any) -> Cache:
    """A five-tuple (mean, inv_var, x, x_hat, gamma) that NumPy code made.

    The feature axes are those that mean stretches over when it broadcasts against x.
    """
    try:
        mean, inv_var, x, _, gamma = cache
    except (TypeError, ValueError):
        raise TypeError(
            "cache must come from batchnorm_forward or be a tuple (mean, inv_var, x, x_hat, gamma),"
            f" got {_kind(cache)}"
        ) from None
    x = _input(x, "cache's x")
    if x.ndim < 2:
        raise ValueError(f"cache's x must have 2 or more dimensions, got shape {x.shape}")
    mean = _real_array(mean, "cache's mean")
    shape = (1,) * (x.ndim - mean.ndim) + mean.shape
    stretched = [d for d, n in enumerate(shape) if n != 1]
    if not stretched:  # one feature: the axis that has length 1 in x, the course's if it may be
        stretched = [d for d in (x.ndim - 1, 1, *range(x.ndim)) if x.shape[d] == 1][:1]
    fits = len(shape) == x.ndim and 0 < len(stretched) < x.ndim
    if not fits or any(shape[d] != x.shape[d] for d in stretched):
        raise ValueError(
            f"cache's mean must broadcast against x {x.shape} along the features' axes, got"
            f" {mean.shape}"
        )
    axis: Axis = stretched[0] if len(stretched) == 1 else tuple(stretched)
    own = feature_shape(x, axis)
    stats = np.zeros((4, math.prod(own)))
    for row, name, value in ((0, "mean", mean), (2, "inv_var", inv_var)):
        stats[row] = _flat_parameter(value, name, math.prod(own), axis)
    # The reference's cache says more, by attributes.
    frozen = bool(getattr(cache, "frozen", False))
    shape, beta_shape = getattr(cache, "parameter_shapes", (own if np.ndim(gamma) else (), own))
    gamma = _foreign_parameter(gamma, "gamma", shape, axis, math.prod(own))
    beta = None
    if beta_shape is not None:
        beta = getattr(cache, "beta", np.zeros(own))
        beta = _foreign_parameter(beta, "beta", beta_shape, axis, math.prod(own))
    options = _foreign_options(cache, x, axis)
    return Cache(x, gamma, beta, stats, axis, -1.0, frozen, options=options)


def _foreign_parameter(
    value: Any, name: str, shape: tuple[int, ...], axis: Axis, n_features: int
) -> Array | None:
    """gamma or beta of a five-tuple, in the shape that its gradient shall have."""
    if value is None:
        return None
    array = _as_parameter(_real_array(value, f"cache's {name}"))
    if array.ndim:
        array = _flat_parameter(array, name, n_features, axis)
    return array.reshape(shape)


def _foreign_options(cache: Any, x: Array, axis: Axis) -> Options | None:
    """Those of the reference's cache, which has them as attributes."""
    names = ("activation", "residual", "weights")
    activation, residual, weights = (getattr(cache, name, None) for name in names)
    if activation is None and residual is None and weights is None:
        return None
    if weights is not None:
        axes = (axis,) if isinstance(axis, int) else axis
        first = np.asarray(weights)[tuple(slice(d in axes or None) for d in range(x.ndim))]
        weights = first if (first == weights).all() else weights
    return options(x, axis, None, activation, cache.negative_slope, residual, weights)


def _flat_parameter(value: Any, name: str, n_features: int, axis: Axis) -> Array:
    """A parameter of a five-tuple, which may carry axes of length 1."""
    array = _real_array(value, f"cache's {name}")
    flat = array.reshape(-1) if array.size == n_features else array
    return _parameter(flat, f"cache's {name}", n_features, axis)
