"""What `batchnorm_forward` leaves for the backward pass, and the activations that it remembers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ._arrays import Array, _shaped


class Cache(NamedTuple):
    """What `batchnorm_forward` leaves for the backward pass: a plain tuple of five arrays.

    mean, inv_var and gamma are shaped to broadcast against x, and of its dtype, as is x_hat (of
    float32 for half types). inv_var is the
    tuple's traditional name for 1/sqrt(var + eps), the inverse of the standard deviation.
    """

    mean: Array
    inv_var: Array
    x: Array
    x_hat: Array
    gamma: Any  # an array, or None


class FrozenCache(Cache):
    """The cache of test mode: its statistics are given, so no gradient passes through them.

    The five arrays cannot say so. A cache of any type may, by an attribute `frozen` that is true.
    """

    __slots__ = ()

    frozen = True


class OptionsCache(Cache):
    """The cache of a call with options, which its attributes keep under their names.

    So they do with beta, and with the shapes in which gamma and beta were given (None: not at all)
    where one is not (C,).
    """

    frozen: bool
    activation: str | None
    negative_slope: float
    beta: ArrayLike | None
    parameter_shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    residual: Array | None
    weights: Array | None


# An activation is a function of z = gamma*x_hat + beta (+ residual), and the way of a gradient
# through it; both know negative_slope. At z = 0 the slope is that from below; NaN comes through.
ACTIVATIONS: dict[str, tuple[Callable[[Array, float], Array], Callable[..., Array]]] = {
    "relu": (
        lambda z, slope: np.where(z <= 0, 0, z),
        lambda dout, z, slope: np.where(z <= 0, 0, dout),
    ),
    "leaky_relu": (
        lambda z, slope: np.where(z <= 0, slope * z, z),
        lambda dout, z, slope: np.where(z <= 0, slope * dout, dout),
    ),
}


def _before_activation(
    gamma: Array, x_hat: Array, beta: Array, residual: ArrayLike | None
) -> Array:
    z = gamma * x_hat + beta
    return z if residual is None else z + np.asarray(residual, z.dtype)


def _through_activation(dout: Array, gamma: Array, x_hat: Array, cache: Sequence[Any]) -> Array:
    """The gradient with respect to what the activation of a cache's call was applied to."""
    activation = getattr(cache, "activation", None)
    if activation is None:
        return dout
    beta, residual, slope = (getattr(cache, a) for a in ("beta", "residual", "negative_slope"))
    beta = _shaped(beta, 0, gamma)
    z = _before_activation(gamma, x_hat, beta, residual)
    return ACTIVATIONS[activation][1](dout, z, slope)
