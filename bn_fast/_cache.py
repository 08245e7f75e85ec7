"""What a forward call leaves for its backward call."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ._types import Array, Axis, Count, parameter_dtype


def feature_shape(x: Array, axis: Axis) -> tuple[int, ...]:
    """That of parameters and statistics: the lengths of x along the features' axes."""
    return (x.shape[axis],) if isinstance(axis, int) else tuple([x.shape[d] for d in axis])


def shape_against(x: Array, axis: Axis) -> tuple[int, ...]:
    """The shape in which they broadcast against x, from the first of these axes on."""
    axes = (axis,) if isinstance(axis, int) else axis
    return tuple([x.shape[d] if d in axes else 1 for d in range(axes[0], x.ndim)])


class Options(NamedTuple):
    """What a forward call was asked for besides batch normalization."""

    activation: str | None
    negative_slope: float
    residual: Array | None
    weights: Array | None  # of the shape and dtype of x, by powers of two smaller than given
    total: Count  # of the weights of a feature; of each, in one dimension, where they differ
    residual_overwritten: bool
    sum_weights: Count | None = None  # as they were given, in the shape of the parameters

    @property
    def without_weight(self) -> bool:
        """Whether there is nothing to take statistics of."""
        return self.weights is not None and isinstance(self.total, float) and self.total == 0

    @property
    def counts_differ(self) -> bool:
        """Whether each feature has a count of its own."""
        return isinstance(self.sum_weights, np.ndarray)


class _Five:
    """What unpacks as five arrays, and comes back from a pickle as it was."""

    __slots__ = ()

    _names: ClassVar[tuple[str, ...]]

    def __setstate__(self, state: Any) -> None:
        """From a pickle or a copy; what the attributes are is looked at when they are used."""
        _, slots = state if isinstance(state, tuple) else (None, state)
        if not isinstance(slots, dict) or slots.keys() != set(self.__slots__):
            raise ValueError("cache cannot be used: it was pickled by another version of bn_fast")
        for name, value in slots.items():
            setattr(self, name, value)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(5))

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        name = self._names[index]
        return self._gamma() if name == "gamma" else getattr(self, name)

    def _gamma(self) -> Array | None:
        """gamma as it broadcasts against x."""
        raise NotImplementedError


