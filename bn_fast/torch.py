"""Batch normalization for PyTorch's CPU tensors: `torch.nn.functional.batch_norm`'s signature.

The tensors' memory is read in place and the results are NumPy's memory under tensors: no copies.

There are three roads. An ordinary call takes an autograd.Function. One that PyTorch transforms
(torch.func, torch.compile, a dispatch mode), where tensors have no memory, takes custom operators,
which compute the same and cost a small call 50 us more each way. One that is written down, to be
run without this module (torch.jit, torch.export, ONNX), is left to PyTorch's own function.
"""

import math
from typing import Any

try:
    import torch
except ImportError as error:
    raise ImportError("bn_fast.torch needs PyTorch: pip install torch") from error

import numpy as np
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from . import _checks
from ._cache import Cache
from ._checks import GRADIENTS
from ._core import core
from ._types import Array
from .functional import batchnorm_backward, batchnorm_double_backward, batchnorm_forward

__all__ = ["batch_norm"]

# Taken before anybody puts this module's function in its place.
_pytorchs = torch.nn.functional.batch_norm

_NAMES = "weight", "bias", "running_mean", "running_var"
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
    if torch.overrides.has_torch_function(given):  # torch.fx, subclasses of Tensor
        found: torch.Tensor = torch.overrides.handle_torch_function(
            batch_norm, given, *given, training, momentum, eps
        )
        return found
    transformed = _is_transformed(input)
    if torch.jit.is_tracing() or (transformed and torch.compiler.is_exporting()):
        return _pytorchs(*given, training, momentum, eps)
    _check(*given, training)
    if type(momentum) is not float:
        momentum = _checks._number(momentum, "momentum")
    if not -math.inf < momentum < math.inf:
        raise ValueError(f"momentum must be finite, got {momentum}")
    if type(eps) is not float or not 0 <= eps < math.inf:
        eps = _checks.epsilon(eps)
    ordered = input, weight, bias, running_mean, running_var, bool(training), momentum, eps
    if not transformed:
        return _BatchNorm.apply(*ordered)
    _check_transforms()
    y, _, mean, var = _apply(_forward_op, *ordered)
    if training and running_mean is not None:
        _replace_op(running_mean, mean.detach())
        _replace_op(running_var, var.detach())
    return y


