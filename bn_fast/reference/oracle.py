"""Batch normalization in long double, by other arithmetic, to judge all others by.

NumPy adds values that lie side by side in pairs of pairs, but over any other axis one after the
other: so each feature's values are brought side by side first, as rows (C, M).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ._arrays import Array, Axis, Gradients, _axes, _inv_std


def oracle_forward(
    x: ArrayLike,
    gamma: ArrayLike,
    beta: ArrayLike,
    *,
    eps: float = 1e-5,
    axis: Axis = 1,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[Array, Array, Array]:
    """Batch normalization in long double, to judge others by.

    Parameters
    ----------
    x : array_like, 1 or more dimensions
        Input, of any real dtype.
    gamma, beta : array_like, shape (C,)
    eps : float, default 1e-5
    axis : int or tuple of int, default 1
        The feature axis of x; ``C = x.shape[axis]``. Several: C places along them in C order.
    mean, var : array_like, shape (C,), optional
        Given statistics, as in test mode; both or none. Without them those of x, var being the
        biased variance.
    weights : array_like, optional
        Weight of each element in the statistics, broadcasting to x; the sum of each feature's is
        not 0. Without them 1.

    Returns
    -------
    out : ndarray of longdouble, shape of x
    mean, var : ndarray of longdouble, shape (C,)

    Raises
    ------
    ValueError
        If shapes do not fit, or one of mean and var is given without the other.

    Notes
    -----
    Where a long double has 64 bits (x86), for finite x: mean is right to the last digits of a long
    double; x - mean is computed with a mean of two parts, the second being what the rounding of
    the first has left, so an offset costs nothing; sums are pairwise [2]_. The largest error of
    out is below 1e-18 of its largest value up to a million rows, a hundredth of a float64
    rounding. Squares do not overflow up to values of 1e2400. A constant feature gives exactly
    beta, for eps = 0 too. Where long double is float64 (Windows, ARM Macs) it is the
    same algorithm in float64, good to judge float32 by. It takes up to 3 arrays of 16 bytes for
    each element of x; x of shape (1000000, 24) takes 2 seconds.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.
    .. [2] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample
       Variance", The American Statistician 37(3), 1983: two passes, the second corrected.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = 1e9 + np.array([[-1.0], [1.0]])
    >>> out, mean, var = reference.oracle_forward(x, [2], [5], eps=0)
    >>> out.astype(float)
    array([[3.],
           [7.]])
    >>> var.astype(float)
    array([1.])
    """
    w = _oracle_weights(weights, x, axis)
    y, used_mean, used_var, inv_std = _oracle_statistics(x, eps, axis, mean, var, w)
    y *= inv_std * _as_column(gamma, y)
    y += _as_column(beta, y)
    return _from_rows(y, x, axis), used_mean.reshape(-1), used_var.reshape(-1)


def oracle_backward(
    dout: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike,
    *,
    eps: float = 1e-5,
    axis: Axis = 1,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Gradients:
    """Gradients of batch normalization in long double, to judge others by.

    Parameters
    ----------
    dout, x : array_like, of the same shape, 1 or more dimensions
        Gradient with respect to the output, and input; of any real dtype.
    gamma : array_like, shape (C,)
    eps : float, default 1e-5
    axis : int or tuple of int, default 1
        The feature axis of x; ``C = x.shape[axis]``. Several: C places along them in C order.
    mean, var : array_like, shape (C,), optional
        Given statistics, through which no gradient passes; both or none.
    weights : array_like, optional
        As in `oracle_forward`.

    Returns
    -------
    dx : ndarray of longdouble, shape of x
    dgamma, dbeta : ndarray of longdouble, shape (C,)

    Raises
    ------
    ValueError
        If shapes do not fit, or one of mean and var is given without the other.

    Notes
    -----
    The closed form that `derivations` ends in, on statistics as exact as those of `oracle_forward`.
    For the batch's own statistics the mean is taken off dout first: the sum of x_hat is 0, so
    this changes neither dgamma nor dx, and a common offset of dout costs no digits. dx is right to
    about 1e-18 of the largest of ``gamma*r*(dout - mean of dout)``, dgamma and dbeta of the sum of
    the magnitudes of their terms.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> dx, dgamma, dbeta = reference.oracle_backward([[1.0], [0.0], [0.0]], x, [1])
    >>> dx.astype(float).round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    if np.shape(dout) != np.shape(x):
        raise ValueError(f"dout must have the shape of x, {np.shape(x)}, got {np.shape(dout)}")
    train = mean is None
    w = _oracle_weights(weights, x, axis)
    x_hat, _, _, inv_std = _oracle_statistics(x, eps, axis, mean, var, w)
    x_hat *= inv_std
    g = _as_rows(dout, axis)
    if w is not None:
        counts = (w > 0) | (np.isfinite(_as_rows(x, axis)) & np.isfinite(g))
        dbeta = g.sum(axis=1, where=counts)
        dgamma = (g * x_hat).sum(axis=1, keepdims=True, where=counts)
        if train:
            x_hat *= dgamma
            x_hat += dbeta[:, None]
            g -= np.where(w > 0, x_hat * w, 0) / w.sum(axis=1, keepdims=True)
    else:
        dbeta = g.sum(axis=1)
        if train:
            _center(g)
        dgamma = (g * x_hat).sum(axis=1, keepdims=True)
        if train:
            x_hat *= dgamma / max(x_hat.shape[1], 1)
            g -= x_hat
    g *= inv_std * _as_column(gamma, g)
    return _from_rows(g, x, axis), dgamma.reshape(-1), dbeta


