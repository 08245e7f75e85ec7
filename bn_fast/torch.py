"""The norms for PyTorch's CPU tensors, with the signatures of `torch.nn.functional`.

The tensors' memory is read in place and the results are NumPy's memory under tensors: no copies.

There are three roads. An ordinary call takes an autograd.Function. One that PyTorch transforms
(torch.func, torch.compile, a dispatch mode), where tensors have no memory, takes custom operators,
which compute the same and cost a small call 50 us more each way. One that is written down, to be
run without this module (torch.jit, torch.export, ONNX), is left to PyTorch's own function.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError("bn_fast.torch needs PyTorch: pip install torch") from error

import numpy as np
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from . import _checks, _norm_checks, norms
from ._cache import Axes, Cache, NormCache
from ._checks import GRADIENTS
from ._core import core
from ._types import Array
from .functional import batchnorm_backward, batchnorm_double_backward, batchnorm_forward

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

# Taken before anybody puts this module's functions in their place.
_pytorchs = torch.nn.functional.batch_norm
_pytorchs_layer_norm = torch.nn.functional.layer_norm
_pytorchs_rms_norm = torch.nn.functional.rms_norm
_pytorchs_group_norm = torch.nn.functional.group_norm
_pytorchs_instance_norm = torch.nn.functional.instance_norm

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
    `bn_fast.batchnorm_double_backward`; a third derivative and forward-mode differentiation are
    errors. torch.func's other transforms and torch.compile work, by way of operators that cost a
    small call more. torch.jit, torch.export and torch.onnx.export write down PyTorch's own batch
    norm, so that what they give needs no bn_fast. docs/conventions.md has it as a table.

    References
    ----------
    .. [1] Ioffe and Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167.

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
    # TorchScript compiles what follows, and never looks into the first branch.
    if not torch.jit.is_scripting():
        return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _pytorchs(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: Any,
    momentum: Any,
    eps: Any,
) -> torch.Tensor:
    given = input, running_mean, running_var, weight, bias
    transformed = _is_transformed(input)
    done = _done_elsewhere(
        batch_norm, _pytorchs, given, transformed, (*given, training, momentum, eps)
    )
    if done is not None:
        return done
    _check_channels(input, weight, bias, running_mean, running_var)
    _check_running(running_mean, running_var, "training", training)
    if training and input.shape[0] == 1 == math.prod(input.shape[2:]):
        raise ValueError(
            "input must have more than 1 value for each channel when training, got shape"
            f" {tuple(input.shape)}"
        )
    momentum, eps = _momentum(momentum), _epsilon(eps)
    ordered = input, weight, bias, running_mean, running_var, bool(training), momentum, eps
    if not transformed:
        return _BatchNorm.apply(*ordered)
    _check_transforms("batch_norm")
    y, _, mean, var = _apply(_forward_op, *ordered)
    if training and running_mean is not None:
        _replace_op(running_mean, mean.detach())
        _replace_op(running_var, var.detach())
    return y


def layer_norm(
    input: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    r"""`torch.nn.functional.layer_norm` for CPU tensors, computed by bn_fast.

    Same arguments in the same order with the same meaning, so it can stand in its place, also for
    the module: ``torch.nn.functional.layer_norm = bn_fast.torch.layer_norm``.

    Parameters
    ----------
    input : Tensor
        As for `batch_norm`: any floating dtype, on the CPU, any strides. Here its last dimensions
        are normalized.
    normalized_shape : sequence of int, or int
        The shape of these last dimensions; an integer is one of them.
    weight, bias : Tensor, shape `normalized_shape`, or None
        Scale and shift; None is 1 and 0. They may be of another dtype than `input`.
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
        If a shape or value is wrong.
    NotImplementedError
        For a second derivative, and in forward mode.

    See Also
    --------
    bn_fast.layernorm_forward, bn_fast.layernorm_backward : what is called, with the formulas

    Notes
    -----
    What is said of torch.func, torch.compile, torch.jit and torch.export in `batch_norm` holds
    here, but for the second derivative, which is an error.

    Examples
    --------
    >>> import torch
    >>> from bn_fast.torch import layer_norm
    >>> x = torch.tensor([[1.0, 2.0, 6.0]], requires_grad=True)
    >>> layer_norm(x, (3,))[0, 0].backward()
    >>> x.grad
    tensor([[ 0.1763, -0.2204,  0.0441]])
    """
    if not torch.jit.is_scripting():
        return _rows("layernorm", layer_norm, input, normalized_shape, (weight, bias), eps)
    return _pytorchs_layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    r"""`torch.nn.functional.rms_norm` for CPU tensors, computed by bn_fast.

    Parameters, results and errors are those of `layer_norm`, but for what follows.

    Parameters
    ----------
    eps : float, optional
        Added to the mean square. None is PyTorch's: ``finfo(float64).eps`` for float64, else
        ``finfo(float32).eps``, for 16 bits too.

    See Also
    --------
    bn_fast.rmsnorm_forward, bn_fast.rmsnorm_backward : what is called, with the formulas

    Examples
    --------
    >>> import torch
    >>> from bn_fast.torch import rms_norm
    >>> rms_norm(torch.tensor([1.0, 7.0]), (2,))
    tensor([0.2000, 1.4000])
    """
    if not torch.jit.is_scripting():
        return _rows("rmsnorm", rms_norm, input, normalized_shape, (weight,), eps)
    return _pytorchs_rms_norm(input, normalized_shape, weight, eps)


def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    r"""`torch.nn.functional.group_norm` for CPU tensors, computed by bn_fast.

    Parameters, results and errors are those of `layer_norm`, but for what follows.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...)
        As PyTorch's it must have more than one value for each channel of a group, over all samples.
    num_groups : int
        Divides C. A group is C/num_groups channels that are neighbours.
    weight, bias : Tensor, shape (C,), or None
        Scale and shift of each channel; None is 1 and 0.

    See Also
    --------
    bn_fast.groupnorm_forward, bn_fast.groupnorm_backward : what is called, with the formulas

    Examples
    --------
    >>> import torch
    >>> from bn_fast.torch import group_norm
    >>> group_norm(torch.tensor([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0)
    tensor([[-1.,  1., -1.,  1.]])
    """
    if not torch.jit.is_scripting():
        return _group_norm(input, num_groups, weight, bias, eps)
    return _pytorchs_group_norm(input, num_groups, weight, bias, eps)


def instance_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    r"""`torch.nn.functional.instance_norm` for CPU tensors, computed by bn_fast.

    Parameters, results and errors are those of `layer_norm`, but for what follows.

    Parameters
    ----------
    input : Tensor, shape (N, C, ...)
        As PyTorch's it must have more than one spatial element, if `use_input_stats`.
    running_mean, running_var : Tensor, shape (C,), or None
        With ``use_input_stats=False`` the statistics to normalize with: this is `batch_norm` of
        ``training=False``. With True they are updated in place, by the mean over the samples of
        their means and unbiased variances, or may both be None. No gradient flows through them.
    weight, bias : Tensor, shape (C,), or None
        Scale and shift of each channel; None is 1 and 0.
    use_input_stats : bool, default True
        Normalize each sample's channels with their own statistics.
    momentum : float, default 0.1
        The weight of the new value in the running statistics, as in `batch_norm`.

    See Also
    --------
    bn_fast.instancenorm_forward, bn_fast.instancenorm_backward : what is called, with the formulas

    Examples
    --------
    >>> import torch
    >>> from bn_fast.torch import instance_norm
    >>> instance_norm(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]]), eps=0)
    tensor([[[-1.,  1.],
             [-1.,  1.]]])
    """
    if not torch.jit.is_scripting():
        return _instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    return _pytorchs_instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _rows(
    norm: str,
    door: Callable[..., torch.Tensor],
    input: Any,
    normalized_shape: Any,
    parameters: tuple[Any, ...],
    eps: Any,
) -> torch.Tensor:
    """parameters: weight, and bias where there is one."""
    shape = _shape(normalized_shape)
    transformed = _is_transformed(input)
    theirs = _pytorchs_layer_norm if norm == "layernorm" else _pytorchs_rms_norm
    args = input, shape, *parameters, eps
    done = _done_elsewhere(door, theirs, (input, *parameters), transformed, args)
    if done is not None:
        return done
    _check_tensor(input, "input")
    last = tuple(input.shape[max(0, input.dim() - len(shape)) :])
    if last != shape:
        raise ValueError(
            f"normalized_shape must be the shape of input's last dimensions, got {shape} for input"
            f" {tuple(input.shape)}"
        )
    weight, bias = (*parameters, None)[:2]
    _check_parameters(shape, "that of normalized_shape", {"weight": weight, "bias": bias})
    if eps is None and norm == "rmsnorm":
        eps = torch.finfo(torch.float64 if input.dtype is torch.float64 else torch.float32).eps
    return _apply_norm(input, weight, bias, norm, len(shape), _epsilon(eps), transformed)[0]


def _group_norm(input: Any, num_groups: Any, weight: Any, bias: Any, eps: Any) -> torch.Tensor:
    given = input, num_groups, weight, bias, eps
    transformed = _is_transformed(input)
    done = _done_elsewhere(
        group_norm, _pytorchs_group_norm, (input, weight, bias), transformed, given
    )
    if done is not None:
        return done
    _check_channels(input, weight, bias)
    if type(num_groups) is not int:
        num_groups = _norm_checks._integer(num_groups, "num_groups")
    n = input.shape[1]
    if num_groups < 1 or n % num_groups:
        raise ValueError(
            f"num_groups must be at least 1 and divide the {n} channels of input, got {num_groups}"
        )
    if input.shape[0] * (n // num_groups) * math.prod(input.shape[2:]) == 1:
        raise ValueError(
            "input must have more than 1 value for each channel of a group, got shape"
            f" {tuple(input.shape)} and num_groups={num_groups}"
        )
    return _apply_norm(input, weight, bias, "groupnorm", num_groups, _epsilon(eps), transformed)[0]


def _instance_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    use_input_stats: Any,
    momentum: Any,
    eps: Any,
) -> torch.Tensor:
    given = input, running_mean, running_var, weight, bias
    transformed = _is_transformed(input)
    all_given = *given, use_input_stats, momentum, eps
    done = _done_elsewhere(instance_norm, _pytorchs_instance_norm, given, transformed, all_given)
    if done is not None:
        return done
    _check_channels(input, weight, bias, running_mean, running_var)
    _check_running(running_mean, running_var, "use_input_stats", use_input_stats)
    momentum, eps = _momentum(momentum), _epsilon(eps)
    if not use_input_stats:
        return _batch_norm(*given, False, momentum, eps)
    n_values = math.prod(input.shape[2:])
    if n_values == 1:
        raise ValueError(
            "input must have more than 1 spatial element with use_input_stats=True, got shape"
            f" {tuple(input.shape)}"
        )
    y, stats = _apply_norm(input, weight, bias, "instancenorm", 0, eps, transformed)
    if running_mean is not None and input.numel():
        batch = stats.detach().unflatten(1, (input.shape[0], -1)).mean(1)
        unbiased = batch[3] * (n_values / (n_values - 1))
        replace = _replace_op if transformed else torch.Tensor.copy_
        for running, new in ((running_mean, batch[0]), (running_var, unbiased)):
            replace(running, (1 - momentum) * running.detach() + momentum * new)
    return y


def _done_elsewhere(
    door: Callable[..., torch.Tensor],
    theirs: Callable[..., torch.Tensor],
    tensors: tuple[Any, ...],
    transformed: bool,
    args: tuple[Any, ...],
) -> torch.Tensor | None:
    """The result where somebody else is to be asked for it."""
    if torch.overrides.has_torch_function(tensors):  # torch.fx, subclasses of Tensor
        found: torch.Tensor = torch.overrides.handle_torch_function(door, tensors, *args)
        return found
    if torch.jit.is_tracing() or (transformed and torch.compiler.is_exporting()):
        return theirs(*args)
    return None


def _is_transformed(input: torch.Tensor) -> bool:
    """Whether PyTorch does something else with the call than to run it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(input) not in (torch.Tensor, torch.nn.Parameter)
    )


