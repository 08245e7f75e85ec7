"""Batch norm as an autograd.Function, and as operators that PyTorch can transform."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _checks
from ._cache import Cache
from ._checks import GRADIENTS
from ._core import core
from ._torch_tensors import in_strides, new_gradient, to_array, to_parameter, to_tensor
from ._torch_transforms import (
    apply,
    check_transforms,
    no_forward_mode,
    operator,
    register,
    replace,
)
from ._types import Array
from .functional import batchnorm_backward, batchnorm_double_backward, batchnorm_forward


def apply_batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    transformed: bool,
) -> torch.Tensor:
    """The output; running statistics are updated in training."""
    given = input, weight, bias, running_mean, running_var, training, momentum, eps
    if not transformed:
        return _BatchNorm.apply(*given)
    check_transforms("batch_norm")
    y, _, mean, var = apply(_forward_op, *given)
    if training and running_mean is not None:
        replace(running_mean, mean.detach())
        replace(running_var, var.detach())
    return y


def _forward(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> tuple[Array, Cache, Array | None, Array | None]:
    """Output, cache, and what becomes of the running statistics; nothing is changed."""
    x = to_array(input)
    param: dict[str, Any] = {"mode": "train" if training else "test", "eps": eps}
    if running_mean is not None and running_var is not None:
        mean, var = to_array(running_mean), to_array(running_var)
        if not core.are_plain_statistics(mean, var, x.shape[1]):
            _checks.variance(var, "running_var", x.shape[1], 1)
        param |= {"momentum": 1 - momentum, "running_mean": mean, "running_var": var}
    y, cache = batchnorm_forward(
        x,
        to_parameter(weight),
        to_parameter(bias),
        param,
        out=None if out is None else to_array(out),
    )
    if not training or running_mean is None:
        return y, cache, None, None
    mean, var = param["running_mean"], param["running_var"]
    if x.size:  # var / (M - 1) is what the unbiased variance has more than the biased one
        var = var + cache.stats[3] * (momentum / (x.size // x.shape[1] - 1))
    return y, cache, mean, var


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        y, cache, mean, var = _forward(*given)
        input, weight, _, running_mean, running_var, *_ = given
        if mean is not None and running_mean is not None and running_var is not None:
            running_mean.copy_(torch.from_numpy(mean))
            running_var.copy_(torch.from_numpy(var))
        # Through PyTorch, which notices when they are changed, and knows hooks that move them.
        ctx.save_for_backward(input, weight)
        ctx.rest = cache.stats, cache.eps, cache.frozen
        return to_tensor(y, input.dtype)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given: tuple[Any, ...] = dout, *ctx.saved_tensors, *ctx.rest
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
        no_forward_mode("batch_norm")


class _BatchNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[torch.Tensor | None, ...]:
        ctx.save_for_backward(*given[:3])
        ctx.set_materialize_grads(False)  # None says that nothing depends on a gradient
        ctx.rest = given[3:]
        return _gradients(*given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *second: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        found = _second_gradients(second, *ctx.saved_tensors, *ctx.rest)
        needed = zip(found, ctx.needs_input_grad)
        return (*(g if needs else None for g, needs in needed), *[None] * 3)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        no_forward_mode("batch_norm")


def _gradients(
    dout: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    stats: Array,
    eps: float,
    frozen: bool,
    *,
    wanted: tuple[bool, ...] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    cache = _cache(input, weight, stats, eps, frozen)
    if all(wanted):
        arrays = batchnorm_backward(to_array(dout), cache)
    else:
        needs = [name for name, needed in zip(GRADIENTS, wanted) if needed]
        arrays = batchnorm_backward(to_array(dout), cache, needs=needs)
    return tuple(None if a is None else to_tensor(a, input.dtype) for a in arrays)


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
    ddx, ddgamma, ddbeta = (None if t is None else to_array(t) for t in second)
    if weight is None:
        ddgamma = None
    dx, dgamma, ddout = batchnorm_double_backward(ddx, ddgamma, ddbeta, to_array(dout), cache)
    return tuple(None if a is None else to_tensor(a, input.dtype) for a in (ddout, dx, dgamma))


def _cache(
    input: torch.Tensor, weight: torch.Tensor | None, stats: Array, eps: float, frozen: bool
) -> Cache:
    x = to_array(input)
    beta = stats[0]  # any of its shape: without an activation only that is read
    return Cache(x, to_parameter(weight), beta, stats, 1, eps, frozen)


# The same three as operators that PyTorch knows by name, shape and dtype. They change nothing (what
# does is `replace`), give new tensors, and always all of them. A batch of calls (vmap) is one call
# with more channels.


@operator(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean,"
    " Tensor? running_var, bool training, float momentum, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _forward_op(input: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    """Output, stats, and the new running statistics, empty where there are none."""
    y = torch.empty_like(input)  # as PyTorch was told: NumPy may choose other strides
    _, cache, *running = _forward(input, *given, out=y)
    mean, var = (
        input.new_empty(0, dtype=torch.float64) if a is None else torch.from_numpy(a).double()
        for a in running
    )
    return y, torch.from_numpy(cache.stats), mean, var


@operator(
    "batch_norm_backward(Tensor dout, Tensor input, Tensor? weight, Tensor stats, float eps,"
    " bool frozen) -> (Tensor, Tensor, Tensor)"
)
def _backward_op(
    dout: Any, input: Any, weight: Any, stats: Any, eps: float, frozen: bool
) -> tuple[torch.Tensor | None, ...]:
    dx, dgamma, dbeta = _gradients(dout, input, weight, to_array(stats), eps, frozen)
    return in_strides(dx, input), _of_weight(dgamma, input), dbeta


@operator(
    "batch_norm_double_backward(Tensor? ddx, Tensor? ddgamma, Tensor? ddbeta, Tensor dout,"
    " Tensor input, Tensor? weight, Tensor stats, float eps, bool frozen)"
    " -> (Tensor, Tensor, Tensor)"
)
def _double_backward_op(*given: Any) -> tuple[torch.Tensor, ...]:
    dout, input, weight, stats, eps, frozen = given[3:]
    ddout, dx, dgamma = _second_gradients(
        given[:3], dout, input, weight, to_array(stats), eps, frozen
    )
    return in_strides(ddout, input), in_strides(dx, input), _of_weight(dgamma, input)


def _of_weight(gradient: torch.Tensor | None, input: torch.Tensor) -> torch.Tensor:
    """Zeros for that of a weight which was None: an operator's results are always all there."""
    return new_gradient(input, input.shape[1:2]).zero_() if gradient is None else gradient


