"""Batch normalization in pieces, for data that is not in one array: check, one call down, return.

A batch in several parts is normalized in three steps, and so is its gradient found:

    each part                       over all parts             each part
    moments(x)                      sum                        normalize(x, moments, ...)
    backward_reduce(dout, x, ...)   sum of both sums           backward_apply(dout, x, ...)
"""

from __future__ import annotations

import math
from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _checks
from ._cache import Cache, feature_shape
from ._core import core
from ._moments import Moments, from_statistics, mean_low, statistics
from ._types import Array, Axis, Count
from .functional import n_threads_for

__all__ = ["Moments", "backward_apply", "backward_reduce", "moments", "normalize"]

# What deviations are multiplied by, as a power of two, where their inverse would leave the range.
_TINY_POWER = 600


def moments(x: ArrayLike, *, axis: Axis = 1, weights: ArrayLike | None = None) -> Moments:
    """Count, mean and sum of squared deviations of each feature, in one pass.

    Parameters
    ----------
    x : array_like, 2 or more dimensions
        Of any dtype that `batchnorm_forward` takes and any strides; it may be empty.
    axis : int or tuple of int, default 1
        The feature axis; negative counts from the end. Several: see `batchnorm_forward`.
    weights : array_like, optional
        Weight of each element: bool (a mask), or real and at least 0. Broadcasts to x; with length
        1 along `axis`, or not, as ``~np.isnan(x)``: then ``count`` is an array, of each feature's
        sum. Integers say how often an element occurs.

    Returns
    -------
    Moments
        ``count`` and, each of shape (C,), ``mean`` and ``m2``, in float64 whatever x is. Those of
        two parts add up: ``moments(a) + moments(b)``.

    Raises
    ------
    TypeError
        If x is not real-valued.
    ValueError
        If x has fewer than 2 dimensions, or the weights have a wrong shape or value or no finite
        sum.
    MemoryError
        If the scratch memory cannot be had.

    See Also
    --------
    Moments, normalize

    Notes
    -----
    For each feature, over its M values, ``mean = sum x / M`` and ``m2 = sum (x - mean)**2``; the
    sums are shifted and compensated, so a large mean costs no digits. Their roundings are those of
    x's dtype, as in `batchnorm_forward`. With weights, whose sum is W, ``count = W``,
    ``mean = sum w x / W`` and ``m2 = sum w (x - mean)**2``; an element of weight 0 has no
    influence, not even as NaN, and where W = 0 there are no values.

    References
    ----------
    .. [1] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance:
       Analysis and Recommendations", The American Statistician 37(3), 1983.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import moments
    >>> x = 1e9 + np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]])
    >>> m = moments(x)
    >>> m.mean - 1e9
    array([2., 4.])
    >>> m.var(ddof=1)
    array([ 4., 13.])
    >>> moments(x, weights=[[2], [1], [0]])  # the first row twice, the second once
    Moments(count=3, mean=[1.e+09 1.e+09], m2=[2.6667 2.6667])
    """
    x, axis = _checks.array_and_axis(x, axis)
    shape = feature_shape(x, axis)
    count: Count = float(x.size // math.prod(shape)) if x.size else 0.0
    total: Count = 0.0
    if weights is not None:
        weights, total, count = _checks.element_weights(weights, x, axis)
        if not np.all(count < math.inf):
            raise ValueError("weights must have a finite sum, got one above the largest float64")
    if not np.any(count):
        nothing = np.zeros(shape)
        return Moments(count, nothing, nothing)
    stats = core.moments(x, axis, n_threads_for(x), weights, total)
    tiny = np.flatnonzero(np.isinf(stats[2]))
    if not tiny.size:
        return from_statistics(count, stats.reshape(4, *shape))
    # Deviations below 6e-309, whose inverse would say how large they are.
    part = np.ldexp(_features(x, axis, tiny), _TINY_POWER)
    part_weights = None if weights is None else _features(weights, axis, tiny)
    along = axis if isinstance(axis, int) else axis[0]
    part_total = total[tiny] if isinstance(total, np.ndarray) else total
    again = core.moments(part, along, n_threads_for(part), part_weights, part_total)
    again[:2] = np.ldexp(again[:2], -_TINY_POWER)
    stats[:, tiny] = again
    powers = np.zeros(stats.shape[1], np.int64)
    powers[tiny] = _TINY_POWER
    return from_statistics(count, stats.reshape(4, *shape), powers.reshape(shape))


def _features(x: Array, axis: Axis, which: NDArray[np.intp]) -> Array:
    """Some features, along one axis."""
    if isinstance(axis, int):
        return x.take(which, axis)
    first = np.moveaxis(x, axis, range(len(axis)))
    found = first[np.unravel_index(which, feature_shape(x, axis))]
    return np.ascontiguousarray(np.moveaxis(found, 0, axis[0]))


@overload
def normalize(
    x: ArrayLike,
    moments: Moments | Literal[0],  # to a type checker sum() may be 0
    /,
    *,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    eps: float = 1e-5,
    axis: Axis = 1,
    out: Array | None = None,
) -> Array: ...
@overload
def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: Axis = 1,
    out: Array | None = None,
) -> Array: ...
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
    """Normalize with statistics that are given: ``gamma * (x - mean) / sqrt(var + eps) + beta``.

    ``normalize(x, moments, gamma=..., beta=...)`` or ``normalize(x, mean, var, gamma, beta)``.

    Parameters
    ----------
    x : array_like, 2 or more dimensions
        As for `batchnorm_forward`; C features along `axis`.
    mean : Moments or array_like, shape (C,)
        `Moments`, whose mean and variance are used with all their digits, to whatever range; or the
        mean alone.
    var : array_like, shape (C,)
        Any real dtype, at least 0. Left out after a Moments.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift; None: 1 and 0. Named after a Moments. Other shapes as in
        `batchnorm_forward`; mean and var may have them too.
    eps : float, default 1e-5
        Added to the variance; at least 0.
    axis : int or tuple of int, default 1
        The feature axis; negative counts from the end. Several: see `batchnorm_forward`.
    out : ndarray, optional
        Where to write the result: shape and dtype of the result, writable; it may be x itself.

    Returns
    -------
    out : ndarray
        Shape and dtype of x; float64 for integers and bool.

    Raises
    ------
    TypeError
        If an argument is not real-valued, or var is given beside a Moments.
    ValueError
        If a shape, size or value is wrong, or `out` overlaps x in part, gamma or beta.
    MemoryError
        If `out` or the scratch memory cannot be had.

    See Also
    --------
    moments, batchnorm_forward

    Notes
    -----
    With its own moments x becomes what `batchnorm_forward` makes of it: a feature with
    ``var + eps = 0`` becomes beta. A mean in float64 says less: where it is 1e9 standard deviations
    from 0, no more than 7 digits of the result. With mean and var the twin in NumPy is the formula
    above, in the dtype of x, and as in NumPy a feature with ``var + eps = 0`` becomes NaN where x
    is the mean, infinite elsewhere.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import moments, normalize
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> normalize(x, moments(x), eps=0)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> normalize(x, [2, 20], [1, 100], eps=0)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    x, axis = _checks.array_and_axis(x, axis)
    eps = _checks.epsilon(eps)
    if isinstance(mean, Moments):
        if var is not None:
            raise TypeError("var must be left out where mean is a Moments (name gamma and beta)")
        stats = statistics(_features_fit(mean, x, axis), eps)
    else:
        stats = core.given_statistics(*_checks.mean_and_var(mean, var, x, axis), eps)
    return normalize_by(stats, x, gamma, beta, axis, out)


def normalize_by(
    stats: Array,
    x: Array,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    axis: Axis,
    out: Array | None,
) -> Array:
    """Normalize by statistics as a cache keeps them: mean, its low part, inv_std, var."""
    gamma, beta, out = _checks.frozen_parameters(x, gamma, beta, axis, out)
    return core.normalize(x, gamma, beta, axis, stats, out, n_threads_for(x))


def _given(
    dout: ArrayLike, x: ArrayLike, mean: Moments | ArrayLike, inv_std: ArrayLike, axis: Axis
) -> tuple[Array, Array, Array, Axis]:
    """dout, x and axis, checked, and the statistics of both backward pieces."""
    if not isinstance(mean, Moments):
        return _checks.pieces(dout, x, mean, inv_std, axis)
    m = mean
    dout, x, stats, axis = _checks.pieces(dout, x, m.mean, inv_std, axis)
    stats[1] = mean_low(m).reshape(-1)
    return dout, x, stats, axis


def _features_fit(m: Moments, x: Array, axis: Axis) -> Moments:
    shape = feature_shape(x, axis)
    if m.mean.shape != shape:
        expected, got = (str(s[0] if len(s) == 1 else s) for s in (shape, m.mean.shape))
        raise ValueError(
            f"moments must have {expected} features, as x along axis {axis}, got {got}"
        )
    return m


def backward_reduce(
    dout: ArrayLike,
    x: ArrayLike,
    mean: Moments | ArrayLike,
    inv_std: ArrayLike,
    *,
    axis: Axis = 1,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two sums of the backward pass over one part of a batch; those of all parts add up.

    Parameters
    ----------
    dout, x : array_like, of the same shape, 2 or more dimensions
        Gradient with respect to the output, and input.
    mean : Moments or array_like, shape (C,)
        `Moments` of the whole batch, whose mean has twice the digits of float64, or its mean alone,
        of any real dtype: the sums are then exact about that value, not about the true mean.
    inv_std : array_like, shape (C,)
        ``1/sqrt(var + eps)`` of the whole batch, of any real dtype. It does not enter the sums;
        where they leave the range it says how to scale.
    axis : int or tuple of int, default 1
        The feature axis; negative counts from the end. Several: see `batchnorm_forward`.

    Returns
    -------
    sum_dout, sum_dout_xmu : ndarray, float64, shape (C,)
        ``sum dout`` and ``sum dout * (x - mean)``; 0 for an empty part. Of the whole batch they
        are dbeta and dgamma / inv_std.

    Raises
    ------
    TypeError
        If an argument is not real-valued.
    ValueError
        If a shape or value is wrong.
    MemoryError
        If the scratch memory cannot be had.

    See Also
    --------
    backward_apply

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import backward_reduce
    >>> x, dout = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [2.0]])
    >>> backward_reduce(dout, x, [3.0], [0.5])
    (array([3.]), array([4.]))
    """
    dout, x, stats, axis = _given(dout, x, mean, inv_std, axis)
    sum_dout_xmu, sum_dout = core.backward_sums(dout, x, stats, axis, n_threads_for(x))
    shape = feature_shape(x, axis)
    return sum_dout.reshape(shape), sum_dout_xmu.reshape(shape)


