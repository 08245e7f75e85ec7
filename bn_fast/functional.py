"""The public functions: check, one call down, return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import _checks
from ._cache import Cache, Options, feature_shape
from ._checks import GRADIENTS, RUNNING
from ._core import core
from ._threads import get_num_threads
from ._types import Array, Axis, BNParam, MaybeArray

__all__ = [
    "batchnorm_backward",
    "batchnorm_backward_alt",
    "batchnorm_double_backward",
    "batchnorm_forward",
    "spatial_batchnorm_backward",
    "spatial_batchnorm_forward",
]

# Smaller calls stay on one thread: a second one would cost more to wake than it saves.
_SERIAL_SIZE = 1 << 17


def n_threads_for(x: Array) -> int:
    return 1 if x.size < _SERIAL_SIZE else get_num_threads()


def batchnorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    bn_param: BNParam | None = None,
    *,
    axis: Axis = 1,
    out: Array | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[Array, Cache]:
    r"""Batch normalization: every feature to mean 0 and variance 1, then scaled and shifted.

    Parameters
    ----------
    x : array_like, 2 or more dimensions
        Input, M values for each of ``C = x.shape[axis]`` features. float32 and float64 are computed
        as such, integers and bool as float64; float16 and bfloat16 (of ml_dtypes) as float32, to
        which only results of x's size are rounded back, too large ones to infinity. Any strides;
        never modified (but see `out`).
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each feature; any real dtype, best float32 for an x of 16 bits. None: 1
        and 0. Other shapes in which they broadcast against x along `axis` are taken too, as
        (1, C, 1, 1) for images, and a number for all features.
    bn_param : dict, optional
        The settings of CS231n's assignments; None: train mode, no running averages.

        - ``mode``: 'train' (statistics of this batch) or 'test' (the running averages); required.
        - ``eps``: added to the variance, default 1e-5.
        - ``momentum``: default 0.9, the weight of the *old* value:
          ``running = momentum * running + (1 - momentum) * batch``.
        - ``ddof``: 0 (default) or 1; the running variance averages
          ``sum((x - mean)**2) / (M - ddof)``, with 1 as PyTorch and Chainer. The output does not
          depend on it.
        - ``running_mean``, ``running_var``: shape (C,), or one that broadcasts as gamma's; default
          zeros, shape (C,). Stored back as new arrays in both modes, updated in train mode only,
          and not by an empty batch.
    axis : int or tuple of int, default 1
        The feature axis; negative counts from the end. Several: each place along them is a feature
        of its own, and in all that is said of shape (C,) here stand their lengths, in ascending
        order: (C, H, W) for (1, 2, 3), batch norm of every activation.
    out : ndarray, optional
        Where to write the result: shape and dtype of the result, writable. It may be x itself (the
        result is exact, but the cache is then of no use to `batchnorm_backward`, which says so), or
        residual itself (of no use only with an activation).
    activation : None, 'relu' or 'leaky_relu'
        What is applied to the result, in the same pass.
    negative_slope : float, default 0.01
        Slope of leaky_relu below 0.
    residual : array_like, shape of x, optional
        Added before the activation, in the same pass. Rounded to the dtype of x if it has another.
    weights : array_like, optional
        Weight of each element in the statistics: bool (a mask), or real and at least 0. Broadcasts
        to x: with length 1 along `axis` for all features alike, or not, as ``np.isfinite(x)``, so
        that each has its own sum of weights W. Without effect in test mode.

    Returns
    -------
    out : ndarray
        Shape and, if new, memory order of x.
    cache : Cache
        For `batchnorm_backward`. Keeps x (and residual, for an activation) by reference: change
        them only after the backward call.
        Unpacks as ``(mean, inv_var, x, x_hat, gamma)``.

    Raises
    ------
    TypeError
        If an argument is not real-valued (str, object, complex, a masked array).
    ValueError
        If a shape, size or value is wrong, or `out` overlaps x or residual in part; or for a batch
        of one value, whose variance with ``ddof`` 1 is none.
    KeyError
        If `bn_param` has no 'mode'.
    MemoryError
        If `out` or the scratch memory cannot be had.

    See Also
    --------
    batchnorm_backward

    Notes
    -----
    For each feature, over its M values,

    .. math:: y = \gamma \hat{x} + \beta, \qquad
              \hat{x} = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad
              \mu = \frac{1}{M} \sum x, \qquad \sigma^2 = \frac{1}{M} \sum (x - \mu)^2

    With weights, whose sum is W,

    .. math:: \mu = \frac{1}{W} \sum w x, \qquad \sigma^2 = \frac{1}{W} \sum w (x - \mu)^2

    and all elements are normalized; one of weight 0 has no influence on others, not even as NaN.
    W = 0 leaves the running averages of the feature alone, as an empty batch does, and gives beta.
    With the other options out is

    .. math:: \mathrm{activation}(y + \mathrm{residual}), \qquad
              \mathrm{leaky\_relu}(z) = z \text{ if } z > 0 \text{ else }
              \mathrm{negative\_slope} \cdot z

    and relu(z) = z if z > 0 else 0. The variance is the biased one, but for ``ddof``. M = 1
    and constant features give exactly beta. NaN and infinity spread within their own feature. The
    bits do not depend on the number of threads or the instruction set.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.
    .. [2] K. He, X. Zhang, S. Ren and J. Sun, "Deep Residual Learning for Image Recognition",
       CVPR 2016, arXiv:1512.03385: the residual is added between batch norm and activation.
    .. [3] A. L. Maas, A. Y. Hannun and A. Y. Ng, "Rectifier Nonlinearities Improve Neural Network
       Acoustic Models", ICML 2013: leaky_relu.
    .. [4] D. H. D. West, "Updating Mean and Variance Estimates: An Improved Method",
       Communications of the ACM 22(9), 1979: the weighted mean and variance.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import batchnorm_forward
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> out, cache = batchnorm_forward(x, np.ones(2), np.zeros(2))
    >>> out.round(3)
    array([[-1., -1.],
           [ 1.,  1.]])

    The end of a residual block, in one pass:

    >>> out, cache = batchnorm_forward(
    ...     x, np.ones(2), np.zeros(2), activation="relu", residual=np.array([[0.5, 3], [0.5, 3]])
    ... )
    >>> out.round(3)
    array([[0. , 2. ],
           [1.5, 4. ]])

    A mask, under which there may be anything:

    >>> padded = np.array([[1.0], [3.0], [np.nan]])
    >>> mask = [[True], [True], [False]]
    >>> out, cache = batchnorm_forward(padded, np.ones(1), np.zeros(1), weights=mask)
    >>> out.round(3)
    array([[-1.],
           [ 1.],
           [nan]])

    Storage in 16 bits:

    >>> out, cache = batchnorm_forward(x.astype(np.float16), np.ones(2), np.zeros(2))
    >>> out.dtype
    dtype('float16')
    """
    plain = core.plain_forward(
        x, gamma, beta, bn_param, axis, out, activation, negative_slope, residual, weights,
        _checks.element_weights, get_num_threads, _SERIAL_SIZE,
    )  # fmt: skip
    if plain:  # the straight road
        x, gamma, beta, asked, (y, stats, eps, frozen) = plain
        options = None if asked is None else Options(*asked)
    else:
        x, gamma, beta, axis, out = _checks.forward_arrays(x, gamma, beta, axis, out)
        options = settings = None
        _checks.finite(negative_slope, "negative_slope")
        if activation is not None or residual is not None or weights is not None:
            options = _checks.options(x, axis, out, activation, negative_slope, residual, weights)
        if bn_param is not None:
            settings = _checks.settings(bn_param, x, axis, options)
        differ = settings and settings[0] and options is not None and options.counts_differ
        without = (*settings[:3], None, None, 1.0) if settings and differ else settings
        with _stored(bn_param, settings, feature_shape(x, axis)):
            y, stats, eps, frozen = core.forward(
                x, gamma, beta, axis, out, without, options, n_threads_for(x)
            )
            if differ:
                _average_in(settings, stats, options)
    overwritten = "batchnorm_forward" if out is not None and core.is_same(out, x) else ""
    return y, Cache(x, gamma, beta, stats, axis, eps, frozen, overwritten, options)


@contextmanager
def _stored(
    param: BNParam | None, settings: tuple[Any, ...] | None, shape: tuple[int, ...]
) -> Iterator[None]:
    """Store the averages, in the shapes given or this one, before something is done that cannot be
    taken back: a mapping may refuse. Where one or the other fails it is as before."""
    if param is None or settings is None:
        yield
        return
    before = {name: param[name] for name in RUNNING if name in param}
    try:
        for name, average in zip(RUNNING, settings[3:5], strict=True):
            given = before.get(name)
            own = shape if given is None else _checks._real_array(given, name).shape
            param[name] = average.reshape(own)
        yield
    except BaseException:
        with suppress(Exception):
            for name in RUNNING:
                if name in before:
                    param[name] = before[name]
                else:
                    param.pop(name, None)
        raise


def _average_in(settings: Any, stats: Array, options: Any) -> None:
    """What the engine does, for features that differ in how many values they have: none leave the
    averages of theirs alone."""
    _, _, momentum, *averages, correction = settings
    count = options.sum_weights.reshape(-1)
    correction = np.broadcast_to(np.reshape(correction, -1), count.shape)
    with np.errstate(all="ignore"):
        for average, batch, factor in zip(averages, stats[::3], (1, correction), strict=True):
            new = momentum * average.astype(float) + (1 - momentum) * factor * batch
            average[...] = np.where(count > 0, new, average)


def batchnorm_backward(
    dout: ArrayLike,
    cache: Cache | Sequence[Any],
    *,
    out: Array | None = None,
    needs: Sequence[str] = GRADIENTS,
) -> tuple[Any, ...]:
    r"""Gradients of batch normalization.

    Parameters
    ----------
    dout : array_like, shape of x
        Gradient with respect to the output of `batchnorm_forward`.
    cache : Cache or sequence of five arrays
        From `batchnorm_forward`, or ``(mean, inv_var, x, x_hat, gamma)`` as NumPy code makes it for
        the train mode, where mean and the others broadcast against x and x_hat is not read; gamma
        may be None.
    out : ndarray, optional
        Where to write dx. It may be dout itself, or the x of the cache, which is then spent.
    needs : sequence of str
        Which gradients are wanted, of 'dx', 'dgamma', 'dbeta', 'dresidual', and after a forward
        pass in test mode 'dmean', 'dvar': those with respect to the running averages that it was
        given. What is not named is not computed, and None comes in its place.

    Returns
    -------
    dx : ndarray, shape and dtype of x
    dgamma, dbeta : ndarray, shapes of gamma and beta, dtype of x (float32 for an x of 16 bits)
        None for one that was None. Shape (C,) after a plain tuple. Of one number for all features
        the sum of their gradients.
    dresidual : ndarray, shape and dtype of x
        Only if the forward call had a residual.
    dmean, dvar : ndarray, shape (C,), dtype of x (float32 for an x of 16 bits)
        Only if `needs` names one of them.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If a shape is wrong, `out` overlaps dout or x in part, or x has been overwritten; if `needs`
        names dmean or dvar after a forward pass in train mode.
    MemoryError
        If `out` or the scratch memory cannot be had.

    See Also
    --------
    batchnorm_forward
    bn_fast.reference : the derivations behind these formulas, in plain NumPy

    Notes
    -----
    For each feature, sums over its M values, with r = 1/sqrt(var + eps),

    .. math:: d\beta = \sum dy \qquad d\gamma = \sum dy\,\hat{x} \qquad
              dx = \gamma r \left(dy - \frac{d\beta}{M} - \hat{x} \frac{d\gamma}{M}\right)

    After a forward pass in test mode the statistics do not depend on x, and

    .. math:: dx = \gamma r\,dy \qquad d\mu = -\gamma r\,d\beta \qquad
              d\sigma^2 = -\frac{1}{2} \gamma r^2\,d\gamma

    After an activation dy is dout times its slope, which is found again from x, gamma, beta and
    residual as the forward call had them, to the bit; dy is also dresidual. With weights

    .. math:: dx = \gamma r \left(dy - \frac{w}{W} \sum dy - \frac{w}{W} \hat{x}
              \sum dy\,\hat{x} \right)

    where the sums are over all elements but those of weight 0 whose x or dout is not finite.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import batchnorm_backward, batchnorm_forward
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> out, cache = batchnorm_forward(x, np.ones(1), np.zeros(1))
    >>> dx, dgamma, dbeta = batchnorm_backward(np.array([[1.0], [0.0], [0.0]]), cache)
    >>> dx.round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    >>> dbeta
    array([1.])

    Only one of them, and with the residual's, which comes through the activation:

    >>> dout = np.array([[1.0], [2.0], [3.0]])
    >>> batchnorm_backward(dout, cache, needs=["dbeta"])
    (None, None, array([6.]))
    >>> out, cache = batchnorm_forward(
    ...     x, np.ones(1), np.zeros(1), activation="relu", residual=np.zeros_like(x)
    ... )
    >>> out.round(2)
    array([[0.  ],
           [0.  ],
           [1.39]])
    >>> dx, dgamma, dbeta, dresidual = batchnorm_backward(dout, cache)
    >>> dresidual
    array([[0.],
           [0.],
           [3.]])

    With respect to given statistics:

    >>> param = {"mode": "test", "running_mean": [2.0], "running_var": [4.0], "eps": 0.0}
    >>> out, cache = batchnorm_forward(x, bn_param=param)
    >>> batchnorm_backward(dout, cache, needs=["dmean", "dvar"])
    (None, None, None, array([-3.]), array([-0.6875]))
    """
    gradients: tuple[Any, ...] | None = None
    if type(cache) is Cache and needs is GRADIENTS and not cache.overwritten:  # the straight road
        gradients = core.backward(dout, cache, out, None, get_num_threads, _SERIAL_SIZE)
    if gradients is None:
        wanted = _checks.needs(needs, out)
        dout, kept, out = _checks.backward_arrays(dout, cache, out)
        _checks.statistics_given(kept, wanted)
        dx, dgamma, dbeta, *more = core.backward(dout, kept, out, wanted, n_threads_for(kept.x))
        dgamma, dbeta = as_given(dgamma, kept.gamma), as_given(dbeta, kept.beta)
        if wanted.intersection(_checks.STATISTICS):
            shape = feature_shape(kept.x, kept.axis)
            more[-2:] = (None if a is None else a.reshape(shape) for a in more[-2:])
        gradients = dx, dgamma, dbeta, *more
    return gradients


def as_given(gradient: Array | None, parameter: Array | None) -> Array | None:
    """The gradient in the shape of its parameter, whose one value for all features has their sum;
    None where one of them is."""
    if gradient is None or parameter is None or gradient.shape == parameter.shape:
        return None if parameter is None else gradient
    if parameter.ndim == 0:
        return np.asarray(gradient.sum(dtype=np.float64), gradient.dtype)
    return gradient.reshape(parameter.shape)


batchnorm_backward_alt = batchnorm_backward


def batchnorm_double_backward(
    ddx: ArrayLike | None,
    ddgamma: ArrayLike | None,
    ddbeta: ArrayLike | None,
    dout: ArrayLike,
    cache: Cache | Sequence[Any],
) -> tuple[Array, MaybeArray, Array]:
    r"""Gradients of batch normalization's gradients: the second order, for gradient penalties.

    With ``dx, dgamma, dbeta = batchnorm_backward(dout, cache)`` and a loss that depends on these
    three, this is that loss's gradient with respect to what they were computed from.

    Parameters
    ----------
    ddx : array_like, shape of x, or None
        The loss's gradient with respect to dx. None, here and below: zeros, and less work.
    ddgamma, ddbeta : array_like, shapes of gamma and beta, or None
        The loss's gradients with respect to dgamma and dbeta; None where these are.
    dout : array_like, shape of x
        What `batchnorm_backward` was given.
    cache : Cache or sequence of five arrays
        The same; see there.

    Returns
    -------
    dx : ndarray, shape and dtype of x
        Gradient with respect to x, in train mode through the statistics too.
    dgamma : ndarray, shape of gamma, dtype of x (float32 for an x of 16 bits)
        Gradient with respect to gamma; None if that was None.
    ddout : ndarray, shape and dtype of x
        Gradient with respect to dout.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If a shape is wrong, or x has been overwritten.
    MemoryError
        If the results or the scratch memory cannot be had.

    See Also
    --------
    batchnorm_backward

    Notes
    -----
    For each feature let :math:`u, a, b` be ddx, ddgamma, ddbeta, :math:`g` dout, :math:`r` the
    inverse deviation, and :math:`\langle\cdot\rangle` the mean over the M values. With
    :math:`A = \langle u\rangle,\ B = \langle u\hat{x}\rangle,\ C = \langle g\rangle,\
    D = \langle g\hat{x}\rangle,\ E = \langle (u - A)(g - C)\rangle`, what the loss has from the
    first order is

    .. math:: L = \sum u\,dx + a\,d\gamma + b\,d\beta
                = M \left(\gamma r (E - B D) + a D + b C\right)

    since :math:`dx = \gamma r (g - C - \hat{x} D)`. Its derivatives follow from

    .. math:: \frac{\partial r}{\partial x_i} = -\frac{r^2 \hat{x}_i}{M} \qquad
              \frac{\partial}{\partial x_i} \sum_k w_k \hat{x}_k
              = r (w_i - \langle w\rangle - \hat{x}_i \langle w\hat{x}\rangle)

    (the element-wise derivation in `bn_fast.reference`), for w = u and w = g. With
    :math:`w = a - \gamma r B`,

    .. math:: dx &= r w\,(g - C) - \gamma r^2 D\,(u - A)
                    - r \hat{x} \left(\gamma r (E - 3 B D) + a D\right) \\
              d\gamma &= r M (E - B D) \\
              ddout &= \gamma r\,(u - A) + w \hat{x} + b

    Nothing is divided by gamma, so gamma = 0 is no special case. After a forward pass in test mode
    r and the mean are constants: :math:`dx = a r g,\ d\gamma = r \sum u g,\
    ddout = \gamma r u + a \hat{x} + b`.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167: the first
       order, which is differentiated here once more.

    Examples
    --------
    The gradient of a penalty, half the square of dx:

    >>> import numpy as np
    >>> from bn_fast import batchnorm_backward, batchnorm_double_backward, batchnorm_forward
    >>> x, dout = np.array([[1.0], [2.0], [6.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> out, cache = batchnorm_forward(x, np.ones(1), np.zeros(1))
    >>> dx, dgamma, dbeta = batchnorm_backward(dout, cache)
    >>> penalty_dx, penalty_dgamma, penalty_ddout = batchnorm_double_backward(
    ...     dx, None, None, dout, cache
    ... )
    >>> penalty_dgamma.round(4)  # dx is proportional to gamma: the sum of squares
    array([0.0816])
    """
    ddx, ddgamma, ddbeta, dout, kept = _checks.second_order_arrays(
        ddx, ddgamma, ddbeta, dout, cache
    )
    dx, dgamma, ddout = core.double_backward(
        ddx, ddgamma, ddbeta, dout, kept, n_threads_for(kept.x)
    )
    return dx, as_given(dgamma, kept.gamma), ddout


def spatial_batchnorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    bn_param: BNParam | None = None,
    *,
    out: Array | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[Array, Cache]:
    """`batchnorm_forward` for images, x of shape (N, C, H, W): statistics over N, H and W.

    Parameters, results and errors are those of `batchnorm_forward` with ``axis=1``.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import spatial_batchnorm_forward
    >>> x = np.arange(16.0).reshape(2, 2, 2, 2)
    >>> out, cache = spatial_batchnorm_forward(x, np.ones(2), np.zeros(2))
    >>> out.mean(axis=(0, 2, 3)).round(12) + 0.0
    array([0., 0.])
    """
    if type(x) is not np.ndarray or x.ndim != 4:
        x = _checks.images(x)
    return batchnorm_forward(
        x,
        gamma,
        beta,
        bn_param,
        axis=1,
        out=out,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        weights=weights,
    )


spatial_batchnorm_backward = batchnorm_backward
