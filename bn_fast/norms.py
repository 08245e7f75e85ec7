"""Layer, RMS, group and instance normalization: check, one call down, return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from numpy.typing import ArrayLike

from . import _checks, _norm_checks, functional
from ._cache import Axes, NormCache
from ._core import core
from ._norm_checks import GRADIENTS, RMS_GRADIENTS, NormCall, refusing
from ._threads import get_num_threads
from ._types import Array
from .functional import n_threads_for

__all__ = [
    "group_norm",
    "groupnorm_backward",
    "groupnorm_forward",
    "instance_norm",
    "instancenorm_backward",
    "instancenorm_forward",
    "layer_norm",
    "layernorm_backward",
    "layernorm_forward",
    "rms_norm",
    "rmsnorm_backward",
    "rmsnorm_forward",
    "spatial_groupnorm_backward",
    "spatial_groupnorm_forward",
]


def _forward(
    norm: str,
    x: Any,
    gamma: Any,
    beta: Any,
    num_groups: Any,
    axis: Any,
    eps: Any,
    out: Any,
    param: Any,
    param_name: str,
) -> tuple[Array, NormCache]:
    if param is None:  # the straight road
        plain = core.plain_norm(
            norm, x, gamma, beta, num_groups, axis, eps, out, True,
            get_num_threads, functional._SERIAL_SIZE,
        )  # fmt: skip
        if plain is not None:
            if norm == "groupnorm":
                axes = _axes_of_groups(x.shape, axis, num_groups)
            elif norm == "instancenorm":
                axes = _axes_of_channels(x.shape, axis)
            else:
                axes = _norm_checks.axes_of_rows(x.shape, (x.ndim - 1,))
            y, stats = plain
            return y, _cache(norm, x, gamma, beta, axes, 1e-5 if eps is None else eps, out, stats)
    number = _norm_checks.epsilon(param, param_name, eps)
    return _finish(norm, _norm_checks.call(norm, x, gamma, beta, num_groups, axis, number, out))


def _forward_alone(
    norm: str, x: Any, gamma: Any, beta: Any, num_groups: Any, axis: Any, eps: Any, out: Any
) -> Array:
    if eps is not None:  # the straight road
        plain = core.plain_norm(
            norm, x, gamma, beta, num_groups, axis, eps, out, False,
            get_num_threads, functional._SERIAL_SIZE,
        )  # fmt: skip
        if plain is not None:
            return plain[0]
    number = _checks.epsilon(eps)
    call = _norm_checks.call(norm, x, gamma, beta, num_groups, axis, number, out)
    return _computed(norm, call, False)[0]


_axes_of_channels = lru_cache(_norm_checks.axes_of_channels)  # a network has a few
_axes_of_groups = lru_cache(_norm_checks.axes_of_groups)


def _finish(norm: str, call: NormCall) -> tuple[Array, NormCache]:
    y, stats = _computed(norm, call)
    return y, _cache(norm, *call, stats)


def _cache(
    norm: str,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    axes: Axes,
    eps: float,
    out: Array | None,
    stats: Array,
) -> NormCache:
    overwritten = f"{norm}_forward" if out is not None and core.is_same(out, x) else ""
    beta_shape = None if beta is None else beta.shape
    return NormCache(norm, x, gamma, beta_shape, axes, stats, eps, True, overwritten)


def _computed(norm: str, call: NormCall, keeps: bool = True) -> tuple[Array, Any]:
    """out and, to be kept, the statistics."""
    return core.norm_forward(norm, call, n_threads_for(call.x), keeps)


def _backward(
    norm: str,
    dout: ArrayLike,
    cache: NormCache | Sequence[Any],
    out: Array | None,
    needs: Sequence[str],
    gradients: Sequence[str] = GRADIENTS,
) -> tuple[Any, ...]:
    """The gradients that are wanted; None for the others."""
    found: tuple[Any, ...] | None = None
    if (
        type(cache) is NormCache
        and needs is gradients
        and cache.norm == norm
        and not cache.overwritten
        and _norm_checks.axes_fit(cache)
    ):  # the straight road
        small = functional._SERIAL_SIZE
        found = core.norm_backward(dout, cache, out, None, get_num_threads, small)
    if found is None:
        dout, kept, out, wanted = _norm_checks.backward(norm, dout, cache, out, needs)
        found = core.norm_backward(dout, kept, out, wanted, n_threads_for(kept.x))
    return found


@refusing
def layernorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    ln_param: Mapping[str, Any] | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    eps: float | None = None,
    out: Array | None = None,
) -> tuple[Array, NormCache]:
    """Layer normalization: every row to mean 0 and variance 1, then scaled and shifted.

    Parameters
    ----------
    x : array_like, 1 or more dimensions
        float32 and float64 are computed as such, integers and bool as float64; float16 and
        bfloat16 (of ml_dtypes) as float32, to which only the result is rounded back. Any strides;
        never modified (but see `out`).
    gamma, beta : array_like, optional
        Scale and shift, of the shape of x's normalized axes in ascending order: (D,) for an x of
        shape (N, D). Of any real dtype; rounded to the dtype of computation. None: 1 and 0.
    ln_param : dict, optional
        The settings of CS231n's assignments: ``eps``. Other keys are ignored, and nothing is
        stored.
    axis : int or tuple of int, default -1
        The normalized axes. An integer is that one axis, wherever it lies, as in NumPy; for all
        axes from the second on, as ONNX reads 1, it is ``tuple(range(1, x.ndim))``.
    eps : float, default 1e-5
        Added to the variance, if `ln_param` does not have it.
    out : ndarray, optional
        Where to write the result, of its shape and dtype. It may be x itself; the cache is then of
        no use to `layernorm_backward`, which says so.

    Returns
    -------
    out : ndarray
        Shape and, if new, memory order of x.
    cache : NormCache
        For `layernorm_backward`. Keeps x and gamma by reference: change them only after the
        backward call. Unpacks as
        ``(mean, inv_std, x, x_hat, gamma)``, where mean and inv_std have the shape of x with
        length 1 along the normalized axes.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind; the message for a number as `ln_param` says ``eps=``.
    ValueError
        If a shape or value is wrong, eps is given twice, or `out` overlaps another array in part.
    MemoryError
        If `out` or the scratch memory cannot be had.

    See Also
    --------
    layer_norm : the result alone
    batchnorm_forward : the same over the other axis

    Notes
    -----
    For each row, which is what x has along the normalized axes, of M values::

        mean = sum x / M        var = sum (x - mean)**2 / M
        x_hat = (x - mean) / sqrt(var + eps)        out = gamma*x_hat + beta

    The variance is the biased one. A row of one value, or of equal ones, gives beta, with eps = 0
    as well; NaN and infinity spread within their own row. The bits of a row do not depend on the
    other rows, nor on their number (batch invariance), the number of threads or the instruction
    set.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016,
       https://arxiv.org/abs/1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import layernorm_forward
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]])
    >>> out, cache = layernorm_forward(x, [1, 2], [0, 5], {"eps": 0})
    >>> out
    array([[-1.,  7.],
           [-1.,  7.]])
    >>> mean, inv_std, x, x_hat, gamma = cache
    >>> mean
    array([[ 2.],
           [20.]])

    Over the channels of images:

    >>> out, cache = layernorm_forward(np.ones((2, 3, 4, 4)), np.ones(3), axis=1)
    >>> cache.mean.shape
    (2, 1, 4, 4)
    """
    return _forward("layernorm", x, gamma, beta, None, axis, eps, out, ln_param, "ln_param")


def layernorm_backward(
    dout: ArrayLike,
    cache: NormCache | Sequence[Any],
    *,
    out: Array | None = None,
    needs: Sequence[str] = GRADIENTS,
) -> tuple[Any, ...]:
    """Gradients of layer normalization.

    Parameters
    ----------
    dout : array_like, shape of x
        Gradient with respect to the output of `layernorm_forward`.
    cache : NormCache or tuple of five arrays
        From `layernorm_forward`, or ``(mean, inv_std, x, x_hat, gamma)`` as NumPy code makes it:
        mean and inv_std of x's dimensions (``keepdims=True``), x_hat not read, gamma an array or
        None.
    out : ndarray, optional
        Where to write dx, of its shape and dtype. It may be dout itself, or the x of the cache,
        which is then spent.
    needs : sequence of str
        Which gradients are wanted, of 'dx', 'dgamma', 'dbeta'; None comes for others.

    Returns
    -------
    dx : ndarray, shape and dtype of x
    dgamma, dbeta : ndarray, shape of gamma and beta, dtype of x (float32 for half types)
        None for one that was not given.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, the cache of another function among them.
    ValueError
        If a shape is wrong, `out` overlaps another array in part, or x has been overwritten.

    Notes
    -----
    With r = 1/sqrt(var + eps), t = gamma*dout, and [ ] for the mean over the M values of a row::

        dx = r * (t - [t] - x_hat*[t*x_hat])
        dgamma = sum dout*x_hat        dbeta = sum dout

    where the sums are over all rows. `bn_fast.reference.layernorm_backward` derives it.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016,
       https://arxiv.org/abs/1607.06450.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import layernorm_backward, layernorm_forward
    >>> out, cache = layernorm_forward([[1.0, 2.0, 6.0]], [1, 1, 1], [0, 0, 0])
    >>> dx, dgamma, dbeta = layernorm_backward([[1.0, 0.0, 0.0]], cache)
    >>> dx.round(4)
    array([[ 0.1763, -0.2204,  0.0441]])
    >>> dbeta
    array([1., 0., 0.])
    """
    return _backward("layernorm", dout, cache, out, needs)


@refusing
def rmsnorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    rms_param: Mapping[str, Any] | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    eps: float | None = None,
    out: Array | None = None,
) -> tuple[Array, NormCache]:
    """Root mean square normalization: every row to a mean square of 1, then scaled.

    Parameters
    ----------
    x, gamma, axis, eps, out
        As for `layernorm_forward`. There is no beta. Llama's and ONNX's eps is 1e-5, the default;
        that of Keras, Flax and Gemma is 1e-6, PyTorch's without a number ``finfo(dtype).eps``.
    rms_param : dict, optional
        May have ``eps``, as `ln_param` there.

    Returns
    -------
    out : ndarray, shape of x
    cache : NormCache
        For `rmsnorm_backward`. Unpacks as ``(mean, inv_std, x, x_hat, gamma)``, where mean is zeros
        of the shape of inv_std.

    Raises
    ------
    TypeError, ValueError
        As `layernorm_forward`.

    Notes
    -----
    For each row of M values::

        x_hat = x / sqrt(sum x**2 / M + eps)        out = gamma*x_hat

    eps is inside the root, and gamma is applied before half types are rounded. A row of zeros
    gives 0, with eps = 0 as well.

    References
    ----------
    .. [1] B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019,
       https://arxiv.org/abs/1910.07467.

    Examples
    --------
    >>> from bn_fast import rmsnorm_forward
    >>> out, cache = rmsnorm_forward([[1.0, 7.0], [3.0, -3.0]], [5, 1], eps=0)
    >>> out
    array([[ 1. ,  1.4],
           [ 5. , -1. ]])
    """
    return _forward("rmsnorm", x, gamma, None, None, axis, eps, out, rms_param, "rms_param")


def rmsnorm_backward(
    dout: ArrayLike,
    cache: NormCache | Sequence[Any],
    *,
    out: Array | None = None,
    needs: Sequence[str] = RMS_GRADIENTS,
) -> tuple[Any, ...]:
    """Gradients of root mean square normalization.

    Parameters
    ----------
    dout, cache, out
        As for `layernorm_backward`; the mean of a plain tuple is 0.
    needs : sequence of str
        Which gradients are wanted, of 'dx', 'dgamma'; None comes for the other.

    Returns
    -------
    dx : ndarray, shape and dtype of x
    dgamma : ndarray, shape of gamma, dtype of x (float32 for half types)
        None without a gamma.

    Raises
    ------
    TypeError, ValueError
        As `layernorm_backward`.

    Notes
    -----
    With r = (sum x**2 / M + eps)**(-1/2), t = gamma*dout, and [ ] for the mean over a row::

        dx = r * (t - x_hat*[t*x_hat])        dgamma = sum dout*x_hat, over all rows

    `bn_fast.reference.rmsnorm_backward` derives it.

    References
    ----------
    .. [1] B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019,
       https://arxiv.org/abs/1910.07467.

    Examples
    --------
    >>> from bn_fast import rmsnorm_backward, rmsnorm_forward
    >>> out, cache = rmsnorm_forward([[1.0, 7.0]], [1, 1], eps=0)
    >>> dx, dgamma = rmsnorm_backward([[1.0, 0.0]], cache)
    >>> dx.round(4)
    array([[ 0.196, -0.028]])
    >>> dgamma
    array([0.2, 0. ])
    """
    return _backward("rmsnorm", dout, cache, out, needs, RMS_GRADIENTS)[:2]


@refusing
def groupnorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    num_groups: int,
    gn_param: Mapping[str, Any] | None = None,
    *,
    axis: int = 1,
    eps: float | None = None,
    out: Array | None = None,
) -> tuple[Array, NormCache]:
    """Group normalization: of every sample, each group of channels to mean 0 and variance 1.

    Parameters
    ----------
    x : array_like, shape (N, C, ...), 2 or more dimensions
        Samples along the first axis; dtypes as for `layernorm_forward`.
    gamma, beta : array_like, shape (C,), or None
        Scale and shift of each channel. None: 1 and 0.
    num_groups : int
        G, which divides C. A group is C/G channels that are neighbours. 1 has all channels in one
        statistic, C is instance norm.
    gn_param : dict, optional
        May have ``eps``, as `ln_param` of `layernorm_forward`.
    axis : int, default 1
        The axis of the channels; not 0, which is the batch.
    eps, out
        As for `layernorm_forward`.

    Returns
    -------
    out : ndarray, shape of x
    cache : NormCache
        For `groupnorm_backward`. Unpacks as ``(mean, inv_std, x, x_hat, gamma)``, where mean and
        inv_std have shape (N, C, 1, ...): those of a group are repeated for each of its channels.
        As (N, G) they are ``cache.group_mean`` and ``cache.group_inv_std``.

    Raises
    ------
    TypeError, ValueError
        As `layernorm_forward`; also if `num_groups` does not divide C.

    Notes
    -----
    For each sample and group, over the M values of its C/G channels and all places::

        mean = sum x / M        var = sum (x - mean)**2 / M
        x_hat = (x - mean) / sqrt(var + eps)        out = gamma*x_hat + beta

    with the channel's own gamma and beta. M = 1 gives beta. All else is as in `layernorm_forward`:
    the bits of a group do not depend on the other groups and samples.

    References
    ----------
    .. [1] Wu and He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import groupnorm_forward
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> out, cache = groupnorm_forward(x, [1, 1, 2, 2], None, 2, eps=0)
    >>> out
    array([[-1.,  1., -2.,  2.]])
    >>> cache.group_mean
    array([[ 2., 20.]])
    >>> cache.mean
    array([[ 2.,  2., 20., 20.]])
    """
    return _forward("groupnorm", x, gamma, beta, num_groups, axis, eps, out, gn_param, "gn_param")


def groupnorm_backward(
    dout: ArrayLike,
    cache: NormCache,
    *,
    out: Array | None = None,
    needs: Sequence[str] = GRADIENTS,
) -> tuple[Any, ...]:
    """Gradients of group normalization.

    Parameters
    ----------
    dout : array_like, shape of x
        Gradient with respect to the output of `groupnorm_forward`.
    cache : NormCache
        From `groupnorm_forward`. Five arrays of other code do not say what the groups are, and are
        refused.
    out, needs
        As for `layernorm_backward`.

    Returns
    -------
    dx : ndarray, shape and dtype of x
    dgamma, dbeta : ndarray, shape of gamma and beta, dtype of x (float32 for half types)
        None for one that was not given.

    Raises
    ------
    TypeError, ValueError
        As `layernorm_backward`.

    Notes
    -----
    With r = 1/sqrt(var + eps), t = gamma*dout, and [ ] for the mean over the M values of a group::

        dx = r * (t - [t] - x_hat*[t*x_hat])
        dgamma = sum dout*x_hat        dbeta = sum dout

    where the sums are over all samples and places. `bn_fast.reference.groupnorm_backward` derives
    it.

    References
    ----------
    .. [1] Wu and He, "Group Normalization", ECCV 2018, https://arxiv.org/abs/1803.08494.

    Examples
    --------
    >>> from bn_fast import groupnorm_backward, groupnorm_forward
    >>> x = [[1.0, 2.0, 6.0, 5.0, 5.0, 5.0]]
    >>> out, cache = groupnorm_forward(x, None, [0] * 6, 2)
    >>> dx, dgamma, dbeta = groupnorm_backward([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]], cache)
    >>> dx.round(4) + 0.0
    array([[ 0.1763, -0.2204,  0.0441,  0.    ,  0.    ,  0.    ]])
    >>> dgamma is None
    True
    """
    return _backward("groupnorm", dout, cache, out, needs)


@refusing
def instancenorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    in_param: Mapping[str, Any] | None = None,
    *,
    axis: int = 1,
    eps: float | None = None,
    out: Array | None = None,
) -> tuple[Array, NormCache]:
    """Instance normalization: of every sample, each channel to mean 0 and variance 1.

    Parameters
    ----------
    x, gamma, beta, axis, eps, out
        As for `groupnorm_forward`, whose ``num_groups=C`` this is.
    in_param : dict, optional
        May have ``eps``, as `ln_param` of `layernorm_forward`.

    Returns
    -------
    out : ndarray, shape of x
    cache : NormCache
        For `instancenorm_backward`. Unpacks as ``(mean, inv_std, x, x_hat, gamma)``, where mean and
        inv_std have shape (N, C, 1, ...).

    Raises
    ------
    TypeError, ValueError
        As `layernorm_forward`.

    Notes
    -----
    For each sample and channel, over the M values of all places::

        mean = sum x / M        var = sum (x - mean)**2 / M
        x_hat = (x - mean) / sqrt(var + eps)        out = gamma*x_hat + beta

    An x of shape (N, C), whose statistics have one value each, gives beta.

    References
    ----------
    .. [1] D. Ulyanov, A. Vedaldi and V. Lempitsky, "Instance Normalization: The Missing Ingredient
       for Fast Stylization", 2016, https://arxiv.org/abs/1607.08022.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import instancenorm_forward
    >>> x = np.array([[[1.0, 3.0], [10.0, 30.0]]])
    >>> out, cache = instancenorm_forward(x, [1, 2], [0, 5], eps=0)
    >>> out
    array([[[-1.,  1.],
            [ 3.,  7.]]])
    """
    return _forward("instancenorm", x, gamma, beta, None, axis, eps, out, in_param, "in_param")


def instancenorm_backward(
    dout: ArrayLike,
    cache: NormCache,
    *,
    out: Array | None = None,
    needs: Sequence[str] = GRADIENTS,
) -> tuple[Any, ...]:
    """Gradients of instance normalization.

    Parameters
    ----------
    dout : array_like, shape of x
        Gradient with respect to the output of `instancenorm_forward`.
    cache : NormCache
        From `instancenorm_forward`.
    out, needs
        As for `layernorm_backward`.

    Returns
    -------
    dx : ndarray, shape and dtype of x
    dgamma, dbeta : ndarray, shape (C,), dtype of x (float32 for half types)
        None for one that was not given.

    Raises
    ------
    TypeError, ValueError
        As `layernorm_backward`.

    Notes
    -----
    With r = 1/sqrt(var + eps), and [ ] for the mean over the M places of a sample's channel::

        dx = gamma * r * (dout - [dout] - x_hat*[dout*x_hat])
        dgamma = sum dout*x_hat        dbeta = sum dout

    where the sums are over all samples and places. `bn_fast.reference.instancenorm_backward`
    derives it.

    References
    ----------
    .. [1] D. Ulyanov, A. Vedaldi and V. Lempitsky, "Instance Normalization: The Missing Ingredient
       for Fast Stylization", 2016, https://arxiv.org/abs/1607.08022.

    Examples
    --------
    >>> from bn_fast import instancenorm_backward, instancenorm_forward
    >>> out, cache = instancenorm_forward([[[1.0, 2.0, 6.0]]], [1], [0])
    >>> dx, dgamma, dbeta = instancenorm_backward([[[1.0, 0.0, 0.0]]], cache)
    >>> dx.round(4)
    array([[[ 0.1763, -0.2204,  0.0441]]])
    """
    return _backward("instancenorm", dout, cache, out, needs)


@refusing
def spatial_groupnorm_forward(
    x: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    G: int,
    gn_param: Mapping[str, Any] | None = None,
    *,
    eps: float | None = None,
    out: Array | None = None,
) -> tuple[Array, NormCache]:
    """`groupnorm_forward` for images, x of shape (N, C, H, W), under the course's name.

    gamma and beta may have shape (1, C, 1, 1), as CS231n's have, or (C,); so have their gradients.
    All else is as there.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import spatial_groupnorm_backward, spatial_groupnorm_forward
    >>> x = np.arange(32.0).reshape(2, 4, 2, 2)
    >>> gamma, beta = np.ones((1, 4, 1, 1)), np.zeros((1, 4, 1, 1))
    >>> out, cache = spatial_groupnorm_forward(x, gamma, beta, 2, {})
    >>> cache.group_mean
    array([[ 3.5, 11.5],
           [19.5, 27.5]])
    >>> dx, dgamma, dbeta = spatial_groupnorm_backward(np.ones_like(x), cache)
    >>> dbeta.shape
    (1, 4, 1, 1)
    """
    number = _norm_checks.epsilon(gn_param, "gn_param", eps)
    call = _norm_checks.groups(x, gamma, beta, G, 1, number, out, name="G", images=True)
    return _finish("groupnorm", call)


spatial_groupnorm_backward = groupnorm_backward


# Forward alone, for inference.


@refusing
def layer_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int | tuple[int, ...] = -1,
    out: Array | None = None,
) -> Array:
    """`layernorm_forward` without a cache: the result alone.

    Examples
    --------
    >>> from bn_fast import layer_norm
    >>> layer_norm([[1.0, 3.0], [10.0, 30.0]], eps=0)
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    return _forward_alone("layernorm", x, gamma, beta, None, axis, eps, out)


