"""The norms as primitives of HIPS autograd, which differentiates NumPy code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

try:
    from autograd.extend import defvjp_argnums, primitive
except ImportError as error:
    raise ImportError("bn_fast.autograd needs autograd: pip install autograd") from error

import numpy as np
from numpy.typing import ArrayLike

from . import norms
from ._cache import Cache, NormCache
from ._checks import GRADIENTS, STATISTICS
from ._types import Array, Axis
from .functional import batchnorm_backward, batchnorm_double_backward, batchnorm_forward

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    mean: ArrayLike | None = None,
    var: ArrayLike | None = None,
    *,
    axis: Axis = 1,
    eps: float = 1e-5,
) -> Array:
    r"""Batch normalization that autograd can differentiate with respect to x, gamma and beta.

    Parameters
    ----------
    x : array_like, 2 or more dimensions
        Input, M values for each of ``C = x.shape[axis]`` features, float32 or float64, any strides.
    gamma, beta : array_like, shape (C,), optional
        Scale and shift of each feature; None: 1 and 0. Other shapes as in
        `bn_fast.batchnorm_forward`.
    mean, var : array_like, shape (C,), optional
        Statistics to normalize with, those of a whole data set for example (the test mode of
        `bn_fast.batchnorm_forward`), with respect to which autograd can differentiate once. Without
        them those of x are used, and the gradient flows through them.
    axis : int or tuple of int, default 1
        The feature axis, or axes, as in `bn_fast.batchnorm_forward`.
    eps : float, default 1e-5
        Added to the variance; at least 0.

    Returns
    -------
    ndarray
        Shape and dtype of x.

    Raises
    ------
    TypeError, ValueError
        As `bn_fast.batchnorm_forward`; also if only one of `mean` and `var` is given.
    NotImplementedError
        By autograd, for derivatives of third order, of second order with respect to `mean` and
        `var`, and of forward mode.

    See Also
    --------
    bn_fast.batchnorm_forward, bn_fast.batchnorm_backward, bn_fast.batchnorm_double_backward :
        what is called, with the formulas

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import autograd.numpy as np
    >>> from autograd import grad
    >>> from bn_fast.autograd import batch_norm
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> first = lambda x: batch_norm(x, np.ones(1), np.zeros(1))[0, 0]
    >>> grad(first)(x).round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    if (mean is None) != (var is None):
        missing = "mean" if mean is None else "var"
        raise ValueError(f"mean and var must both be given or both be None, got {missing}=None")
    kept: list[Cache] = []
    y: Array = _forward(x, gamma, beta, mean, var, axis, eps, kept)
    return y


@primitive
def _forward(
    x: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    mean: ArrayLike | None,
    var: ArrayLike | None,
    axis: Axis,
    eps: float,
    kept: list[Cache],
) -> Array:
    """The output; what the gradients need comes into `kept`, because autograd passes them only
    arguments and output."""
    param = {"mode": "train", "eps": eps}
    if mean is not None:
        param = {"mode": "test", "eps": eps, "running_mean": mean, "running_var": var}
    y, cache = batchnorm_forward(x, gamma, beta, param, axis=axis)
    kept.append(cache)
    return y


_GRADIENTS = (*GRADIENTS[:3], *STATISTICS)


@primitive
def _backward(
    dout: Array,
    x: Array,
    gamma: Array | None,
    mean: Array | None,
    var: Array | None,
    kept: list[Cache],
    needs: tuple[str, ...],
) -> tuple[Array, ...]:
    """Those that are needed, in their order, as a function of dout, x and gamma, although the
    latter are in `kept`: so autograd knows what a second derivative depends on."""
    found = batchnorm_backward(dout, kept[0], needs=needs)
    return tuple(gradient for gradient in found if gradient is not None)


def _vjp(
    argnums: Sequence[int], y: Array, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Array], tuple[Array, ...]]:
    """One backward pass for all that are asked for."""
    x, gamma, _, mean, var, _, _, kept = args
    needs = tuple(_GRADIENTS[i] for i in sorted(argnums))

    def gradients(dout: Array) -> tuple[Array, ...]:
        given = dout, x, gamma, mean, var
        found = dict(zip(needs, _backward(*given, kept, needs), strict=True))
        return tuple(_as(args[i], found[_GRADIENTS[i]]) for i in argnums)

    return gradients


def _as(value: Any, gradient: Array) -> Array:
    """The gradient in the dtype and shape of what it is with respect to, be that a number."""
    found = gradient.astype(getattr(value, "dtype", float), copy=False)
    return found.reshape(np.shape(value))


defvjp_argnums(_forward, _vjp)


@primitive
def _double_backward(
    ddx: Array | None,
    ddgamma: Array | None,
    ddbeta: Array | None,
    dout: Array,
    x: Array,
    gamma: Array | None,
    kept: list[Cache],
) -> tuple[Array, Array | None, Array]:
    """dx, dgamma, ddout. A third derivative is not defined, and autograd says so."""
    return batchnorm_double_backward(ddx, ddgamma, ddbeta, dout, kept[0])


