"""Batch norm of dask arrays, lazily: statistics block by block, then every block by those of all.

What the blocks find travels as arrays with a column for each feature, cut along the features as x
is, so that dask needs to know nothing of `Moments`. They are merged in the order of the blocks,
which fixes the bits whichever worker was first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

try:
    import dask
    import dask.array as da
    from dask.delayed import Delayed
except ImportError as error:
    raise ImportError("bn_fast.dask needs dask: pip install dask") from error

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _cache, _checks, pieces
from ._core import core
from ._moments import Moments, from_rows, statistics, to_rows
from ._types import Array, parameter_dtype
from .functional import n_threads_for

__all__ = ["batchnorm_backward", "batchnorm_forward", "moments", "normalize"]

# How many blocks' results are merged by one task. Dask's own number can be configured, and another
# one may change the last digit.
_MERGED_AT_ONCE = 16


class Cache(NamedTuple):
    """What `batchnorm_backward` needs; nothing is computed before its result is."""

    x: Any
    gamma: Any
    has_beta: bool
    packed: Any
    axis: int
    eps: float

    @property
    def moments(self) -> Any:
        """The batch's `Moments`, delayed, for running statistics of one's own."""
        return _delayed_moments(self.packed)


def moments(x: Any, *, axis: int = 1) -> Any:
    """Count, mean and sum of squared deviations of each feature, in one pass over the blocks.

    Parameters
    ----------
    x : dask.array.Array, 2 or more dimensions
        Of any dtype that `bn_fast.moments` takes, in any chunks, also along the features.
    axis : int, default 1
        The feature axis; negative counts from the end.

    Returns
    -------
    dask.delayed.Delayed
        Whose ``compute()`` gives `bn_fast.Moments`; `normalize` takes both. (Name it last in a
        ``dask.compute`` with arrays: dask 2026.8 gives the arrays first, whatever their order.)

    Raises
    ------
    TypeError
        If x is no dask array of real numbers.
    ValueError
        If x has fewer than 2 dimensions, or an unknown number of features.

    Notes
    -----
    The moments of the blocks are merged in the order of the blocks, 16 at a time: the bits depend
    on the chunks, not on the scheduler, its workers and threads.

    Examples
    --------
    >>> import dask.array as da
    >>> from bn_fast.dask import moments
    >>> x = da.arange(20.0).reshape(10, 2).rechunk((3, 1))
    >>> moments(x).compute()
    Moments(count=10, mean=[ 9. 10.], m2=[330. 330.])
    """
    _, axis = _like(x, axis)
    return _delayed_moments(_moments_of_blocks(x, axis))


def normalize(
    x: Any,
    mean: Any,
    var: Any = None,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
) -> Any:
    """Normalize with statistics that are given: ``gamma * (x - mean) / sqrt(var + eps) + beta``.

    ``normalize(x, moments, gamma=..., beta=...)`` or ``normalize(x, mean, var, gamma, beta)``, the
    test mode of batch norm.

    Parameters
    ----------
    x : dask.array.Array, 2 or more dimensions
        C features along `axis`.
    mean : Moments, delayed Moments as `moments` gives them, or array_like, shape (C,)
    var : array_like, shape (C,)
        Left out after moments.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift; None: 1 and 0. They, mean and var may be dask arrays.
    eps : float, default 1e-5
        Added to the variance; at least 0.
    axis : int, default 1
        The feature axis; negative counts from the end.

    Returns
    -------
    dask.array.Array
        Shape and chunks of x; float64 for integers and bool, else its dtype.

    Raises
    ------
    TypeError
        If x is no dask array of real numbers, or var is given beside moments.
    ValueError
        If a shape, size or value is wrong; what only the values tell is said when they are
        computed.

    Notes
    -----
    A lazy ``normalize(x, moments(x))`` is computed in one go, for which dask keeps the blocks of x
    until all moments are known. Where x is larger than the memory of all workers compute the
    moments first; x is then read twice.

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> from bn_fast.dask import moments, normalize
    >>> x = da.from_array(np.array([[1.0, 10.0], [3.0, 30.0]]), chunks=1)
    >>> normalize(x, moments(x).compute(), eps=0).compute()
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    like, axis = _like(x, axis)
    eps = _checks.epsilon(eps)
    affine = _or_none(gamma, "gamma", x, axis), _or_none(beta, "beta", x, axis)
    if not isinstance(mean, (Moments, Delayed)):
        given = _parameter(mean, "mean", x, axis), _parameter(var, "var", x, axis)
        return _over_blocks(_normalized_by, like, axis, (x,), (), (*given, *affine), eps=eps)
    if var is not None:
        raise TypeError("var must be left out where mean is a Moments (name gamma and beta)")
    packed = dask.delayed(_packed)(mean, x.shape[axis])
    packed = da.from_delayed(packed, (6, x.shape[axis]), meta=np.empty((0, 0)))
    packed = packed.rechunk((6, x.chunks[axis]))
    return _over_blocks(_normalized, like, axis, (x,), (packed,), affine, eps=eps)