# All that can be said of tensors without their data, which transformed ones do not have.


def _check_channels(
    input: Any, weight: Any, bias: Any, running_mean: Any = None, running_var: Any = None
) -> None:
    _check_tensor(input, "input")
    if input.dim() < 2:
        shape = tuple(input.shape)
        raise ValueError(f"input must have 2 or more dimensions (N, C, ...), got shape {shape}")
    parameters = {"weight": weight, "bias": bias}
    parameters |= {"running_mean": running_mean, "running_var": running_var}
    _check_parameters(input.shape[1:2], "one value for each channel of input", parameters)


def _check_parameters(shape: tuple[int, ...], what: str, tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            _check_tensor(tensor, name)
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} must have shape {tuple(shape)}, {what}, got {tuple(tensor.shape)}"
                )


def _check_running(running_mean: Any, running_var: Any, name: str, own_statistics: Any) -> None:
    """name: the argument that says whether the statistics are those of input."""
    if running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        if not own_statistics:
            raise ValueError(
                f"running_mean and running_var must be given with {name}=False, got {missing}=None"
            )
        if running_mean is not running_var:
            raise ValueError(
                "running_mean and running_var must both be given or both be None, got"
                f" {missing}=None"
            )
    elif torch.is_grad_enabled() and (running_mean.requires_grad or running_var.requires_grad):
        name = "running_mean" if running_mean.requires_grad else "running_var"
        raise ValueError(f"{name} must not require a gradient: none flows through it")