def oracle_double_backward(
    ddx: ArrayLike,
    ddgamma: ArrayLike,
    ddbeta: ArrayLike,
    dout: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike,
    *,
    eps: float = 1e-5,
    axis: Axis = 1,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
) -> Gradients:
    """Gradients of the gradients of batch normalization in long double, to judge others by.

    Parameters
    ----------
    ddx, dout, x : array_like, of the same shape, 1 or more dimensions
    ddgamma, ddbeta, gamma : array_like, shape (C,)
    eps, axis, mean, var
        As for `oracle_backward`.

    Returns
    -------
    dx : ndarray of longdouble, shape of x
    dgamma : ndarray of longdouble, shape (C,)
    ddout : ndarray of longdouble, shape of x

    Notes
    -----
    The formulas of `batchnorm_double_backward`, on statistics as exact as those of
    `oracle_forward`.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x, dout = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> dx = reference.oracle_backward(dout, x, [1])[0]
    >>> dgamma = reference.oracle_double_backward(dx, [0], [0], dout, x, [1])[1]
    >>> dgamma.astype(float).round(4)
    array([0.0816])
    """
    x_hat, _, _, r = _oracle_statistics(x, eps, axis, mean, var, None)
    x_hat *= r
    u, g = _as_rows(ddx, axis), _as_rows(dout, axis)
    a, b, gamma = (_as_column(values, x_hat) for values in (ddgamma, ddbeta, gamma))
    m = max(x_hat.shape[1], 1)
    if mean is not None:
        dgamma = r * (u * g).sum(axis=1, keepdims=True)
        results = a * r * g, gamma * r * u + a * x_hat + b
    else:
        _center(u)
        _center(g)
        along_u, along_g, product = (
            pair.sum(axis=1, keepdims=True) / m for pair in (u * x_hat, g * x_hat, u * g)
        )
        dgamma = r * m * (product - along_u * along_g)
        w = a - gamma * r * along_u
        slope = gamma * r * (product - 3 * along_u * along_g) + a * along_g
        dx = r * w * g - gamma * r**2 * along_g * u - r * x_hat * slope
        results = dx, gamma * r * u + w * x_hat + b
    dx, ddout = (_from_rows(rows, x, axis) for rows in results)
    return dx, dgamma.reshape(-1), ddout


def _oracle_statistics(
    x: ArrayLike,
    eps: float,
    axis: Axis,
    mean: ArrayLike | None,
    var: ArrayLike | None,
    w: Array | None,
) -> tuple[Array, Array, Array, Array]:
    """x - mean as rows; mean, var and 1/sqrt(var + eps) as columns."""
    rows = _as_rows(x, axis)
    if mean is None and var is None:
        batch_mean = _center(rows, w)
        batch_var = _oracle_mean(rows * rows, w)
        return rows, batch_mean, batch_var, _inv_std(batch_var, eps, True)
    if mean is None or var is None:
        raise ValueError("mean and var must both be given, or neither")
    given_mean, given_var = _as_column(mean, rows), _as_column(var, rows)
    rows -= given_mean
    return rows, given_mean, given_var, _inv_std(given_var, eps, False)


def _oracle_weights(weights: ArrayLike | None, x: ArrayLike, axis: Axis) -> Array | None:
    """The weights as rows (C, M)."""
    return None if weights is None else _as_rows(np.broadcast_to(weights, np.shape(x)), axis)


def _oracle_mean(rows: Array, w: Array | None) -> Array:
    """The mean of each row as a column; elements of weight 0 may be NaN."""
    if w is None:
        mean: Array = rows.sum(axis=1, keepdims=True) / max(rows.shape[1], 1)
        return mean
    mean = (rows * w).sum(axis=1, keepdims=True, where=w > 0) / w.sum(axis=1, keepdims=True)
    return mean


def _center(rows: Array, w: Array | None = None) -> Array:
    """Take its mean off each row, in place, and return the means as a column.

    Twice: what the rounding of the first mean leaves is itself a mean of few bits, whose second
    sum is right to the last digit, and exact for a constant row.
    """
    mean = _oracle_mean(rows, w)
    rows -= mean
    rest = _oracle_mean(rows, w)
    rows -= rest
    mean += rest
    return mean


def _as_rows(a: ArrayLike, axis: Axis) -> Array:
    """A copy in long double of shape (C, M), the values of each feature side by side."""
    array = np.asarray(a)
    axes = _axes(axis, array.ndim)
    moved = np.moveaxis(array, axes, range(len(axes)))
    rows = np.array(moved, np.longdouble, order="C")
    n = len(axes)
    return rows.reshape(math.prod(moved.shape[:n]), math.prod(moved.shape[n:]))


def _from_rows(rows: Array, x: ArrayLike, axis: Axis) -> Array:
    """Undo `_as_rows`: the shape of x."""
    axes = _axes(axis, np.ndim(x))
    shape = np.moveaxis(np.asarray(x), axes, range(len(axes))).shape
    return np.moveaxis(rows.reshape(shape), range(len(axes)), axes)


def _as_column(parameter: ArrayLike, rows: Array) -> Array:
    return np.asarray(parameter, np.longdouble).reshape(len(rows), 1)