def batchnorm_forward(
    x: Any,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    bn_param: None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
) -> tuple[Any, Cache]:
    """Batch normalization in train mode, with the statistics of all blocks together.

    Parameters
    ----------
    x : dask.array.Array, 2 or more dimensions
        Of any dtype that `bn_fast.batchnorm_forward` takes, in any chunks, also along the features.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift, dask arrays too; None: 1 and 0.
    bn_param : None
        There are no running averages: a dict, into which they would be stored, is refused.
    axis : int, default 1
        The feature axis; negative counts from the end.
    eps : float, default 1e-5
        Added to the variance; at least 0.

    Returns
    -------
    out : dask.array.Array
        Shape and chunks of x; float64 for integers and bool, else its dtype.
    cache : Cache
        For `batchnorm_backward`; ``cache.moments.compute()`` are the statistics.

    Raises
    ------
    TypeError
        If x is no dask array of real numbers.
    ValueError
        If a shape, size or value is wrong, or `bn_param` is not None.

    See Also
    --------
    normalize : the test mode; and what to do where x is larger than the memory

    Examples
    --------
    >>> import dask.array as da
    >>> import numpy as np
    >>> from bn_fast.dask import batchnorm_backward, batchnorm_forward
    >>> x = da.from_array(np.array([[1.0, 10.0], [3.0, 30.0]]), chunks=1)
    >>> out, cache = batchnorm_forward(x, np.ones(2), np.zeros(2))
    >>> out.compute().round(3)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> dx, dgamma, dbeta = batchnorm_backward(da.ones_like(x), cache)
    >>> dbeta.compute()
    array([2., 2.])
    """
    if bn_param is not None:
        raise ValueError(
            "bn_param must be None: running averages could not be stored into it before anything is"
            " computed. eps is an argument here, cache.moments are for averages of your own, and"
            " normalize(x, mean, var, gamma, beta) is the test mode"
        )
    like, axis = _like(x, axis)
    eps = _checks.epsilon(eps)
    affine = _or_none(gamma, "gamma", x, axis), _or_none(beta, "beta", x, axis)
    packed = _moments_of_blocks(x, axis)
    out = _over_blocks(_normalized, like, axis, (x,), (packed,), affine, eps=eps)
    return out, Cache(x, affine[0], beta is not None, packed, axis, eps)


def batchnorm_backward(dout: Any, cache: Cache) -> tuple[Any, Any, Any]:
    """Gradients of `batchnorm_forward`.

    Parameters
    ----------
    dout : dask.array.Array, shape of x
        Gradient with respect to the output; rechunked as x where its chunks differ.
    cache : Cache
        From `batchnorm_forward`.

    Returns
    -------
    dx : dask.array.Array, shape and chunks of x
    dgamma, dbeta : dask.array.Array, shape (C,), or None where gamma or beta was None

    Raises
    ------
    TypeError
        If `dout` is no dask array, or `cache` not from here.
    ValueError
        If `dout` has another shape than x.

    Notes
    -----
    Both sums are added up as the moments are. What is computed together, as by ``dask.compute(out,
    dx, dgamma, dbeta)``, shares its passes over x.
    """
    if not isinstance(cache, Cache):
        kind = type(cache).__name__
        raise TypeError(f"cache must come from bn_fast.dask.batchnorm_forward, got {kind}")
    x, gamma, has_beta, packed, axis, eps = cache
    dout = _as_cut(dout, x)
    like, _ = _like(x, axis)
    sums = _merged(_sums_of_block, _added, 2, (dout, x), (packed,), axis, eps=eps)
    dx = _over_blocks(_dx, like, axis, (dout, x), (packed, sums), (gamma,), eps=eps)
    dgamma, dbeta = sums.astype(parameter_dtype(like.dtype))
    return dx, None if gamma is None else dgamma, dbeta if has_beta else None