def _second_vjp(
    argnums: Sequence[int], y: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], tuple[Array, ...]]:
    dout, x, gamma, _, _, kept, needs = args
    if max(argnums) > 2 or not set(needs) <= set(GRADIENTS):
        raise NotImplementedError("there is no second derivative with respect to mean and var")

    def gradients(second: Any) -> tuple[Array, ...]:
        given = dict(zip(needs, second, strict=True))
        ddx, ddgamma, ddbeta = (given.get(name) for name in GRADIENTS[:3])
        found = _double_backward(ddx, ddgamma, ddbeta, dout, x, gamma, kept)
        in_order = found[2], found[0], found[1]
        return tuple(_as(args[i], in_order[i]) for i in argnums)

    return gradients


defvjp_argnums(_backward, _second_vjp)


def layer_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    eps: float = 1e-5,
) -> Array:
    """Layer normalization that autograd can differentiate with respect to x, gamma and beta, once.

    Parameters, result and errors are those of `bn_fast.layer_norm`.

    Raises
    ------
    NotImplementedError
        By autograd, for derivatives of second order and of forward mode.

    See Also
    --------
    bn_fast.layernorm_forward, bn_fast.layernorm_backward : what is called, with the formulas

    Examples
    --------
    >>> import autograd.numpy as np
    >>> from autograd import grad
    >>> from bn_fast.autograd import layer_norm
    >>> grad(lambda x: layer_norm(x)[0, 0])(np.array([[1.0, 2.0, 6.0]])).round(4)
    array([[ 0.1763, -0.2204,  0.0441]])
    """
    y: Array = _norm(x, gamma, beta, "layernorm", {"axis": axis, "eps": eps}, [])
    return y


def rms_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    eps: float = 1e-5,
) -> Array:
    """Root mean square normalization that autograd can differentiate, once.

    Parameters, result and errors are those of `bn_fast.rms_norm`; all else as in `layer_norm`.

    Examples
    --------
    >>> import autograd.numpy as np
    >>> from autograd import grad
    >>> from bn_fast.autograd import rms_norm
    >>> grad(lambda x: rms_norm(x, eps=0)[0, 0])(np.array([[1.0, 7.0]])).round(4)
    array([[ 0.196, -0.028]])
    """
    y: Array = _norm(x, gamma, None, "rmsnorm", {"axis": axis, "eps": eps}, [])
    return y


def group_norm(
    x: ArrayLike,
    num_groups: int,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
) -> Array:
    """Group normalization that autograd can differentiate with respect to x, gamma and beta, once.

    Parameters, result and errors are those of `bn_fast.group_norm`; all else as in `layer_norm`.

    Examples
    --------
    >>> import autograd.numpy as np
    >>> from autograd import grad
    >>> from bn_fast.autograd import group_norm
    >>> grad(lambda x: group_norm(x, 2)[0, 0])(np.array([[1.0, 2.0, 6.0, 5.0, 5.0, 5.0]])).round(4)
    array([[ 0.1763, -0.2204,  0.0441,  0.    ,  0.    ,  0.    ]])
    """
    options = {"num_groups": num_groups, "axis": axis, "eps": eps}
    y: Array = _norm(x, gamma, beta, "groupnorm", options, [])
    return y


def instance_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
) -> Array:
    """Instance normalization that autograd can differentiate, once.

    Parameters, result and errors are those of `bn_fast.instance_norm`; all else as in `layer_norm`.

    Examples
    --------
    >>> import autograd.numpy as np
    >>> from autograd import grad
    >>> from bn_fast.autograd import instance_norm
    >>> grad(lambda x: instance_norm(x)[0, 0, 0])(np.array([[[1.0, 2.0, 6.0]]])).round(4)
    array([[[ 0.1763, -0.2204,  0.0441]]])
    """
    y: Array = _norm(x, gamma, beta, "instancenorm", {"axis": axis, "eps": eps}, [])
    return y


@primitive
def _norm(
    x: ArrayLike,
    gamma: ArrayLike | None,
    beta: ArrayLike | None,
    norm: str,
    options: dict[str, Any],
    kept: list[NormCache],
) -> Array:
    """The output; the cache comes into `kept`, as in `_forward`."""
    parameters = (gamma,) if norm == "rmsnorm" else (gamma, beta)
    y, cache = getattr(norms, f"{norm}_forward")(x, *parameters, **options)
    kept.append(cache)
    found: Array = y
    return found


@primitive
def _norm_backward(
    dout: Array, x: Array, gamma: Array | None, kept: list[NormCache], needs: tuple[str, ...]
) -> tuple[Array, ...]:
    """Those that are needed, in their order; a function of x and gamma, as in `_backward`."""
    cache = kept[0]
    found = getattr(norms, f"{cache.norm}_backward")(dout, cache, needs=needs)
    return tuple(gradient for gradient in found if gradient is not None)


def _norm_vjp(
    argnums: Sequence[int], y: Array, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Array], tuple[Array, ...]]:
    x, gamma, _, _, _, kept = args
    needs = tuple(GRADIENTS[i] for i in sorted(argnums))

    def gradients(dout: Array) -> tuple[Array, ...]:
        found = dict(zip(needs, _norm_backward(dout, x, gamma, kept, needs), strict=True))
        return tuple(_as(args[i], found[GRADIENTS[i]]) for i in argnums)

    return gradients


def _no_second_vjp(*_: Any) -> Any:
    raise NotImplementedError(
        "bn_fast.autograd has second derivatives of batch_norm alone: write this norm in"
        " autograd.numpy for them"
    )


defvjp_argnums(_norm, _norm_vjp)
defvjp_argnums(_norm_backward, _no_second_vjp)