class Cache(_Five):
    """Everything `batchnorm_backward` needs; holds x by reference and nothing else of its size.

    Unpacks as the five-tuple ``(mean, inv_var, x, x_hat, gamma)`` that hand-written NumPy code
    passes around, where ``inv_var`` is 1/sqrt(var + eps). The small arrays broadcast against x, and
    are float32 for an x of 16 bits; x_hat is computed when it is asked for, and gamma is None where
    none was given.

    Attributes
    ----------
    x : ndarray
        As given to the forward call, or converted.
    gamma, beta : ndarray or None
        The same, in the shapes in which they were given: those of their gradients. None: 1 and 0.
    stats : ndarray, float64, shape (4, n_features)
        Mean, the part of the mean beyond float64's digits, 1/sqrt(var + eps), var.
    axis : int or tuple of int
        The feature axis of x, or axes in ascending order.
    eps : float
        What was added to the variance; negative where that is not known, nor whether the mean is
        that of x to all digits: for a five-tuple that other code made.
    frozen : bool
        The statistics were given (test mode), so x has no influence on them.
    var : ndarray, float64
        The biased variance, ``((x - mean)**2).mean()``, as it broadcasts against x.
    count : float or ndarray
        M, how many values x has for each feature; with weights their sum, of each feature, as it
        broadcasts against x, if the weights differed between features.
    overwritten : str
        Which call wrote its output over x, so that no gradient can be had any more; else empty.
    options : Options or None
        What else the call was asked for; None: nothing. Each is an attribute of the cache too.
    """

    __slots__ = (
        "axis", "beta", "eps", "frozen", "gamma", "options", "overwritten", "stats", "x",
    )  # fmt: skip

    _names = ("mean", "inv_var", "x", "x_hat", "gamma")

    def __init__(
        self,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        stats: Array,
        axis: Axis,
        eps: float,
        frozen: bool = False,
        overwritten: str = "",
        options: Options | None = None,
    ) -> None:
        self.x = x
        self.gamma = gamma
        self.beta = beta
        self.stats = stats
        self.axis = axis
        self.eps = eps
        self.frozen = frozen
        self.overwritten = overwritten
        self.options = options

    @property
    def activation(self) -> str | None:
        return self.options.activation if self.options else None

    @property
    def negative_slope(self) -> float:
        return self.options.negative_slope if self.options else 0.01

    @property
    def residual(self) -> Array | None:
        return self.options.residual if self.options else None

    @property
    def weights(self) -> Array | None:
        return self.options.weights if self.options else None

    def _as_feature(self, values: Array) -> Array:
        """One value for each feature in the shape in which they broadcast against x."""
        return values.reshape(shape_against(self.x, self.axis))

    def _broadcastable(self, values: Array) -> Array:
        return self._as_feature(values.astype(parameter_dtype(self.x.dtype)))

    @property
    def mean(self) -> Array:
        return self._broadcastable(self.stats[0])

    @property
    def inv_var(self) -> Array:
        return self._broadcastable(self.stats[2])

    @property
    def var(self) -> Array:
        return self._as_feature(self.stats[3].copy())

    @property
    def count(self) -> Count:
        n_values: int = self.x.size // max(self.stats.shape[1], 1)
        given = None if self.options is None else self.options.sum_weights
        if isinstance(given, np.ndarray):
            return self._as_feature(given.copy())
        return n_values if given is None else given

    @property
    def x_hat(self) -> Array:
        if self.overwritten:
            raise ValueError(f"x_hat is lost: {self.overwritten} wrote its output over x")
        mean, mean_low, inv_std = (self._as_feature(row) for row in self.stats[:3])
        x_hat: Array = ((self.x - mean) - mean_low) * inv_std
        return x_hat.astype(self.x.dtype, copy=False)

    def _gamma(self) -> Array | None:
        if self.gamma is None:
            return None
        gamma: Array = self.gamma.astype(parameter_dtype(self.x.dtype))
        own = gamma.shape == feature_shape(self.x, self.axis)
        return self._as_feature(gamma) if own else gamma

    @property
    def parameter_shapes(self) -> tuple[tuple[int, ...] | None, ...]:
        """Those of gamma and beta, and so of their gradients; None where there was none."""
        return tuple([None if a is None else a.shape for a in (self.gamma, self.beta)])

    def __repr__(self) -> str:
        kind = "frozen statistics" if self.frozen else "batch statistics"
        return f"<bn_fast cache: x {self.x.shape} {self.x.dtype}, axis {self.axis}, {kind}>"


class Axes(NamedTuple):
    """Where a norm's statistics and parameters lie, in the axes of x seen in `shape`.

    That is the shape of x, but for group norm: there the axis of the channels is two, (groups,
    channels of a group), which any strides can show without a copy.
    """

    shape: tuple[int, ...]
    over: tuple[int, ...]  # the axes of a statistic's values
    along: tuple[int, ...]  # those that gamma and beta run along

    @property
    def stats_shape(self) -> tuple[int, ...]:
        return tuple([1 if d in self.over else n for d, n in enumerate(self.shape)])

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return tuple([n if d in self.along else 1 for d, n in enumerate(self.shape)])

    @property
    def n_values(self) -> int:
        """M, the number of values of a statistic."""
        return math.prod(self.shape[d] for d in self.over)