def _is_transformed(input: torch.Tensor) -> bool:
    """Whether PyTorch does something else with the call than to run it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(input) not in (torch.Tensor, torch.nn.Parameter)
    )


def _check(
    input: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: Any
) -> None:
    """All that can be said of tensors without their data, which transformed ones do not have."""
    _check_tensor(input, "input")
    if input.dim() < 2:
        shape = tuple(input.shape)
        raise ValueError(f"input must have 2 or more dimensions (N, C, ...), got shape {shape}")
    n = input.shape[1:2]
    for name, tensor in zip(_NAMES, (weight, bias, running_mean, running_var)):
        if tensor is not None:
            _check_tensor(tensor, name)
            if tensor.shape != n:
                raise ValueError(
                    f"{name} must have shape ({n[0]},), one value for each channel of input, got"
                    f" {tuple(tensor.shape)}"
                )
    if running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        if not training:
            raise ValueError(
                "running_mean and running_var must be given with training=False, got"
                f" {missing}=None"
            )
        if running_mean is not running_var:
            raise ValueError(
                "running_mean and running_var must both be given or both be None, got"
                f" {missing}=None"
            )
    elif torch.is_grad_enabled() and (running_mean.requires_grad or running_var.requires_grad):
        name = "running_mean" if running_mean.requires_grad else "running_var"
        raise ValueError(f"{name} must not require a gradient: none flows through it")
    if training and input.shape[0] == 1 == math.prod(input.shape[2:]):
        raise ValueError(
            "input must have more than 1 value for each channel when training, got shape"
            f" {tuple(input.shape)}"
        )


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


def _to_array(tensor: torch.Tensor) -> Array:
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
            "bn_fast.torch.batch_norm cannot read a tensor that PyTorch transforms in this way: put"
            f" back PyTorch's torch.nn.functional.batch_norm for it ({error})"
        ) from error
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
        _parameter(weight, x, 1),
        _parameter(bias, x, 0),
        param,
        out=None if out is None else _to_array(out),
    )
    if not training or running_mean is None:
        return y, cache, None, None
    mean, var = param["running_mean"], param["running_var"]
    if x.size:  # var / (M - 1) is what the unbiased variance has more than the biased one
        var = var + cache.stats[3] * (momentum / (x.size // x.shape[1] - 1))
    return y, cache, mean, var


def _no_forward_mode(*_: Any) -> Any:
    raise NotImplementedError(
        "bn_fast.torch.batch_norm has no forward-mode derivative: put back PyTorch's"
        " torch.nn.functional.batch_norm, or differentiate backwards (torch.func.grad, vjp, jacrev)"
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

    jvp = _no_forward_mode


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
        found = _second_gradients(second, dout, input, weight, ctx.stats, ctx.eps, ctx.frozen)
        needed = zip(found, ctx.needs_input_grad)
        return (*(g if needs else None for g, needs in needed), *[None] * 3)

    jvp = _no_forward_mode


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
) -> tuple[torch.Tensor, ...]:
    """With respect to dout, input and weight, from those with respect to the three gradients."""
    cache = _cache(input, weight, stats, eps, frozen)
    ddx, ddgamma, ddbeta = (None if t is None else _to_array(t) for t in second)
    dx, dgamma, ddout = batchnorm_double_backward(ddx, ddgamma, ddbeta, _to_array(dout), cache)
    return tuple(_to_tensor(a, input.dtype) for a in (ddout, dx, dgamma))


def _cache(
    input: torch.Tensor, weight: torch.Tensor | None, stats: Array, eps: float, frozen: bool
) -> Cache:
    x = _to_array(input)
    return Cache(x, _parameter(weight, x, 1), stats, 1, eps, frozen)


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
    return _in_strides(dx, input), dgamma, dbeta


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
    return _in_strides(ddout, input), _in_strides(dx, input), dgamma


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
            "bn_fast.torch.batch_norm cannot keep the running statistics of a batch of calls (vmap)"
            " in one tensor: give it running_mean and running_var for each, or None"
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
    return torch.empty_like(input), _fake_parameter(input), _fake_parameter(input)


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
    return torch.empty_like(input), torch.empty_like(input), _fake_parameter(input)


def _fake_parameter(input: torch.Tensor) -> torch.Tensor:
    """A gradient of weight or bias."""
    wide = input.dtype is torch.float64
    return input.new_empty(input.shape[1], dtype=torch.float64 if wide else torch.float32)


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
    return type("BatchNorm", (torch.autograd.Function,), named | {"generate_vmap_rule": True})


_FUNCTIONS = {
    _forward_op: _function(_forward_op, _keep_forward, _forward_vjp),
    _backward_op: _function(_backward_op, _keep_backward, _backward_vjp),
    _double_backward_op: _function(_double_backward_op, _keep_nothing, _no_third_derivative),
}


def _apply(op: Any, *args: Any) -> tuple[Any, ...]:
    functorch = torch._C._are_functorch_transforms_active()
    found: tuple[Any, ...] = _FUNCTIONS[op].apply(*args) if functorch else op(*args)
    return found


def _check_transforms() -> None:
    """Those that lead nowhere, of which PyTorch would speak in terms of the operators."""
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():  # without fullgraph=True it runs uncompiled
            raise RuntimeError(
                "bn_fast.torch.batch_norm cannot be compiled within torch.func's transforms: leave"
                " out fullgraph=True, or put back PyTorch's torch.nn.functional.batch_norm"
            )
        return
    forward_mode = torch._C._functorch.TransformType.Jvp
    if any(t.key() == forward_mode for t in torch._C._functorch.get_interpreter_stack() or ()):
        _no_forward_mode()
