"""The layer: parameters, running statistics and their update, around the two functions.

`BatchNorm` keeps the state; what a batch's statistics and gradients are comes from two hooks,
`_forward_batch` and `_backward_batch`. A layer whose batch lies in several processes overrides
those two and nothing else.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _checks, _interchange, _layer_checks
from ._cache import Cache
from ._core import core
from ._types import Array
from .functional import batchnorm_backward, batchnorm_forward, n_threads_for

__all__ = ["BatchNorm"]

_NO_BUFFER = None, None


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

    Copies and pickles hold the parameters, gradients, statistics and settings, not what `forward`
    left for `backward`. Several threads may call ``forward(x, training=False)`` at once, unless
    buffers are reused; train in one thread at a time.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.

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

    _warns_at = 3  # the frame that called `forward`, from `_update`

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
        self.num_features = _layer_checks.n_features(num_features)
        self.axis = _layer_checks.integer(axis, "axis")
        self.eps = _checks.epsilon(eps)
        self.momentum = _layer_checks.momentum(momentum)
        self.affine = _layer_checks.flag(affine, "affine")
        self.ddof: int = _layer_checks.choice(ddof, "ddof", (0, 1))
        self.dtype = _layer_checks.dtype(dtype)
        self.bad_batch: str = _layer_checks.choice(
            bad_batch, "bad_batch", ("skip", "raise", "propagate")
        )
        self.reuse_buffers = _layer_checks.flag(reuse_buffers, "reuse_buffers")

        n = self.num_features
        self._gamma = np.ones(n, self.dtype)
        self._beta = np.zeros(n, self.dtype)
        self.dgamma: Array | None = None
        self.dbeta: Array | None = None
        self._running_mean = np.zeros(n)
        self._running_var = np.ones(n)
        self.num_batches = 0
        self._has_warned = False
        self._forget()

    def _forget(self) -> None:
        """Drop what holds arrays of x's size."""
        self._cache: Any = None
        self._trained = False  # whether the cache is that of a training batch
        self._buffers: dict[str, tuple[object, Array]] = {}

    # State that callers may replace: checked, and kept as it is where it fits, so that
    # `layer.gamma -= step` works in place.

    @property
    def gamma(self) -> Array | None:
        return self._gamma if self.affine else None

    @gamma.setter
    def gamma(self, value: ArrayLike) -> None:
        self._gamma = self._affine_parameter(value, "gamma")

    @property
    def beta(self) -> Array | None:
        return self._beta if self.affine else None

    @beta.setter
    def beta(self, value: ArrayLike) -> None:
        self._beta = self._affine_parameter(value, "beta")

    @property
    def running_mean(self) -> NDArray[np.float64]:
        return self._running_mean

    @running_mean.setter
    def running_mean(self, value: ArrayLike) -> None:
        self._running_mean = self._per_feature(value, "running_mean").astype(float, copy=False)

    @property
    def running_var(self) -> NDArray[np.float64]:
        return self._running_var

    @running_var.setter
    def running_var(self, value: ArrayLike) -> None:
        self._running_var = self._variance(value, "running_var")

    def _per_feature(self, value: ArrayLike, name: str) -> Array:
        return _checks._parameter(value, name, self.num_features, self.axis)

    def _affine_parameter(self, value: ArrayLike, name: str) -> Array:
        if not self.affine:
            raise AttributeError(f"{name} cannot be set: this layer was made with affine=False")
        return self._per_feature(value, name).astype(self.dtype, copy=False)

    def _variance(self, value: ArrayLike, name: str) -> NDArray[np.float64]:
        var = _checks.variance(value, name, self.num_features, self.axis)
        return var.astype(float, copy=False)

    def forward(self, x: ArrayLike, training: bool = True) -> Array:
        """Normalize x, with its own statistics in training, else with the running ones.

        Parameters
        ----------
        x : array_like, 2 or more dimensions, C long along `axis`
            Any dtype that `batchnorm_forward` takes, computed as there: float16 and bfloat16 as
            float32, integers and bool as float64. Any strides; never modified. Kept by reference
            for `backward`.
        training : bool, default True
            Whether to use, and average into the running statistics, those of x.

        Returns
        -------
        out : ndarray
            Shape and memory order of x.

        Raises
        ------
        TypeError
            If x is not real-valued or `training` no bool.
        ValueError
            If x has another number of features, or is a bad batch and `bad_batch` is 'raise'. The
            layer is then as it was.
        """
        if training is not True:
            training = _layer_checks.flag(training, "training")
        x = self._features(x)
        out = self._buffer("out", x, x) if self._buffers else None
        if training:
            out, cache, count, mean, var = self._forward_batch(x, out)
            self._update(count, mean, var)
        else:
            param = {
                "mode": "test",
                "eps": self.eps,
                "running_mean": self._running_mean,
                "running_var": self._running_var,
            }
            # The copy: a step of gamma in place must not change what backward computes.
            out, cache = batchnorm_forward(
                x, self._gamma.copy(), self._beta, param, axis=self.axis, out=out
            )
        self._cache, self._trained = cache, training
        if self.reuse_buffers:
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
        if self.affine:
            fits = dgamma.dtype == self.dtype
            self.dgamma = dgamma if fits else dgamma.astype(self.dtype)
            self.dbeta = dbeta if fits else dbeta.astype(self.dtype)
        if self.reuse_buffers:
            self._buffers["dx"] = _layout(x), dx
        return dx

    def _features(self, x: Any) -> Array:
        if core.is_plain(x, self._gamma, self._beta, self.axis, None):  # the straight road
            plain: Array = x
            return plain
        return _layer_checks.features(x, self.num_features, self.axis)

    # The two hooks, and the only place where running statistics change.

    def _forward_batch(
        self, x: Array, out: Array | None
    ) -> tuple[Array, Any, int, NDArray[np.float64], NDArray[np.float64]]:
        """Output and cache (with an attribute x) of a training batch.

        And what `_update` takes, of the batch: M, mean and biased variance.
        """
        # Not through batchnorm_forward: all is checked, and its bn_param costs 3 us of 6.
        axis = self.axis % x.ndim
        gamma = self._gamma.copy()
        out, stats = core.forward(x, gamma, self._beta, axis, self.eps, out, None, n_threads_for(x))
        cache = Cache(x, gamma, stats, axis, self.eps, False, True)
        return out, cache, x.size // self.num_features, stats[0], stats[3]

    def _backward_batch(
        self, dout: ArrayLike, cache: Any, out: Array | None
    ) -> tuple[Array, Array, Array]:
        """dx, dgamma and dbeta of a training batch, from the cache that `_forward_batch` made."""
        return _backward(dout, cache, out)

    def _update(self, count: int, mean: NDArray[np.float64], var: NDArray[np.float64]) -> None:
        """Average a training batch into the running statistics."""
        what = ""
        if count < 2:  # one value has no variance: its 0 would pull running_var down
            what = f"the batch has {count} values for each feature, and a variance needs 2"
        elif not (core.are_finite(mean) and core.are_finite(var)):
            feature = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(var)))[0]
            what = f"the batch's mean or variance of feature {feature} is not finite"
        if what:
            if self.bad_batch == "raise":
                raise ValueError(f"{what}; bad_batch='raise'")
            if self.bad_batch == "skip":
                if not self._has_warned:
                    warnings.warn(
                        f"{what}: running_mean and running_var are left as they were (said once;"
                        " bad_batch='raise' or 'propagate' does otherwise)",
                        RuntimeWarning,
                        stacklevel=self._warns_at,
                    )
                self._has_warned = True
                return
        n = self.num_batches
        m = self.momentum
        old, new = (n / (n + 1), 1 / (n + 1)) if m is None else (m, 1 - m)
        if self.ddof:
            var = var * (count / (count - self.ddof) if count > self.ddof else np.nan)
        running_mean, running_var = self._running_mean.copy(), self._running_var.copy()
        core.update_average(running_mean, mean, old, new)
        core.update_average(running_var, var, old, new)
        self._running_mean, self._running_var = running_mean, running_var
        self.num_batches = n + 1

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

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Take the state that `state_dict` gave, all of it or, on an error, nothing.

        Raises
        ------
        TypeError
            If `state` is no mapping.
        ValueError
            If a key is missing, unexpected, or its value has the wrong shape, kind or sign; the
            message names all of them.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        own = self.state_dict()
        wrong = [f"{key!r} is missing" for key in own if key not in state]
        wrong += [f"{key!r} is unexpected" for key in state if key not in own]
        found: dict[str, Any] = {}
        for key in own:
            if key in state:
                try:
                    check = {"running_var": self._variance, "num_batches": _layer_checks.count}
                    found[key] = check.get(key, self._per_feature)(state[key], repr(key))
                except (TypeError, ValueError) as error:
                    wrong.append(str(error))
        if wrong:
            raise ValueError(f"state does not fit {self!r}: {'; '.join(wrong)}")
        if self.affine:
            self._gamma = found["gamma"].astype(self.dtype)
            self._beta = found["beta"].astype(self.dtype)
        self._running_mean = found["running_mean"].astype(float)
        self._running_var = found["running_var"].astype(float)
        self.num_batches = found["num_batches"]

    def fold_into(self, weight: ArrayLike, bias: ArrayLike | None = None) -> tuple[Array, Array]:
        """Weight and bias of the linear map or convolution before this layer, with it folded in.

        Parameters
        ----------
        weight : array_like, shape (C, in) or (C, in, kh, kw), or any other with C rows
            Of a map whose output this layer normalizes, feature by feature. (CS231n's ``x @ w``
            has w of shape (in, C): give ``w.T``.)
        bias : array_like, shape (C,), optional
            None: zeros.

        Returns
        -------
        weight, bias : ndarray
            New arrays of weight's dtype (float64 for integers), computed in double.

        Raises
        ------
        TypeError
            If weight or bias is not real-valued.
        ValueError
            If a shape is wrong, or ``running_var + eps`` is 0 for a feature.

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
        >>> layer.fold_into(np.eye(2))
        (array([[0.5 , 0.  ],
               [0.  , 0.25]]), array([-0.5, -0.5]))
        """
        weight, offset = _layer_checks.weights(weight, bias, self.num_features)
        var = self._running_var + self.eps
        if not var.all():
            raise ValueError(
                f"running_var + eps must not be 0, got 0 for feature {np.flatnonzero(var == 0)[0]}"
            )
        scale = self._gamma / np.sqrt(var)
        folded = weight * scale.reshape((-1,) + (1,) * (weight.ndim - 1))
        offset = scale * (offset - self._running_mean) + self._beta
        return folded.astype(weight.dtype), offset.astype(weight.dtype)

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
            If `module` is none of them.
        ValueError
            If it has ``track_running_stats=False``.

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
            If `module` is no such module, cannot keep gamma or beta, has another number of features
            or ``track_running_stats=False``. It is then as it was.
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
            If `layer` is none.
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
            If `layer` is no such layer, is not built, cannot keep gamma or beta, has another number
            of features, or `momentum` is None here. It is then as it was.
        """
        _interchange.to_keras(layer, self.state_dict(), self.eps, self.momentum)

    @classmethod
    def _from(cls, found: dict[str, Any], state: _interchange.State, settings: Any) -> Self:
        made = cls(**(found | settings))
        made.load_state_dict(state)
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_cache", "_trained", "_buffers"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

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


def _layout(x: Array) -> object:
    return x.shape, x.strides, x.dtype