@_forward_op.register_fake
def _fake_forward(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, *_: Any
) -> tuple[torch.Tensor, ...]:
    n = input.shape[1]
    n_running = n if training and running_mean is not None else 0
    sizes = (4, n), (n_running,), (n_running,)
    small = (input.new_empty(size, dtype=torch.float64) for size in sizes)
    return torch.empty_like(input), *small


@_backward_op.register_fake
def _fake_backward(dout: Any, input: Any, *_: Any) -> tuple[torch.Tensor, ...]:
    dgamma, dbeta = (new_gradient(input, input.shape[1:2]) for _ in range(2))
    return torch.empty_like(input), dgamma, dbeta


@_double_backward_op.register_fake
def _fake_double_backward(*given: Any) -> tuple[torch.Tensor, ...]:
    input = given[4]
    dgamma = new_gradient(input, input.shape[1:2])
    return torch.empty_like(input), torch.empty_like(input), dgamma


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


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    input, weight, *_, training, _, eps = inputs
    ctx.save_for_backward(input, weight, output[1])
    ctx.eps, ctx.frozen = eps, not training


def _forward_vjp(ctx: Any, dout: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    found = apply(_backward_op, dout, *ctx.saved_tensors, ctx.eps, ctx.frozen)
    needed = zip(found, ctx.needs_input_grad)
    return (*(g if needs else None for g, needs in needed), *[None] * 5)


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.eps, ctx.frozen = inputs[4:]


def _backward_vjp(ctx: Any, *second: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    found = apply(_double_backward_op, *second, *ctx.saved_tensors, ctx.eps, ctx.frozen)
    needed = zip(found, ctx.needs_input_grad)
    return (*(g if needs else None for g, needs in needed), *[None] * 3)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    pass


def _no_third_derivative(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError("bn_fast.torch.batch_norm has no third derivative")


register(_forward_op, _keep_forward, _forward_vjp)
register(_backward_op, _keep_backward, _backward_vjp)
register(_double_backward_op, _keep_nothing, _no_third_derivative)