def backward_apply(
    dout: ArrayLike,
    x: ArrayLike,
    mean: Moments | ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None,
    sum_dout: ArrayLike,
    sum_dout_xmu: ArrayLike,
    count: Count,
    *,
    axis: Axis = 1,
    out: Array | None = None,
) -> Array:
    r"""Gradient dx of one part of a batch, from the sums of `backward_reduce` over all parts.

    Parameters
    ----------
    dout, x : array_like, of the same shape, 2 or more dimensions
        Gradient with respect to the output, and input, of this part.
    mean : Moments or array_like, shape (C,)
    inv_std : array_like, shape (C,)
        Those of the whole batch, as given to `backward_reduce`.
    gamma : array_like, shape (C,), or None
        Scale of each feature; None: 1.
    sum_dout, sum_dout_xmu : array_like, shape (C,)
        Sums over the whole batch.
    count : float, or ndarray of shape (C,)
        M, how many values each feature has in the whole batch; at least 1, or 0 if there are none.
    axis : int or tuple of int, default 1
        The feature axis; negative counts from the end. Several: see `batchnorm_forward`.
    out : ndarray, optional
        Where to write dx: shape and dtype of x, writable; it may be dout or x itself.

    Returns
    -------
    dx : ndarray, shape and dtype of x

    Raises
    ------
    TypeError
        If an argument is not real-valued.
    ValueError
        If a shape or value is wrong, or `out` overlaps dout or x in part, or
        gamma.
    MemoryError
        If `out` or the scratch memory cannot be had.

    See Also
    --------
    backward_reduce, batchnorm_backward

    Notes
    -----
    With r = inv_std, S = sum_dout, P = sum_dout_xmu,

    .. math:: dx = \gamma r \left( dy - \frac{S}{M} - (x - \mu) r^2 \frac{P}{M} \right)

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import backward_apply, backward_reduce, moments
    >>> x, dout = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> m = moments(x)
    >>> inv_std = 1 / np.sqrt(m.var() + 1e-5)
    >>> sums = backward_reduce(dout, x, m, inv_std)
    >>> backward_apply(dout, x, m, inv_std, [1.0], *sums, m.count).round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    dout, x, stats, axis = _given(dout, x, mean, inv_std, axis)
    gamma, sum_dout, sum_dout_xmu = _checks.sums(gamma, sum_dout, sum_dout_xmu, x, axis)
    total = _checks.total_count(count, x, axis)
    out = _checks._output(out, {"dout": dout, "x": x, "gamma": gamma})
    with np.errstate(all="ignore"):
        sums = np.array([stats[2] * sum_dout_xmu, sum_dout], np.float64)
    cache = Cache(x, gamma, None, stats, axis, -1.0)
    return core.backward_dx(dout, cache, sums, total, out, n_threads_for(x))
