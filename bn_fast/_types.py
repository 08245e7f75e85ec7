"""Names for the types in the public signatures."""

from collections.abc import MutableMapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# In the public signatures `help` shows these by name: their modules leave annotations unevaluated.
Array = NDArray[np.floating[Any]]
# An array that may be None, for which a type checker need not see a test before each use.
MaybeArray = Array | Any
BNParam = MutableMapping[str, Any]
# M, or the sum of weights; an array where these differ between features.
Count = float | Array
Axis = int | tuple[int, ...]  # a tuple: several feature axes

DTYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """ml_dtypes' type, by its name: whoever has such an array has imported ml_dtypes."""
    return dtype.itemsize == 2 and dtype.type.__name__ == "bfloat16"


def parameter_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """That of parameters and statistics beside an x of `dtype`: float32 for half types."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype
