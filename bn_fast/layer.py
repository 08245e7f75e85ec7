"""The layer: parameters, running statistics and their update, around the two functions.

`BatchNorm` keeps the state; what a batch's statistics and gradients are comes from two hooks,
`_forward_batch` and `_backward_batch`. A layer whose batch lies in several processes overrides
those two and nothing else.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from copy import copy
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _checks, _interchange, _layer_checks
from ._cache import Cache
from ._core import core
from ._layer_checks import MOST_BATCHES, Setting
from ._types import Array, Count, MaybeArray
from .functional import batchnorm_backward, batchnorm_forward, n_threads_for

__all__ = ["BatchNorm"]

_NO_BUFFER = None, None

A = TypeVar("A", bound=Array)

# What a pickle holds, by the names under which it is set again: the constructor's arguments, the
# arrays, and what has no check because only its owner reads it.
_SETTINGS = (
    "num_features", "axis", "eps", "momentum", "affine", "ddof", "dtype", "bad_batch",
    "reuse_buffers",
)  # fmt: skip
_STATISTICS = "running_mean", "running_var", "num_batches"
_AFFINE = "gamma", "beta"
_UNCHECKED = "dgamma", "dbeta", "_has_warned"
_LEFT_BY_CALLS = "_cache", "_trained", "_buffers"


class LoadedKeys(NamedTuple):
    """What `load_state_dict` did not find, and what it had no use for."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class BatchNorm:
    r"""Batch normalization as a layer that keeps its parameters and running statistics.

    Parameters
    ----------
    num_features : int
        C, the length of x along `axis`.
    axis : int, default 1
        The feature axis of x; negative counts from the end.
    eps : float, default 1e-5
        Added to the variance.
    momentum : float in [0, 1] or None, default 0.9
        Weight of the *old* running statistics, as in CS231n and Keras (PyTorch's is one minus
        this). None: cumulative average, every batch has the same weight whatever its size.
    affine : bool, default True
        Whether to scale by gamma and shift by beta.
    ddof : 0 or 1, default 0
        The running variance averages ``sum((x - mean)**2) / (M - ddof)``: 0 as CS231n, Keras and
        ONNX, 1 as PyTorch and Chainer. The batch itself is always normalized with ddof 0.
    dtype : float32 or float64, default float32
        Of gamma, beta and their gradients. x is computed in its own dtype.
    bad_batch : {'skip', 'raise', 'propagate'}, default 'skip'
        What to do with the running statistics when a training batch has fewer than two values for
        each feature, or a mean or variance that is not finite. 'skip': leave the batch out of them
        and warn, once in the life of a layer. 'raise': ValueError. 'propagate': average it in as it
        is. The output is the same under 'skip' and 'propagate': NaN spreads within its feature.
    reuse_buffers : bool, default False
        Write the output of `forward`, and dx of `backward`, into the array that the call before
        returned if x has the same shape, strides and dtype. Then each call, also one that raises
        because of a bad batch, overwrites the last result.

    Attributes
    ----------
    gamma, beta : ndarray, shape (C,), or None without `affine`
        Scale and shift, initially 1 and 0.
    dgamma, dbeta : ndarray, shape (C,), or None before the first `backward`
        Gradients, of the last `backward` alone: it replaces them.
    running_mean, running_var : ndarray, float64, shape (C,)
        Initially 0 and 1, with which a layer that was not trained leaves x nearly as it is. In
        double, because a long average of float32 stops moving. Each update makes new arrays.
    num_batches : int
        How many batches are in the running statistics.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If a size or value is wrong.
    AttributeError
        If `num_features`, `affine` or `dtype` is set later: the arrays are of them.

    See Also
    --------
    bn_fast.batchnorm_forward, bn_fast.batchnorm_backward : the same without state

    Notes
    -----
    After each training batch of M values for each feature, with its mean and biased variance::

        m = momentum                                 # or num_batches / (num_batches + 1) for None
        running_mean = m * running_mean + (1 - m) * mean
        running_var = m * running_var + (1 - m) * var * M / (M - ddof)
        num_batches = num_batches + 1

    The arguments, but for the three above, and the arrays may be set at any time and are checked as
    by the constructor. An array is kept as it is, not copied, where its dtype is the layer's.

    ``layer(x)`` is ``layer.forward(x)``, with all of its arguments.

    Copies and pickles hold the parameters, gradients, statistics and settings, not what `forward`
    left for `backward`; a pickle is checked when it is read. Several threads may call
    ``forward(x, training=False)`` at once, unless buffers are reused; train in one thread at a
    time.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import BatchNorm
    >>> layer = BatchNorm(2, momentum=None, dtype=np.float64)
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> layer.forward(x).round(3)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> layer.backward(np.ones_like(x))
    array([[0., 0.],
           [0., 0.]])
    >>> layer.dbeta
    array([2., 2.])
    >>> layer.running_var
    array([  1., 100.])
    >>> layer.forward(np.array([[2.0, 20.0]]), training=False)
    array([[0., 0.]])
    """

    num_features = Setting(_layer_checks.n_features, fixed=True)
    eps = Setting(_checks.epsilon)
    momentum = Setting(_layer_checks.momentum)
    affine = Setting(_layer_checks.flag, fixed=True)
    ddof: Setting[int] = Setting(partial(_layer_checks.choice, choices=(0, 1)))
    dtype = Setting(_layer_checks.dtype, fixed=True)
    bad_batch: Setting[str] = Setting(
        partial(_layer_checks.choice, choices=("skip", "raise", "propagate"))
    )
    num_batches = Setting(_layer_checks.count)

    # Where they are kept.
    _num_features: int
    _eps: float
    _momentum: float | None
    _affine: bool
    _ddof: int
    _dtype: np.dtype[Any]
    _bad_batch: str
    _num_batches: int

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.9,
        affine: bool = True,
        ddof: int = 0,
        dtype: DTypeLike = np.float32,
        bad_batch: str = "skip",
        reuse_buffers: bool = False,
    ) -> None:
        self._forget()
        self.num_features = num_features
        self.axis = axis
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.ddof = ddof
        self.dtype = dtype
        self.bad_batch = bad_batch
        self.reuse_buffers = reuse_buffers

        n = self._num_features
        self._gamma: Array = np.ones(n, self._dtype)
        self._beta: Array = np.zeros(n, self._dtype)
        self.dgamma: MaybeArray = None
        self.dbeta: MaybeArray = None
        self._running_mean = np.zeros(n)
        self._running_var = np.ones(n)
        self.num_batches = 0
        self._has_warned = False

    def _forget(self) -> None:
        """Drop what holds arrays of x's size."""
        self._cache: Any = None
        self._trained = False  # whether the cache is that of a training batch
        self._buffers: dict[str, tuple[object, Array]] = {}

    # More that is checked whenever it is set. Arrays are kept as they are where they fit, so that
    # `layer.gamma -= step` works in place.

    @property
    def axis(self) -> int:
        return self._axis

    @axis.setter
    def axis(self, value: int) -> None:
        self._axis = _checks.integer(value, "axis")
        self._forget()  # the x of the last forward has its features elsewhere

    @property
    def reuse_buffers(self) -> bool:
        return self._reuse_buffers

    @reuse_buffers.setter
    def reuse_buffers(self, value: bool) -> None:
        self._reuse_buffers = _layer_checks.flag(value, "reuse_buffers")
        self._buffers = {}

    @property
    def gamma(self) -> MaybeArray:
        return self._gamma if self._affine else None

    @gamma.setter
    def gamma(self, value: ArrayLike) -> None:
        if value is not self._gamma or not self._affine:  # after a step in place it is
            self._gamma = self._apart(self._affine_parameter(value, "gamma"))

    @property
    def beta(self) -> MaybeArray:
        return self._beta if self._affine else None

    @beta.setter
    def beta(self, value: ArrayLike) -> None:
        if value is not self._beta or not self._affine:
            self._beta = self._apart(self._affine_parameter(value, "beta"))

    @property
    def running_mean(self) -> NDArray[np.float64]:
        return self._running_mean

    @running_mean.setter
    def running_mean(self, value: ArrayLike) -> None:
        self._running_mean = self._apart(self._mean(value, "running_mean"))

    @property
    def running_var(self) -> NDArray[np.float64]:
        return self._running_var

    @running_var.setter
    def running_var(self, value: ArrayLike) -> None:
        self._running_var = self._apart(self._variance(value, "running_var"))

    def _affine_parameter(self, value: ArrayLike, name: str) -> Array:
        if not self._affine:
            raise AttributeError(f"{name} cannot be set: this layer was made with affine=False")
        array = _checks._parameter(value, name, self._num_features, self._axis)
        return _layer_checks.kept(array, self._dtype, name)

    def _mean(self, value: ArrayLike, name: str) -> NDArray[np.float64]:
        mean = _checks._parameter(value, name, self._num_features, self._axis)
        return mean.astype(float, copy=False)

    def _variance(self, value: ArrayLike, name: str) -> NDArray[np.float64]:
        var = _checks.variance(value, name, self._num_features, self._axis)
        return var.astype(float, copy=False)

    def _apart(self, array: A) -> A:
        """The array; a buffer that it lies in is given up, or the next output would be written
        over it."""
        for name, (_, buffer) in list(self._buffers.items()):
            if np.may_share_memory(buffer, array):
                del self._buffers[name]
        return array

    def __call__(
        self,
        x: ArrayLike,
        training: bool = True,
        *,
        update_running: bool = True,
        weights: ArrayLike | None = None,
    ) -> Array:
        """`forward`."""
        return self.forward(x, training, update_running=update_running, weights=weights)

    def forward(
        self,
        x: ArrayLike,
        training: bool = True,
        *,
        update_running: bool = True,
        weights: ArrayLike | None = None,
    ) -> Array:
        """Normalize x, with its own statistics in training, else with the running ones.

        Parameters
        ----------
        x : array_like, 2 or more dimensions, C long along `axis`
            Any dtype that `batchnorm_forward` takes, computed as there: float16 and bfloat16 as
            float32, integers and bool as float64. Any strides; never modified. Kept by reference
            for `backward`.
        training : bool, default True
            Whether to use, and average into the running statistics, those of x.
        update_running : bool, default True
            Whether a training batch is averaged into the running statistics; False leaves the layer
            as it is, whatever the batch.
        weights : array_like, optional
            Weight of each element in the statistics, as for `batchnorm_forward`: bool (a mask), or
            real and at least 0; broadcasts to x, and may differ from feature to feature.

        Returns
        -------
        out : ndarray
            Shape and memory order of x.

        Raises
        ------
        TypeError
            If x is not real-valued, or `training` or `update_running` no bool.
        ValueError
            If x has another number of features, the weights have a wrong shape or value, or x is a
            bad batch and `bad_batch` is 'raise'. The layer is then as it was.
        """
        if training is not True:
            training = _layer_checks.flag(training, "training")
        if update_running is not True:
            update_running = _layer_checks.flag(update_running, "update_running")
        x = self._features(x)
        out = self._buffer("out", x, x) if self._buffers else None
        if training:
            out, cache, n_values, count, mean, var = self._forward_batch(x, out, weights)
            if update_running:
                self._update(n_values, count, mean, var)
        else:
            param = {
                "mode": "test",
                "eps": self._eps,
                "running_mean": self._running_mean,
                "running_var": self._running_var,
            }
            # The copy: a step of gamma in place must not change what backward computes.
            out, cache = batchnorm_forward(
                x,
                self._gamma.copy(),
                self._beta,
                param,
                axis=self._axis,
                out=out,
                weights=weights,
            )
        self._cache, self._trained = cache, training
        if self._reuse_buffers:
            self._buffers["out"] = _layout(x), out
        return out

    def backward(self, dout: ArrayLike) -> Array:
        """Gradients of the last `forward`: returns dx, sets dgamma and dbeta.

        After ``forward(x, training=False)`` they are those of frozen statistics. It may be called
        again, and uses the gamma of the forward call.

        Parameters
        ----------
        dout : array_like, shape of x
            Gradient with respect to the output of `forward`.

        Returns
        -------
        dx : ndarray, shape and dtype of x

        Raises
        ------
        RuntimeError
            If there was no `forward`.
        TypeError, ValueError
            As `batchnorm_backward`. The layer is then as it was.
        """
        if self._cache is None:
            raise RuntimeError("backward needs a forward before it, and there was none")
        gradients = self._backward_batch if self._trained else _backward
        x = self._cache.x
        out = self._buffer("dx", x, dout, x) if self._buffers else None
        dx, dgamma, dbeta = gradients(dout, self._cache, out)
        if self._affine:
            fits = dgamma.dtype == self._dtype
            self.dgamma = dgamma if fits else dgamma.astype(self._dtype)
            self.dbeta = dbeta if fits else dbeta.astype(self._dtype)
        if self._reuse_buffers:
            self._buffers["dx"] = _layout(x), dx
        return dx

    def _features(self, x: Any) -> Array:
        if core.is_plain(x, self._gamma, self._beta, self._axis, None):  # the straight road
            plain: Array = x
            return plain
        return _layer_checks.features(x, self._num_features, self._axis)

    # The two hooks, and the only place where running statistics change.

    def _forward_batch(
        self, x: Array, out: Array | None, weights: ArrayLike | None
    ) -> tuple[Array, Any, Count, Count, NDArray[np.float64], NDArray[np.float64]]:
        """Output and cache (with an attribute x) of a training batch.

        And what `_update` takes, of the batch: M, the sum of M weights, mean and biased variance.
        """
        if weights is not None:
            return self._forward_weighted(x, out, weights)
        # Not through batchnorm_forward: all is checked, and its bn_param costs 3 us of 6.
        axis = self._axis % x.ndim
        gamma = self._gamma.copy()
        settings = True, self._eps, 0.0, None, None, 1.0  # no averages: _update has its own
        out, stats, _, _ = core.forward(
            x, gamma, self._beta, axis, out, settings, None, n_threads_for(x)
        )
        cache = Cache(x, gamma, self._beta, stats, axis, self._eps)
        count = x.size // self._num_features
        return out, cache, count, count, stats[0], stats[3]

    def _forward_weighted(
        self, x: Array, out: Array | None, weights: ArrayLike
    ) -> tuple[Array, Any, Count, Count, NDArray[np.float64], NDArray[np.float64]]:
        param = {"mode": "train", "eps": self._eps}
        out, cache = batchnorm_forward(
            x, self._gamma.copy(), self._beta, param, axis=self._axis, out=out, weights=weights
        )
        n_values: Count = x.size // self._num_features
        count: Any = n_values if cache.options is None else cache.options.sum_weights
        if cache.weights is not None:  # else they are all equal, and not 0
            others = tuple(d for d in range(x.ndim) if d != cache.axis)
            each = np.count_nonzero(cache.weights, axis=others)
            n_values = each if isinstance(count, np.ndarray) else int(each[0])
        mean, var = cache.stats[0], cache.stats[3]
        return out, cache, n_values, count, np.where(count > 0, mean, var), var  # NaN

    def _backward_batch(
        self, dout: ArrayLike, cache: Any, out: Array | None
    ) -> tuple[Array, Array, Array]:
        """dx, dgamma and dbeta of a training batch, from the cache that `_forward_batch` made."""
        return _backward(dout, cache, out)

    def _update(
        self, n_values: Count, count: Count, mean: NDArray[np.float64], var: NDArray[np.float64]
    ) -> None:
        """Average a training batch into the running statistics."""
        what = ""
        correction: Any = 1.0
        if self._ddof or type(count) is not int:
            correction = _checks.unbiasing(count, self._ddof)
        alike = type(correction) is float  # in all features
        if not alike:
            what = _few_values(n_values, count, correction)
        elif n_values < 2:  # one value has no variance: its 0 would pull running_var down
            what = f"the batch has {n_values} values for each feature, and a variance needs 2"
        elif not correction:
            what = f"the batch's weights sum to {count:g}, and an unbiased variance needs more"
        if not what and not (core.is_finite(mean) and core.is_finite(var)):
            feature = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(var)))[0]
            what = f"the batch's mean or variance of feature {feature} is not finite"
        if what:
            if self._bad_batch == "raise":
                raise ValueError(f"{what}; bad_batch='raise'")
            if self._bad_batch == "skip":
                if not self._has_warned:
                    warnings.warn(
                        f"{what}: running_mean and running_var are left as they were (said once;"
                        " bad_batch='raise' or 'propagate' does otherwise)",
                        RuntimeWarning,
                        stacklevel=_stacklevel_outside(),
                    )
                self._has_warned = True
                return
        n = self._num_batches
        m = self._momentum
        old, new = (n / (n + 1), 1 / (n + 1)) if m is None else (m, 1 - m)
        running_mean = core.averaged(self._running_mean, mean, old, new)
        if alike:
            running_var = core.averaged(self._running_var, var, old, new * (correction or np.nan))
        else:
            share = new * np.where(correction == 0, np.nan, correction)
            running_var = old * self._running_var + share * var
        self._running_mean, self._running_var = running_mean, running_var
        self._num_batches = n + 1 if n < MOST_BATCHES else n

    def _buffer(self, name: str, like: Array, *inputs: ArrayLike) -> Array | None:
        """The array to write into: that of the last call if it fits and is apart from all inputs.

        Else None, for a new one.
        """
        key, buffer = self._buffers.get(name, _NO_BUFFER)
        if buffer is None or key != _layout(like):
            return None
        arrays = (a for a in inputs if isinstance(a, np.ndarray))
        return None if any(np.may_share_memory(buffer, a) for a in arrays) else buffer

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of gamma, beta (with `affine`), running_mean, running_var and num_batches.

        All are arrays, so ``np.savez(file, **layer.state_dict())`` keeps them, and
        ``layer.load_state_dict(np.load(file))`` brings them back.
        """
        state: dict[str, NDArray[Any]] = {}
        if self.affine:
            state |= {"gamma": self._gamma.copy(), "beta": self._beta.copy()}
        state |= {
            "running_mean": self._running_mean.copy(),
            "running_var": self._running_var.copy(),
        }
        return state | {"num_batches": np.array(self.num_batches, np.int64)}

    def load_state_dict(self, state: Mapping[str, ArrayLike], *, strict: bool = True) -> LoadedKeys:
        """Take the state that `state_dict` gave, all of it or, on an error, nothing.

        gamma and beta are written to in place, so that they stay those to which an optimizer holds
        references; the running statistics become new arrays, as with each update.

        Parameters
        ----------
        state : mapping
            Of the names of `state_dict`, or PyTorch's: weight (gamma), bias (beta), running_mean,
            running_var, num_batches_tracked (num_batches). Only the names differ: the momentum
            stays, and so does `ddof`, which is 1 in PyTorch.
        strict : bool, default True
            False: what is missing stays as it is, and what is unexpected is not looked at.

        Returns
        -------
        LoadedKeys
            ``missing_keys`` and ``unexpected_keys``, two lists, empty when `strict`.

        Raises
        ------
        TypeError
            If `state` is no mapping, or `strict` no bool.
        ValueError
            If a key is missing or unexpected (when `strict`), there under both of its names, or its
            value has the wrong shape, kind or sign; the message names all of them.
        """
        strict = _layer_checks.flag(strict, "strict")
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        checks = {
            "gamma": self._affine_parameter,
            "beta": self._affine_parameter,
            "running_mean": self._mean,
            "running_var": self._variance,
            "num_batches": _layer_checks.count,
        }
        own = (*(_AFFINE if self._affine else ()), *_STATISTICS)
        names: dict[str, str] = {}  # ours, and those of the state
        wrong = []
        for name in state:
            key = _interchange.TORCH_NAMES.get(name, name)
            if key in names:
                wrong.append(f"{names[key]!r} and {name!r} are the same")
            names[key] = name
        missing = [key for key in own if key not in names]
        unexpected = [name for key, name in names.items() if key not in own]
        if strict:
            wrong += [f"{key!r} is missing" for key in missing]
            wrong += [f"{name!r} is unexpected" for name in unexpected]
        found: dict[str, Any] = {}
        for key in own:
            if key in names:
                try:
                    # A copy: the state may lie over the arrays that are written to.
                    found[key] = copy(checks[key](state[names[key]], repr(names[key])))
                except (TypeError, ValueError) as error:
                    wrong.append(str(error))
        if wrong:
            raise ValueError(f"state does not fit {self!r}: {'; '.join(wrong)}")
        for key, value in found.items():
            array = getattr(self, f"_{key}")
            if key in _AFFINE and self._is_own(array):
                array[...] = value
            else:
                setattr(self, key, value)
        return LoadedKeys(missing, unexpected)

    def _is_own(self, parameter: Array) -> bool:
        """Whether gamma or beta can be written to, and that without changing the other."""
        apart = not np.may_share_memory(self._gamma, self._beta)
        return parameter.flags.writeable and apart

    def fold_into(
        self, weight: ArrayLike, bias: ArrayLike | None = None, *, axis: int = 0, groups: int = 1
    ) -> tuple[Array, Array]:
        """Weight and bias of the linear map or convolution before this layer, with it folded in.

        Output channels are taken to lie along the first axis of weight, as in PyTorch's Linear and
        Conv. Others need `axis`: where weight is square, nothing else tells them.

        Parameters
        ----------
        weight : array_like, 2 or more dimensions, C long along `axis`
            Of a map whose output this layer normalizes, feature by feature.
        bias : array_like, shape (C,), optional
            None: zeros.
        axis : int, default 0
            The axis of weight's output channels:

            - 0: PyTorch's Linear (C, in), Conv1d, 2d and 3d (C, in/groups, ...);
            - 1: PyTorch's ConvTranspose1d, 2d and 3d (in, C/groups, ...);
            - -1: ``x @ weight`` with weight (in, C), as in CS231n; Keras' Dense and Conv
              (..., in, C);
            - -2: Keras' ConvTranspose (..., C, in).
        groups : int, default 1
            PyTorch's. It matters for ``axis=1``, where weight is C/groups long.

        Returns
        -------
        weight, bias : ndarray
            New arrays of weight's shape and dtype (float64 for integers), computed in double.

        Raises
        ------
        TypeError
            If an argument is of the wrong kind.
        ValueError
            If a shape is wrong; ``running_var + eps`` is 0 for a feature; a finite weight or bias
            would become infinite or NaN in weight's dtype, or all weights of a feature 0.

        Notes
        -----
        With r = 1/sqrt(running_var + eps), for each feature, so that ``forward(map(x),
        training=False)`` is ``folded_map(x)``::

            weight' = gamma * r * weight
            bias' = gamma * r * (bias - running_mean) + beta

        Examples
        --------
        >>> import numpy as np
        >>> from bn_fast import BatchNorm
        >>> layer = BatchNorm(2, eps=0)
        >>> layer.running_mean, layer.running_var = [1, 2], [4, 16]
        >>> layer.fold_into(np.array([[1.0, 2.0], [3.0, 4.0]]))
        (array([[0.5 , 1.  ],
               [0.75, 1.  ]]), array([-0.5, -0.5]))
        >>> layer.fold_into(np.array([[1.0, 2.0], [3.0, 4.0]]), axis=-1)[0]
        array([[0.5, 0.5],
               [1.5, 1. ]])
        """
        split, axes, offset = _layer_checks.weights(weight, bias, self._num_features, axis, groups)
        var = self._running_var + self._eps
        if not var.all():
            raise ValueError(
                f"running_var + eps must not be 0, got 0 for feature {np.flatnonzero(var == 0)[0]}"
            )
        others = tuple(d for d in range(split.ndim) if d not in axes)
        with np.errstate(all="ignore"):  # what is lost is said below
            scale = self._gamma / np.sqrt(var)
            factors = np.expand_dims(scale.reshape([split.shape[d] for d in axes]), others)
            folded = (split * factors).astype(split.dtype)
            shifted = (scale * (offset - self._running_mean) + self._beta).astype(split.dtype)
        shape = np.shape(weight)
        _layer_checks.check_kept(split.reshape(shape), folded.reshape(shape), "folded weight")
        _layer_checks.check_kept(offset, shifted, "folded bias")
        had, has = ((array != 0).any(axis=others).reshape(-1) for array in (split, folded))
        lost = np.flatnonzero(had & ~has & (self._gamma != 0) & np.isfinite(var))
        if lost.size:
            raise ValueError(
                f"folded weight must fit {split.dtype}, got that of feature {lost[0]}, which would"
                " be 0 throughout"
            )
        return folded.reshape(shape), shifted

    @classmethod
    def from_torch(cls, module: Any, **settings: Any) -> Self:
        """A layer like a ``torch.nn.BatchNorm1d``, ``2d``, ``3d`` or ``SyncBatchNorm``.

        Parameters
        ----------
        module : torch.nn.Module
            It is read; nothing is shared with it.
        **settings
            Arguments of the constructor that shall differ, for instance ``axis=-1``.

        Returns
        -------
        BatchNorm
            It evaluates as the module does and goes on as the module would: with one minus its
            momentum, ``ddof=1`` and its number of batches. float64 for float64, else float32.

        Raises
        ------
        TypeError
            If `module` is none of them (a lazy one is after its first call), or does more: a
            subclass with a forward of its own, parametrizations, forward hooks.
        ValueError
            If it has ``track_running_stats=False``, or is on the meta device.

        Notes
        -----
        gamma is PyTorch's weight, beta its bias, num_batches its num_batches_tracked.
        """
        return cls._from(*_interchange.from_torch(module), settings)

    def to_torch(self, module: Any) -> None:
        """Write parameters, statistics, eps and momentum into a ``torch.nn.BatchNorm`` module.

        It then evaluates as this layer does, but goes on with the unbiased variance, whatever
        `ddof` is here: PyTorch has no other. With nothing but 1 in gamma, 0 in beta, the module
        may be without weight and bias.

        Raises
        ------
        TypeError, ValueError
            If `module` is none that `from_torch` takes, cannot keep gamma or beta, has another
            number of features, or a dtype in which a value would become infinite or a variance 0.
            It is then as it was.
        """
        _interchange.to_torch(module, self.state_dict(), self.eps, self.momentum)

    @classmethod
    def from_keras(cls, layer: Any, **settings: Any) -> Self:
        """A layer like a built ``keras.layers.BatchNormalization``.

        Parameters
        ----------
        layer : keras.layers.BatchNormalization
            It is read; nothing is shared with it.
        **settings
            Arguments of the constructor that shall differ.

        Returns
        -------
        BatchNorm
            It evaluates as the layer does and goes on as the layer would, with its axis and
            momentum, and ``ddof=0``. float64 for float64, else float32.

        Raises
        ------
        TypeError
            If `layer` is none, or of a subclass with a call of its own.
        ValueError
            If it is not built, or was made with ``renorm=True``.

        Notes
        -----
        running_mean and running_var are Keras' moving_mean and moving_variance. Keras counts no
        batches, so num_batches begins at 0.
        """
        return cls._from(*_interchange.from_keras(layer), settings)

    def to_keras(self, layer: Any) -> None:
        """Write parameters, statistics, eps and momentum into a ``keras`` BatchNormalization.

        It then evaluates as this layer does, if its axis, which stays, is the same; it goes on with
        the biased variance, whatever `ddof` is here: Keras has no other.

        Raises
        ------
        TypeError, ValueError
            If `layer` is none that `from_keras` takes, cannot keep gamma or beta, has another
            number of features or a dtype in which a value would become infinite or a variance 0, or
            if `momentum` is None here. It is then as it was.
        """
        _interchange.to_keras(layer, self.state_dict(), self.eps, self.momentum)

    @classmethod
    def _from(cls, found: dict[str, Any], state: _interchange.State, settings: Any) -> Self:
        made = cls(**(found | settings))
        made.load_state_dict(state)
        return made

    def __getstate__(self) -> dict[str, Any]:
        named = (*_SETTINGS, *_AFFINE, *_STATISTICS)
        left_out = {*(f"_{name}" for name in named), *_LEFT_BY_CALLS}
        rest = {name: value for name, value in vars(self).items() if name not in left_out}
        return {name: getattr(self, name) for name in named} | rest

    def __setstate__(self, state: dict[str, Any]) -> None:
        """All is checked as in the constructor and the setters, before C reads any of it."""
        named = (*_SETTINGS, *_AFFINE, *_STATISTICS, *_UNCHECKED)
        missing = [name for name in named if name not in state]
        if missing:
            raise ValueError(
                f"state of a {type(self).__name__} must have {missing[0]!r}, got one without: it"
                " was made by another version of bn_fast"
            )
        vars(self).update({name: state[name] for name in state if name not in named})
        BatchNorm.__init__(self, **{name: state[name] for name in _SETTINGS})
        for name in (*(_AFFINE if self._affine else ()), *_STATISTICS, *_UNCHECKED):
            setattr(self, name, state[name])

    def __repr__(self) -> str:
        names = ["axis", "eps", "momentum", "affine", "ddof"]
        settings = [f"{name}={getattr(self, name)!r}" for name in names]
        settings.append(f"dtype={self.dtype.name!r}")
        if self.bad_batch != "skip":
            settings.append(f"bad_batch={self.bad_batch!r}")
        if self.reuse_buffers:
            settings.append("reuse_buffers=True")
        return f"{type(self).__name__}({self.num_features}, {', '.join(settings)})"


def _backward(dout: ArrayLike, cache: Any, out: Array | None) -> tuple[Array, Array, Array]:
    return batchnorm_backward(dout, cache, out=out)


def _stacklevel_outside() -> int:
    """The `stacklevel` at which the caller's warning is about the code that called bn_fast."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "bn_fast":
        level, frame = level + 1, frame.f_back
    return level


def _few_values(n_values: Any, count: Any, correction: Array) -> str:
    """What is wrong with a batch whose features differ in how many values they have, if it is."""
    f = int(np.argmin(n_values))
    if np.min(n_values) < 2:
        return f"the batch has {np.min(n_values)} values for feature {f}, and a variance needs 2"
    f = int(np.argmin(count))
    if correction[f] == 0:
        return (
            f"the batch's weights of feature {f} sum to {count[f]:g}, and an unbiased variance"
            " needs more"
        )
    return ""


def _layout(x: Array) -> object:
    return x.shape, x.strides, x.dtype
