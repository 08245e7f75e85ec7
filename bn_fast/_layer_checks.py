"""The layer's arguments in, what it can keep out, or an error that names the argument."""

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from ._checks import _input, _number, _parameter, integer
from ._types import Array

T = TypeVar("T")

MOST_BATCHES = np.iinfo(np.int64).max  # of which `state_dict` makes an array


class Setting(Generic[T]):
    """An attribute that is checked by whoever sets it: the constructor, a user, a pickle.

    It is kept under its name with an underscore, where the layer reads it at no cost.
    """

    def __init__(self, check: Callable[[Any, str], T], fixed: bool = False) -> None:
        self.check = check
        self.fixed = fixed  # once the constructor has set it: arrays were made after it

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.slot = name, f"_{name}"

    @overload
    def __get__(self, layer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, layer: object, owner: type) -> T: ...
    def __get__(self, layer: object | None, owner: type) -> Self | T:
        if layer is None:
            return self
        value: T = getattr(layer, self.slot)
        return value

    def __set__(self, layer: object, value: Any) -> None:
        if self.fixed and hasattr(layer, self.slot):
            raise AttributeError(f"{self.name} cannot be set: it is that of the layer's arrays")
        setattr(layer, self.slot, self.check(value, self.name))


def n_features(value: Any, name: str) -> int:
    number = integer(value, name)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    if number > np.iinfo(np.intp).max:
        raise ValueError(f"{name} must be the size of an array, got {number}")
    return number


def flag(value: Any, name: str) -> bool:
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):  # 'test' would be true
        raise TypeError(f"{name} must be True or False, got {value!r:.60}")
    return bool(value)


def choice(value: Any, name: str, choices: tuple[Any, ...]) -> Any:
    for known in choices:
        if type(value) is type(known) and value == known:
            return known
    raise ValueError(f"{name} must be one of {choices}, got {value!r:.60}")


def momentum(value: Any, name: str) -> float | None:
    if value is None:
        return None
    weight = _number(value, name)
    if not 0 <= weight <= 1:
        raise ValueError(f"{name} must be None or in [0, 1], got {weight}")
    return weight


def dtype(value: Any, name: str) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(value)
    if value is None or found not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"{name} must be float32 or float64, got {value!r:.60}")
    return found


def count(value: Any, name: str) -> int:
    """A number of batches, also as the array that `state_dict` makes of it."""
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be one integer of at least 0, got {value!r:.60}")
    number = integer(value, name)
    if not 0 <= number <= MOST_BATCHES:
        raise ValueError(
            f"{name} must be one integer of at least 0 and at most {MOST_BATCHES}, got {number}"
        )
    return number


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """In another dtype, without NumPy's warnings: whoever asks looks at what was lost."""
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(dtype, copy=False)


def kept(values: Array, dtype: np.dtype[Any], name: str) -> Array:
    """Values as `dtype` holds them, none of them turned to infinity."""
    fitted = rounded(values, dtype)
    if fitted is not values:
        check_kept(values, fitted, name)
    return fitted


def check_kept(values: Array, fitted: Array, name: str) -> None:
    """Refuse what was finite and became infinite or NaN by being rounded to a dtype."""
    lost = np.isfinite(values) & ~np.isfinite(fitted)
    refuse_lost(lost, values, fitted, name, fitted.dtype)


def refuse_lost(
    lost: NDArray[np.bool_], values: Array, fitted: Array, name: str, dtype: Any
) -> None:
    """ValueError for the first of the values that a dtype does not hold."""
    if lost.any():
        index = tuple(map(int, np.argwhere(lost)[0]))
        at = f" at {index[0] if len(index) == 1 else index}" if index else ""
        raise ValueError(
            f"{name} must fit {dtype}, got {values[index]}{at}, which would be {fitted[index]}"
        )


def features(x: Any, num_features: int, axis: int) -> Array:
    """x as an array of 2 or more dimensions with as many features as the layer."""
    array = _input(x, "x")
    if not (array.ndim >= 2 and -array.ndim <= axis < array.ndim):
        raise ValueError(
            f"x must have 2 or more dimensions, one of them axis {axis}, got shape {array.shape}"
        )
    if array.shape[axis] != num_features:
        raise ValueError(
            f"x must have num_features={num_features} features along axis {axis}, got"
            f" {array.shape[axis]}: shape {array.shape}"
        )
    return array


def weights(
    weight: Any, bias: Any, num_features: int, axis: Any, groups: Any
) -> tuple[Array, tuple[int, ...], NDArray[np.float64]]:
    """A layer's weight, the axes over which its output channels stretch, and its bias, zeros for
    None.

    Those axes are one; two, and the first axis of weight is cut by groups, where every group has
    its own output channels along axis 1, as in PyTorch's transposed convolutions.
    """
    weight = _input(weight, "weight")
    axis, groups = integer(axis, "axis"), integer(groups, "groups")
    if groups < 1 or num_features % groups:
        raise ValueError(f"groups must divide num_features={num_features}, got {groups}")
    if weight.ndim < 2 or not -weight.ndim <= axis < weight.ndim:
        raise ValueError(
            f"weight must have 2 or more dimensions, one of them axis={axis}, got shape"
            f" {weight.shape}"
        )
    at = axis % weight.ndim
    cut = at == 1 and groups > 1
    n_along = num_features // groups if cut else num_features
    if weight.shape[at] != n_along:
        others = [d for d, n in enumerate(weight.shape) if n == num_features]
        hint = f": its output channels may be axis={others[0]}" if others else ""
        raise ValueError(
            f"weight must have {n_along} output channels along axis={axis} (num_features="
            f"{num_features}, groups={groups}), got shape {weight.shape}{hint}"
        )
    if bias is None:
        offset = np.zeros(num_features)
    else:
        offset = _parameter(bias, "bias", num_features, 0).astype(np.float64)
    if not cut:
        return weight, (at,), offset
    if weight.shape[0] % groups:
        raise ValueError(
            f"weight must have input channels along axis 0 that groups={groups} divides, got shape"
            f" {weight.shape}"
        )
    return weight.reshape(groups, -1, *weight.shape[1:]), (0, 2), offset