@refusing
def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int | tuple[int, ...] = -1,
    out: Array | None = None,
) -> Array:
    """`rmsnorm_forward` without a cache: the result alone.

    Examples
    --------
    >>> from bn_fast import rms_norm
    >>> rms_norm([1.0, 7.0], eps=0)
    array([0.2, 1.4])
    """
    return _forward_alone("rmsnorm", x, gamma, None, None, axis, eps, out)


@refusing
def group_norm(
    x: ArrayLike,
    num_groups: int,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    out: Array | None = None,
) -> Array:
    """`groupnorm_forward` without a cache: the result alone. Mind the order of the arguments.

    Examples
    --------
    >>> from bn_fast import group_norm
    >>> group_norm([[1.0, 3.0, 10.0, 30.0]], 2, eps=0)
    array([[-1.,  1., -1.,  1.]])
    """
    return _forward_alone("groupnorm", x, gamma, beta, num_groups, axis, eps, out)


@refusing
def instance_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    out: Array | None = None,
) -> Array:
    """`instancenorm_forward` without a cache: the result alone.

    Examples
    --------
    >>> from bn_fast import instance_norm
    >>> instance_norm([[[1.0, 3.0], [10.0, 30.0]]], eps=0)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    return _forward_alone("instancenorm", x, gamma, beta, None, axis, eps, out)