def _momentum(momentum: Any) -> float:
    number: float = momentum
    if type(momentum) is not float:
        number = _checks._number(momentum, "momentum")
    if not -math.inf < number < math.inf:
        raise ValueError(f"momentum must be finite, got {number}")
    return number


def _epsilon(eps: Any) -> float:
    if type(eps) is float and 0 <= eps < math.inf:
        return eps
    return _checks.epsilon(eps)


def _shape(normalized_shape: Any) -> tuple[int, ...]:
    try:
        if isinstance(normalized_shape, (tuple, list)):
            shape = tuple(map(operator.index, normalized_shape))
        else:
            shape = (operator.index(normalized_shape),)
    except TypeError:
        raise TypeError(
            "normalized_shape must be a sequence of integers, or one, got"
            f" {_checks._kind(normalized_shape)}"
        ) from None
    if not shape:
        raise ValueError("normalized_shape must have 1 or more dimensions, got ()")
    return shape


def _check_tensor(value: Any, name: str) -> None:
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


def _to_array(tensor: torch.Tensor, door: str = "batch_norm") -> Array:
    """The tensor's own memory; force only drops the gradient and settles negative bits."""
    array: Array
    try:
        if tensor.dtype is torch.bfloat16:  # which Tensor.numpy does not know
            array = tensor.detach().view(torch.int16).numpy(force=True).view(_bfloat16())
        elif tensor.requires_grad or tensor.is_neg():
            array = tensor.numpy(force=True)
        else:
            array = tensor.numpy()
    except RuntimeError as error:
        raise RuntimeError(
            f"bn_fast.torch.{door} cannot read a tensor that PyTorch transforms in this way: put"
            f" back PyTorch's torch.nn.functional.{door} for it ({error})"
        ) from error
    return array


