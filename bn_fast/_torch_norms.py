"""The other norms likewise, all by one Function and one pair of operators.

A norm is its name and a number: of rows how many dimensions are normalized, of group norm the
groups, of instance norm nothing.
"""

import math
from typing import Any

import torch

from . import _norm_checks, norms
from ._cache import Axes, NormCache
from ._checks import GRADIENTS
from ._torch_tensors import in_strides, new_gradient, to_array, to_parameter, to_tensor
from ._torch_transforms import apply, check_transforms, no_forward_mode, operator, register
from ._types import Array


def apply_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: str,
    number: int,
    eps: float,
    transformed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the statistics as the cache keeps them."""
    given = input, weight, bias, norm, number, eps
    if not transformed:
        kept: list[torch.Tensor] = []
        y = _Norm.apply(*given, kept)
        return y, kept[0]
    check_transforms(_door(norm))
    y, stats = apply(_norm_op, *given)
    return y, stats


def _door(norm: str) -> str:
    return norm.replace("norm", "_norm")


def _axes(shape: tuple[int, ...], norm: str, number: int) -> Axes:
    if norm == "groupnorm":
        return _norm_checks.axes_of_groups(shape, 1, number)
    if norm == "instancenorm":
        return _norm_checks.axes_of_channels(shape, 1)
    return _norm_checks.axes_of_rows(shape, tuple(range(len(shape) - number, len(shape))))


def _norm_forward(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    norm: str,
    number: int,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> tuple[Array, Array]:
    door = _door(norm)
    x = to_array(input, door)
    gamma, beta = to_parameter(weight, door), to_parameter(bias, door)
    given = None if out is None else to_array(out, door)
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
    x, gamma = to_array(input, door), to_parameter(weight, door)
    cache = NormCache(norm, x, gamma, bias_shape, _axes(x.shape, norm, number), stats, eps)
    names = GRADIENTS[:2] if norm == "rmsnorm" else GRADIENTS[:3]
    needs = [name for name, needed in zip(names, wanted) if needed]
    arrays = norms._backward(norm, to_array(dout, door), cache, None, needs)
    return tuple(None if a is None else to_tensor(a, input.dtype) for a in arrays)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:
        input, weight, bias, *rest, kept = given
        y, stats = _norm_forward(input, weight, bias, *rest)
        kept.append(torch.from_numpy(stats))
        ctx.save_for_backward(input, weight)
        ctx.rest = stats, None if bias is None else tuple(bias.shape), *rest
        return to_tensor(y, input.dtype)

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
        no_forward_mode(_door(ctx.rest[2]))


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
        no_forward_mode(_door(ctx.norm))


def _no_second_derivative(norm: str) -> Any:
    door = _door(norm)
    raise NotImplementedError(
        f"bn_fast.torch.{door} has no second derivative: put back PyTorch's"
        f" torch.nn.functional.{door} for it"
    )


@operator(
    "norm(Tensor input, Tensor? weight, Tensor? bias, str norm, SymInt number, float eps)"
    " -> (Tensor, Tensor)"
)
def _norm_op(input: torch.Tensor, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty_like(input)
    _, stats = _norm_forward(input, *given, out=y)
    return y, torch.from_numpy(stats)


@operator(
    "norm_backward(Tensor dout, Tensor input, Tensor? weight, Tensor stats, bool has_bias,"
    " str norm, SymInt number, float eps) -> (Tensor, Tensor, Tensor)"
)
def _norm_backward_op(
    dout: Any, input: Any, weight: Any, stats: Any, has_bias: bool, norm: str, *rest: Any
) -> tuple[torch.Tensor, ...]:
    """dx, dweight and dbias, empty where there are none."""
    shape = _parameter_shape(input, norm, rest[0]) if has_bias else None
    found = _norm_gradients(dout, input, weight, to_array(stats), shape, norm, *rest)
    none = new_gradient(input, (0,))
    dweight, dbias = (none.clone() if a is None else a for a in found[1:])
    return in_strides(found[0], input), dweight, dbias


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
    dout: Any, input: Any, weight: Any, stats: Any, has_bias: bool, norm: str, number: int, *_: Any
) -> tuple[torch.Tensor, ...]:
    shape = _parameter_shape(input, norm, number)
    given = weight is not None, has_bias
    parameters = (new_gradient(input, shape if there else (0,)) for there in given)
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
    found = apply(_norm_backward_op, dout, *ctx.saved_tensors, *ctx.rest)
    needed = zip(found, ctx.needs_input_grad)
    return (*(g if needs else None for g, needs in needed), *[None] * 3)


def _keep_name(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.norm = inputs[5]


def _norm_backward_vjp(ctx: Any, *_: Any) -> Any:
    _no_second_derivative(ctx.norm)


register(_norm_op, _keep_norm, _norm_vjp)
register(_norm_backward_op, _keep_name, _norm_backward_vjp)