# -- arguments


def _like(x: Any, axis: int) -> tuple[Array, int]:
    """An empty array of the dtype of the result, and axis counted from 0."""
    if not isinstance(x, da.Array):
        raise TypeError(f"x must be a dask array, got {_checks._kind(x)}")
    if x.ndim < 2:
        raise ValueError(f"x must have 2 or more dimensions, got {x.ndim}: shape {x.shape}")
    like, axis = _checks._input(np.empty((0,) * x.ndim, x.dtype), "x"), _checks._axis(axis, x.ndim)
    if np.isnan(x.shape[axis]):
        raise ValueError(
            f"x must have a known number of features along axis {axis}, got shape {x.shape}: call"
            " x.compute_chunk_sizes()"
        )
    return like, axis


def _parameter(value: Any, name: str, x: Any, axis: int) -> Any:
    """A value for each feature, cut as x is."""
    n = x.shape[axis]
    if not isinstance(value, da.Array):
        # A copy: it is read when something is computed, and may have changed by then.
        value = _checks._parameter(value, name, n, axis).copy()
    elif value.shape != (n,) or value.dtype.kind not in "biuf":
        raise ValueError(
            f"{name} must have shape ({n},), one real number for each feature along axis {axis} of"
            f" x, got {value.shape} of {value.dtype}"
        )
    return da.asarray(value).rechunk((x.chunks[axis],))


def _or_none(value: Any, name: str, x: Any, axis: int) -> Any:
    return None if value is None else _parameter(value, name, x, axis)


def _as_cut(dout: Any, x: Any) -> Any:
    """dout in the chunks of x."""
    if not isinstance(dout, da.Array):
        raise TypeError(f"dout must be a dask array, got {_checks._kind(dout)}")
    known = not np.isnan([*x.shape, *dout.shape]).any()
    if dout.ndim != x.ndim or (known and dout.shape != x.shape):
        raise ValueError(f"dout must have the shape of x, {x.shape}, got {dout.shape}")
    if known:
        return dout.rechunk(x.chunks)
    if dout.numblocks != x.numblocks:
        raise ValueError(
            f"dout must be cut as x where sizes are unknown, in {x.numblocks} blocks, got"
            f" {dout.numblocks}"
        )
    return dout


# -- over all blocks


def _over_blocks(
    function: Callable[..., Array],
    like: Array,
    axis: int,
    arrays: tuple[Any, ...],
    found: tuple[Any, ...],
    parameters: tuple[Any, ...],
    **settings: Any,
) -> Any:
    """A function of blocks, of what was found for their features, and of parameters."""
    index = tuple(range(like.ndim))
    operands: list[Any] = []
    for array in arrays:
        operands += [array, index]
    for values in found:
        operands += [values, (like.ndim, axis)]
    for parameter in parameters:
        operands += [parameter, None if parameter is None else (axis,)]
    return da.blockwise(
        partial(function, axis=axis, **settings), index, *operands,
        concatenate=True, align_arrays=False, meta=like,
    )  # fmt: skip


def _merged(
    function: Callable[..., Array],
    merge: Callable[[list[Array]], Array],
    n_values: int,
    arrays: tuple[Any, ...],
    found: tuple[Any, ...],
    axis: int,
    **settings: Any,
) -> Any:
    """What a function finds in each block, shape (n_values, features), merged in their order."""
    ndim = arrays[0].ndim
    index = tuple(range(ndim))
    others = [d for d in index if d != axis]
    operands: list[Any] = []
    for array in arrays:
        operands += [array, index]
    for values in found:
        operands += [values, (ndim + 1, axis)]
    each = da.blockwise(
        partial(_of_block, function, axis=axis, **settings), (ndim, *index), *operands,
        new_axes={ndim: n_values}, adjust_chunks=dict.fromkeys(others, 1),
        concatenate=True, align_arrays=False, meta=np.empty((0,) * (ndim + 1)),
    )  # fmt: skip
    fold = partial(_fold, merge, feature_axis=axis + 1)
    return da.reduction(
        each, _as_it_is, partial(fold, last=True), combine=fold, axis=[d + 1 for d in others],
        dtype=np.float64, split_every=_MERGED_AT_ONCE, meta=np.empty((0, 0)),
    )  # fmt: skip