class NormCache(_Five):
    """What the backward functions of layer, RMS, group and instance norm need; as `Cache`.

    Unpacks as ``(mean, inv_std, x, x_hat, gamma)``. The statistics broadcast against x (those of
    groups are repeated for each channel), and are float32 for an x of 16 bits; x_hat is computed
    when it is asked for. RMS norm's mean is zeros.

    Attributes
    ----------
    norm : str
        'layernorm', 'rmsnorm', 'groupnorm' or 'instancenorm'.
    x, gamma : ndarray
        As given to the forward call, or converted; gamma may be None.
    beta_shape : tuple of int or None
        The shape in which beta was given, which is dbeta's; None: there was none.
    axes : Axes
        Where statistics and parameters lie.
    stats : ndarray, float64, shape (4, n_statistics)
        Mean, the part of the mean beyond float64's digits, 1/sqrt(var + eps), var.
    eps : float
        What was added to the variance; negative where that is not known.
    exact_mean : bool
        The mean is that of x, to all digits; False for a five-tuple that other code made.
    overwritten : str
        Which call wrote its output over x, so that no gradient can be had any more; else empty.
    """

    __slots__ = (
        "axes", "beta_shape", "eps", "exact_mean", "gamma", "norm", "overwritten", "stats", "x",
    )  # fmt: skip

    _names = ("mean", "inv_std", "x", "x_hat", "gamma")

    def __init__(
        self,
        norm: str,
        x: Array,
        gamma: Array | None,
        beta_shape: tuple[int, ...] | None,
        axes: Axes,
        stats: Array,
        eps: float,
        exact_mean: bool = True,
        overwritten: str = "",
    ) -> None:
        self.norm = norm
        self.x = x
        self.gamma = gamma
        self.beta_shape = beta_shape
        self.axes = axes
        self.stats = stats
        self.eps = eps
        self.exact_mean = exact_mean
        self.overwritten = overwritten

    def _against_x(self, values: Array) -> Array:
        """A value for each statistic, as it broadcasts against x."""
        values = values.astype(parameter_dtype(self.x.dtype)).reshape(self.axes.stats_shape)
        if len(self.axes.shape) == self.x.ndim:
            return values
        channels = self.axes.along[0]
        shape = list(self.axes.stats_shape)
        shape[channels + 1] = self.axes.shape[channels + 1]
        merged = (*shape[:channels], self.x.shape[channels], *shape[channels + 2 :])
        return np.broadcast_to(values, shape).reshape(merged)

    @property
    def mean(self) -> Array:
        return self._against_x(self.stats[0])

    @property
    def inv_std(self) -> Array:
        return self._against_x(self.stats[2])

    @property
    def x_hat(self) -> Array:
        if self.overwritten:
            raise ValueError(f"x_hat is lost: {self.overwritten} wrote its output over x")
        mean, mean_low, inv_std = (row.reshape(self.axes.stats_shape) for row in self.stats[:3])
        x = self.x.reshape(self.axes.shape).astype(np.float64)
        x_hat: Array = ((x - mean) - mean_low) * inv_std
        return x_hat.reshape(self.x.shape).astype(self.x.dtype, copy=False)

    def _of_groups(self, row: int) -> Array:
        if self.norm not in ("groupnorm", "instancenorm"):
            raise AttributeError(f"the cache of {self.norm}_forward has no statistics of groups")
        shape = self.axes.shape[0], self.axes.shape[self.axes.along[0]]
        groups: Array = self.stats[row].astype(parameter_dtype(self.x.dtype)).reshape(shape)
        return groups

    @property
    def group_mean(self) -> Array:
        """The means, shape (N, num_groups); of instance norm (N, C)."""
        return self._of_groups(0)

    @property
    def group_inv_std(self) -> Array:
        """1/sqrt(var + eps), shape (N, num_groups); of instance norm (N, C)."""
        return self._of_groups(2)

    def _gamma(self) -> Array | None:
        if self.gamma is None:
            return None
        gamma = self.gamma.astype(parameter_dtype(self.x.dtype))
        if len(self.axes.shape) == self.x.ndim:
            return gamma.reshape(self.axes.parameter_shape[self.axes.along[0] :])
        channels = self.axes.along[0]
        return gamma.reshape((-1,) + (1,) * (self.x.ndim - 1 - channels))

    def __repr__(self) -> str:
        statistics = f"{self.stats.shape[1]} statistics over axes {self.axes.over}"
        return f"<bn_fast cache of {self.norm}: x {self.x.shape} {self.x.dtype}, {statistics}>"
