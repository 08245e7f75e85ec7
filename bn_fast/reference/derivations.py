r"""The backward pass of batch normalization, once for each of three derivations.

They go by the names three pathways, column-wise and element-wise. They write
r = 1/sqrt(var + eps), x_hat = (x - mean) * r, M for the number of values for each feature, and
dout, dgamma, dbeta, dx for the gradients of the loss with respect to out, gamma, beta and x. All
end in the same closed form::

    dbeta = sum dout      dgamma = sum dout*x_hat
    dx = gamma*r * (dout - dbeta/M - x_hat*dgamma/M)

References
----------
.. [1] Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
   Reducing Internal Covariate Shift", ICML 2015, https://arxiv.org/abs/1502.03167.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._arrays import (
    Array,
    Gradients,
    _as_given,
    _computable,
    _count,
    _float_array,
    _parameter_shapes,
    _shaped,
    _sum,
)
from ._caches import _through_activation


class _Prepared(NamedTuple):
    """A cache in order for the derivations.

    share is what an element has in its mean: 1/M, or its weight by the sum of weights. counts says
    which elements the sums of the backward pass are over.
    """

    mean: Array
    inv_std: Array
    x: Array
    x_hat: Array
    gamma: Array
    share: Array | float
    counts: NDArray[np.bool_] | bool


class _Backward(Protocol):
    def __call__(self, dout: ArrayLike, cache: Sequence[Any]) -> Gradients: ...


def _derivation(train_mode: Callable[[Array, _Prepared], Gradients]) -> _Backward:
    """A backward function from a derivation: arguments put in order, and test mode answered.

    With frozen statistics out = gamma*r*x + constant, so there is nothing to derive.
    """

    def backward(dout: ArrayLike, cache: Sequence[Any]) -> Gradients:
        mean, inv_var, x, x_hat, gamma = cache
        stored = _float_array(x, "cache's x")
        x = _computable(stored)
        mean = np.asarray(mean, x.dtype)
        inv_var, gamma = np.asarray(inv_var, x.dtype).reshape(mean.shape), _shaped(gamma, 1, mean)
        x_hat = np.asarray(x_hat, x.dtype)
        dout = _float_array(dout, "dout").astype(stored.dtype, copy=False)
        dout = _computable(dout)
        if dout.shape != x.shape:
            raise ValueError(f"dout must have the shape of x, {x.shape}, got {dout.shape}")
        dout = _through_activation(dout, gamma, x_hat, cache)
        share: Array | float = 1 / _count(x, mean)
        counts: NDArray[np.bool_] | bool = True
        w = getattr(cache, "weights", None)
        if w is not None:
            total: Array = _sum(w, mean)
            share = w / np.where(total > 0, total, 1)
            counts = (w > 0) | (np.isfinite(x) & np.isfinite(dout))
            x, x_hat = (np.where((w > 0) | np.isfinite(a), a, 0) for a in (x, x_hat))
        prepared = _Prepared(mean, inv_var, x, x_hat, gamma, share, counts)
        dx: Array
        if getattr(cache, "frozen", False):
            dgamma, dbeta = _parameter_gradients(dout, prepared)
            dx = prepared.gamma * prepared.inv_std * dout
        else:
            dx, dgamma, dbeta = train_mode(dout, prepared)
        sums = zip((dgamma, dbeta), _parameter_shapes(cache, mean), strict=True)
        return dx.astype(stored.dtype, copy=False), *(_as_given(a, shape) for a, shape in sums)

    # Not functools.wraps, after which `help` would show the signature of the derivation.
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(backward, name, getattr(train_mode, name))
    return backward


def _parameter_gradients(dout: Array, cache: _Prepared) -> tuple[Array, Array]:
    """dgamma and dbeta, from z = gamma*x_hat + beta: each value of a feature adds its part."""
    dgamma = _sum(dout * cache.x_hat, cache.mean, cache.counts)
    return dgamma, _sum(dout, cache.mean, cache.counts)


@_derivation
def batchnorm_backward_three_pathways(dout: Array, cache: _Prepared) -> Gradients:
    """The gradients by three pathways: x_i acts on out_j directly, through mean, and through var.

    Parameters
    ----------
    dout : array_like, shape of x
        Gradient with respect to the output of `batchnorm_forward`.
    cache : Cache or sequence of five arrays
        From `batchnorm_forward`, or ``(mean, inv_var, x, x_hat, gamma)`` as NumPy code makes it
        for the train mode; the first two and gamma broadcast against x.

    Returns
    -------
    dx : ndarray, shape and dtype of x
    dgamma, dbeta : ndarray, shape (C,), dtype of x (float32 for half types)

    Raises
    ------
    TypeError
        If dout or x is not of a dtype that `batchnorm_forward` takes.
    ValueError
        If the shapes do not fit.

    Notes
    -----
    The chain rule adds up all ways from x_i to x_hat_j = (x_j - mean) * (var + eps)**(-1/2)::

        d x_hat_j / d x_i =   delta_ij * r                                      direct
                            + (-r) * (1/M)                                      mean
                            + (-1/2 * (x_j - mean) * r**3)
                              * (2/M * (x_i - mean))                            variance

    where d var / d x_i has no part through the mean: d var / d mean = -2/M * sum (x_k - mean) = 0.
    Then dx_i = gamma * sum_j dout_j * (d x_hat_j / d x_i), a sum for each pathway::

        dx_i = gamma*r * dout_i
             - gamma*r/M * sum_j dout_j
             - gamma*r**3/M * (x_i - mean) * sum_j dout_j * (x_j - mean)

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> out, cache = reference.batchnorm_forward(x, [1], [0])
    >>> dx, dgamma, dbeta = reference.batchnorm_backward_three_pathways([[1], [0], [0]], cache)
    >>> dx.round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    mean, inv_std, x, _, gamma, share, counts = cache
    centered = x - mean
    direct = gamma * inv_std * dout
    through_mean = -gamma * inv_std * share * _sum(dout, mean, counts)
    through_var = -gamma * inv_std**3 * share * centered * _sum(dout * centered, mean, counts)
    return direct + through_mean + through_var, *_parameter_gradients(dout, cache)


