from typing import Any

from ._types import Array

activations: dict[str, int]
boundaries: dict[str, int]

def are_finite(values: Array) -> bool: ...
def are_plain_statistics(mean: object, var: object, n_features: int) -> bool: ...
def backward(
    dout: Array,
    x: Array,
    gamma: Array,
    stats: Array,
    axis: int,
    eps: float,
    out: Array | None,
    frozen: bool,
    exact_mean: bool,
    n_threads: int,
    activation: int = 0,
    negative_slope: float = 0.0,
    beta: Array | None = None,
    residual: Array | None = None,
    weights: Array | None = None,
    total: float = 0.0,
    needs_dx: bool = True,
    needs_sums: bool = True,
    needs_dresidual: bool = False,
) -> tuple[Array | None, ...]: ...
def backward_dx(
    dout: Array,
    x: Array,
    gamma: Array,
    stats: Array,
    sums: Array,
    total: float,
    axis: int,
    out: Array | None,
    n_threads: int,
) -> Array: ...
def backward_sums(
    dout: Array, x: Array, stats: Array, axis: int, n_threads: int, normalized: bool = False
) -> Array: ...
def double_backward(
    ddx: Array | None,
    ddgamma: Array,
    ddbeta: Array,
    dout: Array,
    x: Array,
    gamma: Array,
    stats: Array,
    axis: int,
    eps: float,
    frozen: bool,
    exact_mean: bool,
    n_threads: int,
) -> tuple[Array, Array, Array]: ...
def forward(
    x: Array,
    gamma: Array,
    beta: Array,
    axis: int,
    eps: float,
    out: Array | None,
    stats: Array | None,
    n_threads: int,
    activation: int = 0,
    negative_slope: float = 0.0,
    residual: Array | None = None,
    weights: Array | None = None,
    total: float = 0.0,
) -> tuple[Array, Array]: ...
def given_statistics(mean: Array, var: Array, eps: float) -> Array: ...
def is_plain(x: object, gamma: object, beta: object, axis: object, out: object) -> bool: ...
def is_same(a: Array, b: Array) -> bool: ...
def is_plain_gradient(dout: object, x: Array, gamma: Array, out: object) -> bool: ...
def moments(
    x: Array, axis: int, n_threads: int, weights: Array | None = None, total: float = 0.0
) -> Array: ...
def norm_backward(
    dout: Array,
    x: Array,
    gamma: Array | None,
    stats: Array,
    over: tuple[int, ...],
    along: tuple[int, ...],
    eps: float,
    out: Array | None,
    has_mean: bool,
    exact_mean: bool,
    n_threads: int,
    needs_dx: bool,
    needs_sums: bool,
) -> tuple[Array | None, Array | None, Array | None]: ...
def norm_forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    over: tuple[int, ...],
    along: tuple[int, ...],
    eps: float,
    out: Array | None,
    has_mean: bool,
    n_threads: int,
) -> tuple[Array, Array]: ...
def plain_backward(
    dout: object,
    x: Array,
    gamma: Array,
    stats: Array,
    axis: int,
    eps: float,
    out: object,
    frozen: bool,
    exact_mean: bool,
    options: tuple[object, ...] | None,
    size: int,
) -> tuple[Array, ...] | None: ...
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
    size: int,
) -> tuple[Array, Array, Array, Array, float, bool, tuple[Any, ...] | None] | None: ...
def running_average(old: Array | None, x: Array, axis: int) -> Array: ...
def set_caches(l1: int, l2: int, l3: int) -> tuple[int, int, int]: ...
def update_average(average: Array, batch: Array, old: float, new: float) -> None: ...
