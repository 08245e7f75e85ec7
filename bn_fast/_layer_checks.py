"""The layer's arguments in, what it can keep out, or an error that names the argument."""

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._checks import _input, _number, _parameter
from ._types import Array


def integer(value: Any, name: str) -> int:
    if not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(value)  # NumPy's integers too
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, got {value!r:.60}")


def n_features(value: Any) -> int:
    number = integer(value, "num_features")
    if number < 1:
        raise ValueError(f"num_features must be at least 1, got {number}")
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


def momentum(value: Any) -> float | None:
    if value is None:
        return None
    weight = _number(value, "momentum")
    if not 0 <= weight <= 1:
        raise ValueError(f"momentum must be None or in [0, 1], got {weight}")
    return weight


def dtype(value: Any) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(value)
    if value is None or found not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"dtype must be float32 or float64, got {value!r:.60}")
    return found


def count(value: Any, name: str) -> int:
    """A number of batches, also as the array that `state_dict` makes of it."""
    array = np.asarray(value)
    if array.shape != () or array.dtype.kind not in "iu" or array < 0:
        raise ValueError(f"{name} must be one integer of at least 0, got {value!r:.60}")
    return int(array)


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


def weights(weight: Any, bias: Any, num_features: int) -> tuple[Array, NDArray[np.float64]]:
    """A layer's weight with one row for each feature, and its bias, zeros for None."""
    weight = _input(weight, "weight")
    if weight.ndim < 2 or weight.shape[0] != num_features:
        raise ValueError(
            f"weight must have shape ({num_features}, in, ...), one row for each of the layer's"
            f" features, got {weight.shape}"
        )
    if bias is None:
        return weight, np.zeros(num_features)
    return weight, _parameter(bias, "bias", num_features, 0).astype(np.float64)