@_derivation
def batchnorm_backward_column_wise(dout: Array, cache: _Prepared) -> Gradients:
    """The gradients column by column, each by its matrix of derivatives: for small M.

    Parameters
    ----------
    dout : array_like, shape (M, C)
        Gradient with respect to the output of `batchnorm_forward`.
    cache : Cache or sequence of five arrays
        As for `batchnorm_backward_three_pathways`, of an x of shape (M, C).

    Returns
    -------
    dx : ndarray, shape and dtype of x
    dgamma, dbeta : ndarray, shape (C,), dtype of x (float32 for half types)

    Raises
    ------
    TypeError
        If dout or x is not of a dtype that `batchnorm_forward` takes.
    ValueError
        If the shapes do not fit, or x is not of shape (M, C) with the features last.

    Notes
    -----
    One column at a time, x is a vector of length M, and two steps lead to x_hat. I is the
    identity matrix, 1 the vector of ones, T means transposed:

    1. v = x - mean = (I - 1 1T/M) x, a linear map, so dv/dx = I - 1 1T/M.
    2. x_hat = g(v) v, with the real-valued g(v) = (vT v/M + eps)**(-1/2) = r. For such a product
       the derivative is g I + v (dg/dv)T, the product rule. Here dg/dv = -r**3/M * v, so
       d x_hat/dv = r I - r**3/M * v vT = r * (I - x_hat x_hatT/M).

    Together ::

        J = d x_hat/dx = r * (I - x_hat x_hatT/M) (I - 1 1T/M)
        dx = gamma * JT dout

    vT 1 = 0 makes it r * (I - 1 1T/M - x_hat x_hatT/M), from which the closed form is read off.
    The code keeps the product of the two matrices. It takes M*M numbers of memory.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> out, cache = reference.batchnorm_forward(x, [1], [0])
    >>> dx, dgamma, dbeta = reference.batchnorm_backward_column_wise([[1], [0], [0]], cache)
    >>> dx.round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    mean, inv_std, x, x_hat, gamma, share, counts = cache
    if x.ndim != 2 or mean.shape != (x.shape[1],):
        raise ValueError(
            f"cache's x and mean must have shapes (M, C) and (C,), got {x.shape} and {mean.shape}"
        )
    identity = np.eye(len(x), dtype=x.dtype)
    shares = np.broadcast_to(share, x.shape)
    counted = np.where(counts, dout, 0)
    dx = np.empty_like(dout)
    for j in range(x.shape[1]):
        centering = identity - shares[:, j]
        scaling = identity - np.outer(x_hat[:, j], x_hat[:, j] * shares[:, j])
        jacobian = inv_std[j] * scaling @ centering
        dx[:, j] = gamma[j] * jacobian.T @ counted[:, j]
    return dx, *_parameter_gradients(dout, cache)


@_derivation
def batchnorm_backward_element_wise(dout: Array, cache: _Prepared) -> Gradients:
    """The gradients element by element with the quotient rule: the closed form.

    Parameters
    ----------
    dout : array_like, shape of x
        Gradient with respect to the output of `batchnorm_forward`.
    cache : Cache or sequence of five arrays
        As for `batchnorm_backward_three_pathways`.

    Returns
    -------
    dx : ndarray, shape and dtype of x
    dgamma, dbeta : ndarray, shape (C,), dtype of x (float32 for half types)

    Raises
    ------
    TypeError
        If dout or x is not of a dtype that `batchnorm_forward` takes.
    ValueError
        If the shapes do not fit.

    Notes
    -----
    x_hat_k = f_k / g is a quotient, f_k = x_k - mean and g = sqrt(var + eps). With
    d mean / d x_i = 1/M and d var / d x_i = 2/M**2 * sum_t (x_i - x_t) = 2/M * (x_i - mean)::

        d f_k / d x_i = delta_ik - 1/M
        d g / d x_i = 1/(2*g) * 2/M * (x_i - mean) = x_hat_i / M
        d x_hat_k / d x_i = (g * (delta_ik - 1/M) - f_k * x_hat_i/M) / g**2
                          = (M*delta_ik - 1 - x_hat_k*x_hat_i) / (M*g)

    The sum dx_i = gamma * sum_k dout_k * (d x_hat_k / d x_i) is the closed form::

        dx_i = gamma*r * (dout_i - sum_k dout_k / M - x_hat_i * sum_k dout_k*x_hat_k / M)

    The text that this derivation is from has its element-wise formulas right, and misprints two
    of their vectorized lines, where J is a row of M ones: it has ``dbeta = J beta`` for
    ``dbeta = J dout``, and ``dgamma = J (gamma * dout)`` for ``dgamma = J (x_hat * dout)``.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import reference
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> out, cache = reference.batchnorm_forward(x, [1], [0])
    >>> dx, dgamma, dbeta = reference.batchnorm_backward_element_wise([[1], [0], [0]], cache)
    >>> dx.round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    _, inv_std, _, x_hat, gamma, share, _ = cache
    dgamma, dbeta = _parameter_gradients(dout, cache)
    return gamma * inv_std * (dout - share * (dbeta + x_hat * dgamma)), dgamma, dbeta
