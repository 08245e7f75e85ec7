from collections.abc import Callable, Container
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ._cache import Cache, NormCache
from ._types import Array, Count

_A = TypeVar("_A", bound=Array)

activations: dict[str, int]
boundaries: dict[str, int]

def are_plain_statistics(mean: object, var: object, n_features: int) -> bool: ...
def averaged(average: _A, batch: Array, old: float, new: float) -> _A: ...
def backward(
    dout: object,
    cache: Cache,
    out: object,
    needs: Container[str] | None,
    n_threads: int | Callable[[], int],
    small: int = -1,
) -> Any: ...  # a tuple; or None
def backward_dx(
    dout: Array, cache: Cache, sums: Array, total: Count, out: Array | None, n_threads: int
) -> Array: ...
def backward_sums(
    dout: Array,
    x: Array,
    stats: Array,
    axis: int | tuple[int, ...],
    n_threads: int,
    normalized: bool = False,
) -> Array: ...
def deviations_of_moments(rows: Array, ddof: float, eps: float) -> NDArray[np.float64]: ...
def double_backward(
    ddx: Array | None,
    ddgamma: Array,
    ddbeta: Array,
    dout: Array,
    cache: Cache,
    n_threads: int,
) -> tuple[Array, Array, Array]: ...
def forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    axis: int | tuple[int, ...],
    out: Array | None,
    settings: tuple[Any, ...] | None,
    options: tuple[Any, ...] | None,
    n_threads: int,
) -> tuple[Array, Array, float, bool]: ...
def given_statistics(mean: Array, var: Array, eps: float) -> Array: ...
def is_finite(values: Array) -> bool: ...
def is_plain(x: object, gamma: object, beta: object, axis: object, out: object) -> bool: ...
def note_wait(worked: int, waited: int) -> None: ...
def coming(n_threads: int) -> int: ...
def be_patient(patient: bool) -> None: ...
def is_same(a: Array, b: Array) -> bool: ...
def is_plain_gradient(dout: object, x: Array, gamma: Array | None, out: object) -> bool: ...
def merged_moments(a: Array, b: Array) -> NDArray[np.float64]: ...
def moments(
    x: Array,
    axis: int | tuple[int, ...],
    n_threads: int,
    weights: Array | None = None,
    total: Count = 0,
) -> Array: ...
def moments_of_statistics(
    counts: Array, stats: Array, powers: NDArray[np.int64] | None = None
) -> NDArray[np.float64]: ...
def norm_backward(
    dout: object,
    cache: NormCache,
    out: object,
    needs: Container[str] | None,
    n_threads: int | Callable[[], int],
    small: int = -1,
) -> Any: ...  # a tuple; or None
def norm_forward(
    name: str, call: tuple[Any, ...], n_threads: int, keeps: bool = True
) -> tuple[Array, Any]: ...
def plain_norm(
    name: str,
    x: object,
    gamma: object,
    beta: object,
    num_groups: object,
    axis: object,
    eps: object,
    out: object,
    keeps: bool,
    n_threads: Callable[[], int],
    small: int,
) -> tuple[Array, Any] | None: ...
def normalize(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    axis: int | tuple[int, ...],
    stats: Array,
    out: Array | None,
    n_threads: int,
) -> Array: ...
def plain_forward(
    x: object,
    gamma: object,
    beta: object,
    bn_param: object,
    axis: object,
    out: object,
    activation: object,
    negative_slope: object,
    residual: object,
    weights: object,
    weights_of: Callable[[Any, Array, Any], tuple[Array | None, Count, Count]],
    n_threads: Callable[[], int],
    small: int,
) -> (
    tuple[
        Array,
        Array | None,
        Array | None,
        tuple[Any, ...] | None,
        tuple[Array, Array, float, bool],
    ]
    | None
): ...
def pitch(n: int) -> int: ...
def set_caches(l1: int, l2: int, l3: int) -> tuple[int, int, int]: ...
def settle_moments(rows: Array) -> None: ...
def settings_of(
    bn_param: object, x: Array, n_features: int, correction: float = 0.0
) -> Any: ...  # a tuple; or None