def _to_tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bfloat16 and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _parameter(tensor: torch.Tensor | None) -> Array | None:
    return None if tensor is None else _affine(tensor)


def _affine(tensor: torch.Tensor, door: str = "batch_norm") -> Array:
    if tensor.dtype.itemsize == 2:  # storage alone: the kernels take parameters of 32 or 64 bits
        tensor = tensor.detach().float()
    return _to_array(tensor, door)


def _forward(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[Array, Cache, Array | None, Array | None]:
    """Output, cache, and what becomes of the running statistics; nothing is changed."""
    x = _to_array(input)
    param: dict[str, Any] = {"mode": "train" if training else "test", "eps": eps}
    if running_mean is not None and running_var is not None:
        mean, var = _to_array(running_mean), _to_array(running_var)
        if not core.are_plain_statistics(mean, var, x.shape[1]):
            _checks.variance(var, "running_var", x.shape[1], 1)
        param |= {"momentum": 1 - momentum, "running_mean": mean, "running_var": var}
    y, cache = batchnorm_forward(
        x,
        _parameter(weight),
        _parameter(bias),
        param,
        out=None if out is None else _to_array(out),
    )
    if not training or running_mean is None:
        return y, cache, None, None
    mean, var = param["running_mean"], param["running_var"]
    if x.size:  # var / (M - 1) is what the unbiased variance has more than the biased one
        var = var + cache.stats[3] * (momentum / (x.size // x.shape[1] - 1))
    return y, cache, mean, var


def _no_forward_mode(door: str) -> Any:
    raise NotImplementedError(
        f"bn_fast.torch.{door} has no forward-mode derivative: put back PyTorch's"
        f" torch.nn.functional.{door}, or differentiate backwards (torch.func.grad, vjp, jacrev)"
    )


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
        y, cache, mean, var = _forward(
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )
        if mean is not None and running_mean is not None and running_var is not None:
            running_mean.copy_(torch.from_numpy(mean))
            running_var.copy_(torch.from_numpy(var))
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

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        _no_forward_mode("batch_norm")


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
    ) -> tuple[torch.Tensor | None, ...]:
        ctx.save_for_backward(dout, input, weight)
        ctx.set_materialize_grads(False)  # None says that nothing depends on a gradient
        ctx.stats, ctx.eps, ctx.frozen = stats, eps, frozen
        return _gradients(dout, input, weight, stats, eps, frozen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *second: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        dout, input, weight = ctx.saved_tensors
        found = _second_gradients(second, dout, input, weight, ctx.stats, ctx.eps, ctx.frozen)
        needed = zip(found, ctx.needs_input_grad)
        return (*(g if needs else None for g, needs in needed), *[None] * 3)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        _no_forward_mode("batch_norm")


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


def _second_gradients(
    second: tuple[torch.Tensor | None, ...],
    dout: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    stats: Array,
    eps: float,
    frozen: bool,
) -> tuple[torch.Tensor | None, ...]:
    """With respect to dout, input and weight, from those with respect to the three gradients."""
    cache = _cache(input, weight, stats, eps, frozen)
    ddx, ddgamma, ddbeta = (None if t is None else _to_array(t) for t in second)
    if weight is None:
        ddgamma = None
    dx, dgamma, ddout = batchnorm_double_backward(ddx, ddgamma, ddbeta, _to_array(dout), cache)
    return tuple(None if a is None else _to_tensor(a, input.dtype) for a in (ddout, dx, dgamma))


def _cache(
    input: torch.Tensor, weight: torch.Tensor | None, stats: Array, eps: float, frozen: bool
) -> Cache:
    x = _to_array(input)
    beta = stats[0]  # any of its shape: without an activation only that is read
    return Cache(x, _parameter(weight), beta, stats, 1, eps, frozen)


# The same three as operators that PyTorch knows by name, shape and dtype. They change nothing (what
# does is the fourth), give new tensors, and always all of them. A batch of calls (vmap) is one call
# with more channels.


@torch.library.custom_op("bn_fast::batch_norm", mutates_args=())
def _forward_op(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, stats, and the new running statistics, empty where there are none."""
    y = torch.empty_like(input)  # as PyTorch was told: NumPy may choose other strides
    _, cache, *running = _forward(
        input, weight, bias, running_mean, running_var, training, momentum, eps, y
    )
    mean, var = (
        input.new_empty(0, dtype=torch.float64) if a is None else torch.from_numpy(a).double()
        for a in running
    )
    return y, torch.from_numpy(cache.stats), mean, var


@torch.library.custom_op("bn_fast::batch_norm_backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    eps: float,
    frozen: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dgamma, dbeta = _gradients(dout, input, weight, _to_array(stats), eps, frozen)
    return _in_strides(dx, input), _of_weight(dgamma, input), dbeta


@torch.library.custom_op("bn_fast::batch_norm_double_backward", mutates_args=())
def _double_backward_op(
    ddx: torch.Tensor | None,
    ddgamma: torch.Tensor | None,
    ddbeta: torch.Tensor | None,
    dout: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    eps: float,
    frozen: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ddout, dx, dgamma = _second_gradients(
        (ddx, ddgamma, ddbeta), dout, input, weight, _to_array(stats), eps, frozen
    )
    return _in_strides(ddout, input), _in_strides(dx, input), _of_weight(dgamma, input)


def _of_weight(gradient: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    """Zeros for that of a weight which was None: an operator's results are always all there."""
    return _fake_gradient(input, input.shape[1:2]).zero_() if gradient is None else gradient


@torch.library.custom_op("bn_fast::replace", mutates_args=("old",))
def _replace_op(old: torch.Tensor, new: torch.Tensor) -> None:
    """old.copy_(new), which torch.func.grad would refuse for a layer's own buffers."""
    old.copy_(new)


@_replace_op.register_vmap
def _replace_batched(
    info: Any, in_dims: tuple[int | None, ...], old: torch.Tensor, new: torch.Tensor
) -> tuple[None, None]:
    before, after = in_dims
    if before is None:
        raise RuntimeError(
            "bn_fast.torch cannot keep the running statistics of a batch of calls (vmap) in one"
            " tensor: give it running_mean and running_var for each, or None"
        )
    new = new.expand(info.batch_size, *new.shape) if after is None else new.movedim(after, 0)
    _replace_op(old.movedim(before, 0), new)
    return None, None


def _in_strides(result: Any, input: torch.Tensor) -> torch.Tensor:
    """The result as `torch.empty_like(input)` lies, where NumPy chose otherwise."""
    strides = torch.empty_like(input, device="meta").stride()
    return result if result.stride() == strides else torch.empty_like(input).copy_(result)


@_forward_op.register_fake
def _fake_forward(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    n = input.shape[1]
    n_running = n if training and running_mean is not None else 0
    sizes = (4, n), (n_running,), (n_running,)
    small = (input.new_empty(size, dtype=torch.float64) for size in sizes)
    return torch.empty_like(input), *small


@_backward_op.register_fake
def _fake_backward(
    dout: Any, input: Any, weight: Any, stats: Any, eps: float, frozen: bool
) -> tuple[torch.Tensor, ...]:
    dgamma, dbeta = (_fake_gradient(input, input.shape[1:2]) for _ in range(2))
    return torch.empty_like(input), dgamma, dbeta


@_double_backward_op.register_fake
def _fake_double_backward(
    ddx: Any,
    ddgamma: Any,
    ddbeta: Any,
    dout: Any,
    input: Any,
    weight: Any,
    stats: Any,
    eps: float,
    frozen: bool,
) -> tuple[torch.Tensor, ...]:
    dgamma = _fake_gradient(input, input.shape[1:2])
    return torch.empty_like(input), torch.empty_like(input), dgamma


def _fake_gradient(input: Any, shape: Any) -> torch.Tensor:
    """A gradient of weight or bias."""
    wide = input.dtype is torch.float64
    found: torch.Tensor = input.new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    return found


def _batched(op: Any, in_axes: tuple[int, ...], out_axes: tuple[int, ...]) -> Any:
    """The vmap of an operator whose tensors have their channels along these axes."""

    def folded(tensor: Any, dim: int | None, axis: int, size: int) -> Any:
        if tensor is None:
            return None
        whole = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return whole.movedim(0, axis).flatten(axis, axis + 1)

    def call(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size, n = info.batch_size, len(in_axes)
        tensors = [
            folded(tensor, dim, axis, size) for tensor, dim, axis in zip(args, in_dims, in_axes)
        ]
        found = op(*tensors, *args[n:])
        return tuple(a.unflatten(axis, (size, -1)) for a, axis in zip(found, out_axes)), out_axes

    return call


_forward_op.register_vmap(_batched(_forward_op, (1, 0, 0, 0, 0), (1, 1, 0, 0)))
_backward_op.register_vmap(_batched(_backward_op, (1, 1, 0, 1), (1, 0, 0)))
_double_backward_op.register_vmap(_batched(_double_backward_op, (1, 0, 0, 1, 1, 0, 1), (1, 1, 0)))


# Their derivatives: the operators' own, which torch.compile traces, and the same for torch.func,
# which needs an autograd.Function.


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    input, weight, *_, training, _, eps = inputs
    ctx.save_for_backward(input, weight, output[1])
    ctx.eps, ctx.frozen = eps, not training


def _forward_vjp(ctx: Any, dout: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    found = _apply(_backward_op, dout, *ctx.saved_tensors, ctx.eps, ctx.frozen)
    needed = zip(found, ctx.needs_input_grad)
    return (*(g if needs else None for g, needs in needed), *[None] * 5)


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.eps, ctx.frozen = inputs[4:]


def _backward_vjp(ctx: Any, *second: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    found = _apply(_double_backward_op, *second, *ctx.saved_tensors, ctx.eps, ctx.frozen)
    needed = zip(found, ctx.needs_input_grad)
    return (*(g if needs else None for g, needs in needed), *[None] * 3)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    pass


def _no_third_derivative(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError("bn_fast.torch.batch_norm has no third derivative")


def _function(op: Any, keep: Any, vjp: Any) -> Any:
    """Register an operator's derivative, and give the autograd.Function for torch.func."""
    op.register_autograd(vjp, setup_context=keep)
    static = {"forward": lambda *args: op(*args), "setup_context": keep}
    static["backward"] = _disable_dynamo(vjp)  # torch.compile may meet it on its way, and fails
    named = {name: staticmethod(function) for name, function in static.items()}
    return type("Norm", (torch.autograd.Function,), named | {"generate_vmap_rule": True})


_FUNCTIONS = {
    _forward_op: _function(_forward_op, _keep_forward, _forward_vjp),
    _backward_op: _function(_backward_op, _keep_backward, _backward_vjp),
    _double_backward_op: _function(_double_backward_op, _keep_nothing, _no_third_derivative),
}


def _apply(op: Any, *args: Any) -> tuple[Any, ...]:
    functorch = torch._C._are_functorch_transforms_active()
    found: tuple[Any, ...] = _FUNCTIONS[op].apply(*args) if functorch else op(*args)
    return found


def _check_transforms(door: str) -> None:
    """Those that lead nowhere, of which PyTorch would speak in terms of the operators."""
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():  # without fullgraph=True it runs uncompiled
            raise RuntimeError(
                f"bn_fast.torch.{door} cannot be compiled within torch.func's transforms: leave out"
                f" fullgraph=True, or put back PyTorch's torch.nn.functional.{door}"
            )
        return
    forward_mode = torch._C._functorch.TransformType.Jvp
    if any(t.key() == forward_mode for t in torch._C._functorch.get_interpreter_stack() or ()):
        _no_forward_mode(door)


# The other norms, all by one Function and one pair of operators. A norm is its name and a number:
# of rows how many dimensions are normalized, of group norm the groups, of instance norm nothing.


def _door(norm: str) -> str:
    return norm.replace("norm", "_norm")


def _axes(shape: tuple[int, ...], norm: str, number: int) -> Axes:
    if norm == "groupnorm":
        return _norm_checks._axes_of_groups(shape, 1, number)
    if norm == "instancenorm":
        return _norm_checks._axes_of_channels(shape, 1)
    return _norm_checks.axes_of_rows(shape, tuple(range(len(shape) - number, len(shape))))


def _apply_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: str,
    number: int,
    eps: float,
    transformed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the statistics as the cache keeps them."""
    if not transformed:
        kept: list[torch.Tensor] = []
        y = _Norm.apply(input, weight, bias, norm, number, eps, kept)
        return y, kept[0]
    _check_transforms(_door(norm))
    y, stats = _apply(_norm_op, input, weight, bias, norm, number, eps)
    return y, stats


def _norm_forward(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: str,
    number: int,
    eps: float,
    out: torch.Tensor | None = None,
) -> tuple[Array, Array]:
    door = _door(norm)
    x = _to_array(input, door)
    gamma, beta = (None if a is None else _affine(a, door) for a in (weight, bias))
    given = None if out is None else _to_array(out, door)
    axes = _axes(x.shape, norm, number)
    return norms._computed(norm, _norm_checks.NormCall(x, gamma, beta, axes, eps, given))


def _norm_gradients(
    dout: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    stats: Array,
    bias_shape: tuple[int, ...] | None,
    norm: str,
    number: int,
    eps: float,
    *,
    wanted: tuple[bool, ...] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    door = _door(norm)
    x, gamma = _to_array(input, door), None if weight is None else _affine(weight, door)
    cache = NormCache(norm, x, gamma, bias_shape, _axes(x.shape, norm, number), stats, eps)
    names = GRADIENTS[:2] if norm == "rmsnorm" else GRADIENTS[:3]
    needs = [name for name, needed in zip(names, wanted) if needed]
    arrays = norms._backward(norm, _to_array(dout, door), cache, None, needs)
    return tuple(None if a is None else _to_tensor(a, input.dtype) for a in arrays)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        norm: str,
        number: int,
        eps: float,
        kept: list[torch.Tensor],
    ) -> torch.Tensor:
        y, stats = _norm_forward(input, weight, bias, norm, number, eps)
        kept.append(torch.from_numpy(stats))
        ctx.save_for_backward(input, weight)
        ctx.rest = stats, None if bias is None else tuple(bias.shape), norm, number, eps
        return _to_tensor(y, input.dtype)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given: tuple[Any, ...] = dout, *ctx.saved_tensors, *ctx.rest
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            found = _NormBackward.apply(*given)
            found = tuple(g if needed else None for g, needed in zip(found, wanted))
        else:
            found = _norm_gradients(*given, wanted=wanted)
        return *found, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        _no_forward_mode(_door(ctx.rest[2]))


class _NormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[torch.Tensor | None, ...]:
        ctx.norm = given[5]
        return _norm_gradients(*given)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        _no_second_derivative(ctx.norm)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        _no_forward_mode(_door(ctx.norm))


def _no_second_derivative(norm: str) -> Any:
    door = _door(norm)
    raise NotImplementedError(
        f"bn_fast.torch.{door} has no second derivative: put back PyTorch's"
        f" torch.nn.functional.{door} for it"
    )


@torch.library.custom_op("bn_fast::norm", mutates_args=())
def _norm_op(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: str,
    number: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty_like(input)
    _, stats = _norm_forward(input, weight, bias, norm, number, eps, y)
    return y, torch.from_numpy(stats)


@torch.library.custom_op("bn_fast::norm_backward", mutates_args=())
def _norm_backward_op(
    dout: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    has_bias: bool,
    norm: str,
    number: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dweight and dbias, empty where there are none."""
    shape = _parameter_shape(input, norm, number)
    found = _norm_gradients(
        dout, input, weight, _to_array(stats), shape if has_bias else None, norm, number, eps
    )
    none = _fake_gradient(input, (0,))
    dweight, dbias = (none.clone() if a is None else a for a in found[1:])
    return _in_strides(found[0], input), dweight, dbias


def _parameter_shape(input: Any, norm: str, number: int) -> Any:
    of_rows = norm in ("layernorm", "rmsnorm")
    return tuple(input.shape[input.dim() - number :] if of_rows else input.shape[1:2])


@_norm_op.register_fake
def _fake_norm(
    input: Any, weight: Any, bias: Any, norm: str, number: int, eps: float
) -> tuple[torch.Tensor, ...]:
    n = math.prod(_axes(input.shape, norm, number).stats_shape)
    return torch.empty_like(input), input.new_empty((4, n), dtype=torch.float64)


@_norm_backward_op.register_fake
def _fake_norm_backward(
    dout: Any,
    input: Any,
    weight: Any,
    stats: Any,
    has_bias: bool,
    norm: str,
    number: int,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    shape = _parameter_shape(input, norm, number)
    given = weight is not None, has_bias
    parameters = (_fake_gradient(input, shape if there else (0,)) for there in given)
    return torch.empty_like(input), *parameters


def _one_by_one(op: Any) -> Any:
    """The vmap of an operator: a call for each element of the batch."""

    def call(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        found = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims)))
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(parts) for parts in zip(*found))
        return stacked, (0,) * len(stacked)

    return call


_norm_op.register_vmap(_one_by_one(_norm_op))
_norm_backward_op.register_vmap(_one_by_one(_norm_backward_op))


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    input, weight, bias, *rest = inputs
    ctx.save_for_backward(input, weight, output[1])
    ctx.rest = bias is not None, *rest


def _norm_vjp(ctx: Any, dout: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    found = _apply(_norm_backward_op, dout, *ctx.saved_tensors, *ctx.rest)
    needed = zip(found, ctx.needs_input_grad)
    return (*(g if needs else None for g, needs in needed), *[None] * 3)


def _keep_name(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.norm = inputs[5]


def _norm_backward_vjp(ctx: Any, *_: Any) -> Any:
    _no_second_derivative(ctx.norm)


_FUNCTIONS[_norm_op] = _function(_norm_op, _keep_norm, _norm_vjp)
_FUNCTIONS[_norm_backward_op] = _function(_norm_backward_op, _keep_name, _norm_backward_vjp)
