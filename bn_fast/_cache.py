"""What a forward call leaves for its backward call."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ._types import Array, parameter_dtype


class Options(NamedTuple):
    """What a forward call was asked for besides batch normalization."""

    activation: str | None
    negative_slope: float
    beta: Array
    residual: Array | None
    weights: Array | None  # of the shape and dtype of x, by a power of two smaller than given
    total: float  # of the weights of a feature
    residual_overwritten: bool


class Cache:
    """Everything `batchnorm_backward` needs; holds x by reference and nothing else of its size.

    Unpacks as the five-tuple ``(mean, inv_var, x, x_hat, gamma)`` that hand-written NumPy code
    passes around, where ``inv_var`` is 1/sqrt(var + eps). The small arrays broadcast against x, and
    are float32 for an x of 16 bits; x_hat is computed when it is asked for.

    Attributes
    ----------
    x, gamma : ndarray
        As given to the forward call, or converted.
    stats : ndarray, float64, shape (4, n_features)
        Mean, the part of the mean beyond float64's digits, 1/sqrt(var + eps), var.
    axis : int
        The feature axis of x.
    eps : float
        What was added to the variance; negative where that is not known.
    frozen : bool
        The statistics were given (test mode), so x has no influence on them.
    exact_mean : bool
        The mean is that of x, to all digits; False for a five-tuple that other code made.
    overwritten : str
        Which call wrote its output over x, so that no gradient can be had any more; else empty.
    options : Options or None
        What else the call was asked for; None: nothing. Each is an attribute of the cache too.
    """

    __slots__ = (
        "axis", "eps", "exact_mean", "frozen", "gamma", "options", "overwritten", "stats", "x",
    )  # fmt: skip

    def __init__(
        self,
        x: Array,
        gamma: Array,
        stats: Array,
        axis: int,
        eps: float,
        frozen: bool = False,
        exact_mean: bool = True,
        overwritten: str = "",
        options: Options | None = None,
    ) -> None:
        self.x = x
        self.gamma = gamma
        self.stats = stats
        self.axis = axis
        self.eps = eps
        self.frozen = frozen
        self.exact_mean = exact_mean
        self.overwritten = overwritten
        self.options = options

    def __setstate__(self, state: Any) -> None:
        """From a pickle or a copy; what the attributes are is looked at when they are used."""
        _, slots = state if isinstance(state, tuple) else (None, state)
        if not isinstance(slots, dict) or slots.keys() != set(self.__slots__):
            raise ValueError("cache cannot be used: it was pickled by another version of bn_fast")
        for name, value in slots.items():
            setattr(self, name, value)

    @property
    def activation(self) -> str | None:
        return self.options.activation if self.options else None

    @property
    def negative_slope(self) -> float:
        return self.options.negative_slope if self.options else 0.01

    @property
    def beta(self) -> Array | None:
        return self.options.beta if self.options else None

    @property
    def residual(self) -> Array | None:
        return self.options.residual if self.options else None

    @property
    def weights(self) -> Array | None:
        return self.options.weights if self.options else None

    def _broadcastable(self, values: Array) -> Array:
        shape = (-1,) + (1,) * (self.x.ndim - 1 - self.axis)
        return values.astype(parameter_dtype(self.x.dtype)).reshape(shape)

    @property
    def mean(self) -> Array:
        return self._broadcastable(self.stats[0])

    @property
    def inv_var(self) -> Array:
        return self._broadcastable(self.stats[2])

    @property
    def x_hat(self) -> Array:
        if self.overwritten:
            raise ValueError(f"x_hat is lost: {self.overwritten} wrote its output over x")
        shape = (-1,) + (1,) * (self.x.ndim - 1 - self.axis)
        mean, mean_low, inv_std = (row.reshape(shape) for row in self.stats[:3])
        x_hat: Array = ((self.x - mean) - mean_low) * inv_std
        return x_hat.astype(self.x.dtype, copy=False)

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(5))

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Array:
        name = ("mean", "inv_var", "x", "x_hat", "gamma")[index]
        return self._broadcastable(self.gamma) if name == "gamma" else getattr(self, name)

    def __repr__(self) -> str:
        kind = "frozen statistics" if self.frozen else "batch statistics"
        return f"<bn_fast cache: x {self.x.shape} {self.x.dtype}, axis {self.axis}, {kind}>"