def _moments_of_blocks(x: Any, axis: int) -> Any:
    return _merged(_moments_of_block, _merged_moments, 6, (x,), (), axis)


def _delayed_moments(packed: Any) -> Any:
    # Not optimized, which renames the tasks: those that other results share would run twice.
    ((whole,),) = packed.rechunk(-1).to_delayed(optimize_graph=False)
    return dask.delayed(from_rows)(whole)


def _of_block(function: Callable[..., Array], *arrays: Array, axis: int, **settings: Any) -> Array:
    """What a function finds, with as many axes as `_fold` takes."""
    found = function(*arrays, axis=axis, **settings)
    shape = [1] * arrays[0].ndim
    shape[axis] = found.shape[1]
    return found.reshape(len(found), *shape)


def _as_it_is(each: Array, axis: Any, keepdims: bool) -> Array:
    return each


def _fold(
    merge: Callable[[list[Array]], Array],
    each: Array,
    axis: Any,
    keepdims: bool,
    feature_axis: int,
    last: bool = False,
) -> Array:
    """Merge what lies along all axes but those of values and features."""
    n_values, n_features, *blocks = np.moveaxis(each, feature_axis, 1).shape
    parts = np.moveaxis(each, (0, feature_axis), (-2, -1))
    merged = merge(list(parts.reshape(math.prod(blocks), n_values, n_features)))
    shape = [1] * each.ndim
    shape[0], shape[feature_axis] = merged.shape
    return merged if last else merged.reshape(shape)


# -- in one block


def _block(x: Array, name: str = "x") -> Array:
    """A block as every worker has it: what was sent lies contiguous, and bits may follow from how
    it lies."""
    x = _checks._input(x, name)
    return x if x.flags.forc else np.ascontiguousarray(x)


def _moments_of_block(x: Array, axis: int) -> Array:
    return _packed(pieces.moments(_block(x), axis=axis))


def _normalized(
    x: Array, packed: Array, gamma: Array | None, beta: Array | None, axis: int, eps: float
) -> Array:
    moments = from_rows(packed)
    return pieces.normalize(_block(x), moments, gamma=gamma, beta=beta, eps=eps, axis=axis)


def _normalized_by(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    axis: int,
    eps: float,
) -> Array:
    return pieces.normalize(_block(x), mean, var, gamma, beta, eps=eps, axis=axis)


def _sums_of_block(dout: Array, x: Array, packed: Array, axis: int, eps: float) -> Array:
    """dgamma and dbeta, as far as this block goes."""
    x = _block(x)
    dout = _checks.gradient(_block(dout, "dout"), x)
    stats = statistics(from_rows(packed), eps)
    sums: Array = core.backward_sums(dout, x, stats, axis, n_threads_for(x), True)
    return sums


def _dx(
    dout: Array, x: Array, packed: Array, sums: Array, gamma: Array | None, axis: int, eps: float
) -> Array:
    x = _block(x)
    dout = _checks.gradient(_block(dout, "dout"), x)
    whole = from_rows(packed)
    gamma = _checks._affine(gamma, "gamma", x, axis)
    sums = np.ascontiguousarray(sums)
    cache = _cache.Cache(x, gamma, None, statistics(whole, eps), axis, eps)
    dx: Array = core.backward_dx(dout, cache, sums, whole.count, None, n_threads_for(x))
    return dx


# -- numbers for each feature


def _packed(m: Moments, n_features: int | None = None) -> NDArray[np.float64]:
    """Count and all of the moments, shape (6, C)."""
    if n_features not in (None, m.mean.size):
        raise ValueError(f"moments must have {n_features} features, as x, got {m.mean.size}")
    return to_rows(m)


def _merged_moments(parts: list[Array]) -> NDArray[np.float64]:
    return _packed(reduce(Moments.merge, map(from_rows, parts)))


def _added(parts: list[Array]) -> Array:
    return reduce(np.add, parts)
