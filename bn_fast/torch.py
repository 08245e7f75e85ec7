"""Batch normalization for PyTorch's CPU tensors: `torch.nn.functional.batch_norm`'s signature.

The tensors' memory is read in place and the results are NumPy's memory under tensors: no copies.
"""

import math
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError("bn_fast.torch needs PyTorch: pip install torch") from error

import numpy as np
from torch.autograd.function import once_differentiable

from ._cache import Cache
from ._checks import GRADIENTS
from ._types import Array
from .functional import batchnorm_backward, batchnorm_double_backward, batchnorm_forward

__all__ = ["batch_norm"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    r"""`torch.nn.functional.batch_norm` for CPU tensors, computed by bn_fast.

    Same arguments in the same order with the same meaning, so it can stand in its place, also for
    the modules: ``torch.nn.functional.batch_norm = bn_fast.torch.batch_norm``.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...)
        Any floating dtype (bfloat16 needs ml_dtypes, NumPy's name for it), on the CPU, any strides
        (channels_last and others are read in place). It is kept for the backward pass; changing it
        before that is an error, as in PyTorch.
    running_mean, running_var : Tensor, shape (C,), or None
        With ``training=False`` the statistics to normalize with. With ``training=True`` they are
        updated in place, or may both be None. No gradient flows through them.
    weight, bias : Tensor, shape (C,), or None
        Scale and shift; None is 1 and 0.
    training : bool, default False
        Normalize with the statistics of this batch.
    momentum : float, default 0.1
        PyTorch's, the weight of the *new* value (1 minus that of `bn_fast.batchnorm_forward`):
        ``running = (1 - momentum) * running + momentum * batch``.
    eps : float, default 1e-5
        Added to the variance; at least 0.

    Returns
    -------
    Tensor
        Shape, dtype and memory format of `input`.

    Raises
    ------
    TypeError
        If an argument is no dense CPU tensor of a floating dtype.
    ImportError
        For bfloat16 without ml_dtypes.
    ValueError
        If a shape or value is wrong; with ``training=True`` also if there is one value per channel,
        as in PyTorch. The running statistics are then as before.

    Notes
    -----
    The batch is normalized with its biased variance (÷M), and ``running_var`` receives the unbiased
    one (÷(M - 1)), as in PyTorch. An empty batch leaves the running statistics as they are. In
    contrast to PyTorch the results do not depend on the number of threads, ``eps=0`` is allowed
    in training, the parameters may be of another dtype than `input`, and a negative
    ``running_var`` is an error.

    Second derivatives (``create_graph=True``, for gradient penalties) are computed by
    `bn_fast.batchnorm_double_backward`. A third derivative is an error, and so are forward-mode
    differentiation and the transforms of torch.func.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import torch
    >>> from bn_fast.torch import batch_norm
    >>> x = torch.tensor([[1.0], [2.0], [6.0]], requires_grad=True)
    >>> running_mean, running_var = torch.zeros(1), torch.ones(1)
    >>> y = batch_norm(x, running_mean, running_var, training=True)
    >>> y[0].backward()
    >>> x.grad.T
    tensor([[ 0.1763, -0.2204,  0.0441]])
    >>> running_mean, running_var
    (tensor([0.3000]), tensor([1.6000]))
    """
    _check_tensor(input, "input")
    if input.dim() < 2:
        shape = tuple(input.shape)
        raise ValueError(f"input must have 2 or more dimensions (N, C, ...), got shape {shape}")
    running = {"running_mean": running_mean, "running_var": running_var}
    given = {"weight": weight, "bias": bias, **running}
    for name, tensor in given.items():
        if tensor is not None:
            _check_tensor(tensor, name)
            if tensor.shape != input.shape[1:2]:
                raise ValueError(
                    f"{name} must have shape ({input.shape[1]},), one value for each channel of"
                    f" input, got {tuple(tensor.shape)}"
                )
    missing = [name for name, tensor in running.items() if tensor is None]
    if missing and (len(missing) == 1 or not training):
        why = "be given with training=False" if not training else "both be given or both be None"
        raise ValueError(f"running_mean and running_var must {why}, got {missing[0]}=None")
    for name, tensor in running.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient: none flows through it")
    if training and input.numel() == input.shape[1]:
        raise ValueError(
            "input must have more than 1 value for each channel when training, got shape"
            f" {tuple(input.shape)}"
        )
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum must be a number, got {momentum!r}")
    if not math.isfinite(momentum):
        raise ValueError(f"momentum must be finite, got {momentum}")
    return _BatchNorm.apply(
        input, weight, bias, running_mean, running_var, bool(training), momentum, eps
    )


def _check_tensor(value: Any, name: str) -> None:
    """Looks at no data, which the wrapped tensors of torch.func do not have."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_cpu or value.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor on the CPU, got one on {value.device} with layout"
            f" {value.layout}"
        )
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} must be a tensor of 16, 32 or 64 bit floats, got {value.dtype}")
    if value.dtype is torch.bfloat16:
        _bfloat16()


def _bfloat16() -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError(
            "bn_fast.torch needs ml_dtypes for bfloat16: pip install ml_dtypes"
        ) from error
    return bfloat16


def _to_array(tensor: torch.Tensor) -> Array:
    """The tensor's own memory; force only drops the gradient and settles negative bits."""
    array: Array
    if tensor.dtype is torch.bfloat16:  # which Tensor.numpy does not know
        array = tensor.detach().view(torch.int16).numpy(force=True).view(_bfloat16())
    elif tensor.requires_grad or tensor.is_neg():
        array = tensor.numpy(force=True)
    else:
        array = tensor.numpy()
    return array


def _to_tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bfloat16 and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _parameter(tensor: torch.Tensor | None, x: Array, constant: float) -> Array:
    if tensor is None:
        return np.full(x.shape[1], constant, np.float64 if x.dtype == np.float64 else np.float32)
    if tensor.dtype.itemsize == 2:  # storage alone: the kernels take parameters of 32 or 64 bits
        tensor = tensor.detach().float()
    return _to_array(tensor)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        x: Array = _to_array(input)
        param: dict[str, Any] = {"mode": "train" if training else "test", "eps": eps}
        if running_mean is not None and running_var is not None:
            param["momentum"] = 1 - momentum
            param["running_mean"] = _to_array(running_mean)
            param["running_var"] = _to_array(running_var)
        y, cache = batchnorm_forward(x, _parameter(weight, x, 1), _parameter(bias, x, 0), param)
        if training and running_mean is not None and running_var is not None and x.size:
            # var / (M - 1) is what the unbiased variance has more than the biased one.
            excess = cache.stats[3] * (momentum / (x.size // x.shape[1] - 1))
            running_mean.copy_(torch.from_numpy(param["running_mean"]))
            running_var.copy_(torch.from_numpy(param["running_var"] + excess))
        # Through PyTorch, which notices when they are changed, and knows hooks that move them.
        ctx.save_for_backward(input, weight)
        ctx.stats, ctx.eps, ctx.frozen = cache.stats, cache.eps, cache.frozen
        return _to_tensor(y, input.dtype)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        given = dout, input, weight, ctx.stats, ctx.eps, ctx.frozen
        wanted = ctx.needs_input_grad[:3]
        # Gradients are recorded here only under create_graph=True, for a second derivative.
        if torch.is_grad_enabled():
            found = _BatchNormBackward.apply(*given)
            found = tuple(g if needed else None for g, needed in zip(found, wanted))
        else:
            found = _gradients(*given, wanted=wanted)
        return *found, None, None, None, None, None


class _BatchNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dout: torch.Tensor,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        stats: Array,
        eps: float,
        frozen: bool,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(dout, input, weight)
        ctx.set_materialize_grads(False)  # None says that nothing depends on a gradient
        ctx.stats, ctx.eps, ctx.frozen = stats, eps, frozen
        gradients: tuple[torch.Tensor, ...] = _gradients(dout, input, weight, stats, eps, frozen)
        return gradients

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *second: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        dout, input, weight = ctx.saved_tensors
        cache = _cache(input, weight, ctx.stats, ctx.eps, ctx.frozen)
        ddx, ddgamma, ddbeta = (None if t is None else _to_array(t) for t in second)
        dx, dgamma, ddout = batchnorm_double_backward(ddx, ddgamma, ddbeta, _to_array(dout), cache)
        gradients = (_to_tensor(a, input.dtype) for a in (ddout, dx, dgamma))
        needed = zip(gradients, ctx.needs_input_grad)
        return (*(g if needs else None for g, needs in needed), *[None] * 3)


def _gradients(
    dout: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    stats: Array,
    eps: float,
    frozen: bool,
    wanted: tuple[bool, ...] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    cache = _cache(input, weight, stats, eps, frozen)
    if all(wanted):
        arrays = batchnorm_backward(_to_array(dout), cache)
    else:
        needs = [name for name, needed in zip(GRADIENTS, wanted) if needed]
        arrays = batchnorm_backward(_to_array(dout), cache, needs=needs)
    return tuple(None if a is None else _to_tensor(a, input.dtype) for a in arrays)


def _cache(
    input: torch.Tensor, weight: torch.Tensor | None, stats: Array, eps: float, frozen: bool
) -> Cache:
    x = _to_array(input)
    return Cache(x, _parameter(weight, x, 1), stats, 1, eps, frozen)
