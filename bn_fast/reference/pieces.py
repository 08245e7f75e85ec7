"""Batch normalization in pieces: statistics and gradients of a batch in several parts.

Twins of the functions of the same names of `bn_fast`, in float64.

References
----------
.. [1] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance:
   Analysis and Recommendations", The American Statistician 37(3), 1983.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ._arrays import (
    Array,
    Axis,
    _against,
    _axes,
    _count_of,
    _deliver,
    _feature_shapes,
    _float_array,
    _sum,
    _weights,
)
from .batch import batchnorm_forward


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
