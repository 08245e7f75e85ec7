"""Batch normalization in pieces, for data that is not in one array: check, one call down, return.

A batch in several parts is normalized in three steps, and so is its gradient found:

    each part                       over all parts             each part
    moments(x)                      sum                        normalize(x, mean, var, ...)
    backward_reduce(dout, x, ...)   sum of both sums           backward_apply(dout, x, ...)
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _checks
from ._core import core
from ._moments import Moments, moments_beyond
from ._types import Array
from .functional import n_threads_for

__all__ = ["Moments", "backward_apply", "backward_reduce", "moments", "normalize"]


def moments(x: ArrayLike, *, axis: int = 1, weights: ArrayLike | None = None) -> Moments:
    """Count, mean and sum of squared deviations of each feature, in one pass.

    Parameters
    ----------
    x : array_like, 2 or more dimensions
        Of any dtype that `batchnorm_forward` takes and any strides; it may be empty.
    axis : int, default 1
        The feature axis; negative counts from the end.
    weights : array_like, optional
        Weight of each element: bool (a mask), or real and at least 0. Broadcasts to x with length 1
        along `axis`. Integers say how often an element occurs.

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
    count = float(x.size // x.shape[axis]) if x.size else 0.0
    total = 0.0
    if weights is not None:
        weights, total, count = _checks.element_weights(weights, x, axis)
        if not count < math.inf:
            raise ValueError("weights must have a finite sum, got one above the largest float64")
    if count == 0:
        nothing = np.zeros(x.shape[axis])
        return Moments(0, nothing, nothing)
    stats = core.moments(x, axis, n_threads_for(x), weights, total)
    with np.errstate(over="ignore"):
        return moments_beyond(count, stats[0], stats[3] * count, stats[1])


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Normalize with statistics that are given: ``gamma * (x - mean) / sqrt(var + eps) + beta``.

    Parameters
    ----------
    x : array_like, 2 or more dimensions
        As for `batchnorm_forward`; C features along `axis`.
    mean, var : array_like, shape (C,)
        Any real dtype; var at least 0.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift; None: 1 and 0.
    eps : float, default 1e-5
        Added to var; at least 0.
    axis : int, default 1
        The feature axis; negative counts from the end.
    out : ndarray, optional
        Where to write the result: shape and dtype of the result, writable; it may be x itself.

    Returns
    -------
    out : ndarray
        Shape and dtype of x; float64 for integers and bool.

    Raises
    ------
    TypeError
        If an argument is not real-valued.
    ValueError
        If a shape, size or value is wrong, or `out` overlaps x in part, gamma or beta.
    MemoryError
        If `out` or the scratch memory cannot be had.

    See Also
    --------
    moments, batchnorm_forward

    Notes
    -----
    The twin in NumPy is the formula above, in the dtype of x. As in NumPy a feature with
    ``var + eps = 0`` becomes NaN where x is the mean, infinite elsewhere. A mean in float64 has 53
    bits: where it is 1e9 standard deviations from 0, they say no more than 7 digits of the result.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import moments, normalize
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> m = moments(x)
    >>> normalize(x, m.mean, m.var(), eps=0)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    x, mean, var, gamma, beta, axis, out = _checks.frozen_arrays(
        x, mean, var, gamma, beta, axis, out
    )
    eps = _checks.epsilon(eps)
    return core.forward(x, gamma, beta, axis, eps, out, mean, var, n_threads_for(x))[0]


def backward_reduce(
    dout: ArrayLike, x: ArrayLike, mean: ArrayLike, inv_std: ArrayLike, *, axis: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two sums of the backward pass over one part of a batch; those of all parts add up.

    Parameters
    ----------
    dout, x : array_like, of the same shape, 2 or more dimensions
        Gradient with respect to the output, and input.
    mean, inv_std : array_like, shape (C,)
        Those of the whole batch, of any real dtype; inv_std is 1/sqrt(var + eps). It does
        not enter the sums; where they leave the range it says how to scale.
    axis : int, default 1
        The feature axis; negative counts from the end.

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
    dout, x, stats, axis = _checks.pieces(dout, x, mean, inv_std, axis)
    sum_dout_xmu, sum_dout = core.backward_sums(dout, x, stats, axis, n_threads_for(x))
    return sum_dout, sum_dout_xmu


def backward_apply(
    dout: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike,
    sum_dout: ArrayLike,
    sum_dout_xmu: ArrayLike,
    count: float,
    *,
    axis: int = 1,
    out: Array | None = None,
) -> Array:
    r"""Gradient dx of one part of a batch, from the sums of `backward_reduce` over all parts.

    Parameters
    ----------
    dout, x : array_like, of the same shape, 2 or more dimensions
        Gradient with respect to the output, and input, of this part.
    mean, inv_std : array_like, shape (C,)
        Those of the whole batch, as given to `backward_reduce`.
    gamma : array_like, shape (C,)
        Scale of each feature.
    sum_dout, sum_dout_xmu : array_like, shape (C,)
        Sums over the whole batch.
    count : float
        M, how many values each feature has in the whole batch; at least 1, or 0 if there are none.
    axis : int, default 1
        The feature axis; negative counts from the end.
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
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import backward_apply, backward_reduce, moments
    >>> x, dout = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> m = moments(x)
    >>> inv_std = 1 / np.sqrt(m.var() + 1e-5)
    >>> sums = backward_reduce(dout, x, m.mean, inv_std)
    >>> backward_apply(dout, x, m.mean, inv_std, [1.0], *sums, m.count).round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    dout, x, stats, axis = _checks.pieces(dout, x, mean, inv_std, axis)
    gamma, sum_dout, sum_dout_xmu = _checks.sums(gamma, sum_dout, sum_dout_xmu, x, axis)
    total = _checks.total_count(count, x.size)
    out = _checks.output(out, dout, x, gamma)
    with np.errstate(all="ignore"):
        sums = np.array([stats[2] * sum_dout_xmu, sum_dout], np.float64)
    return core.backward_dx(dout, x, gamma, stats, sums, total, axis, out, n_threads_for(x))
