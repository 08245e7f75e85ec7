"""Calls that PyTorch transforms: which they are, and operators with derivatives for them."""

from collections.abc import Callable
from typing import Any

import torch
from torch._compile import _disable_dynamo


def is_transformed(input: torch.Tensor) -> bool:
    """Whether PyTorch does something else with the call than to run it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or type(input) not in (torch.Tensor, torch.nn.Parameter)
    )


def done_elsewhere(
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


def check_transforms(door: str) -> None:
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
        no_forward_mode(door)


def no_forward_mode(door: str) -> Any:
    raise NotImplementedError(
        f"bn_fast.torch.{door} has no forward-mode derivative: put back PyTorch's"
        f" torch.nn.functional.{door}, or differentiate backwards (torch.func.grad, vjp, jacrev)"
    )


def operator(schema: str) -> Any:
    """A function of tensors as an operator that changes nothing: its name, what it takes and gives
    as PyTorch writes them."""
    name, _, rest = schema.partition("(")
    return torch.library.custom_op(f"bn_fast::{name}", mutates_args=(), schema=f"({rest}")


# An operator's derivatives: its own, which torch.compile traces, and the same for torch.func, which
# needs an autograd.Function.

_functions: dict[Any, Any] = {}


def register(op: Any, keep: Any, vjp: Any) -> None:
    """vjp becomes the operator's derivative, from what keep keeps."""
    op.register_autograd(vjp, setup_context=keep)
    static = {"forward": lambda *args: op(*args), "setup_context": keep}
    static["backward"] = _disable_dynamo(vjp)  # torch.compile may meet it on its way, and fails
    named: dict[str, Any] = {name: staticmethod(function) for name, function in static.items()}
    named["generate_vmap_rule"] = True
    _functions[op] = type("Norm", (torch.autograd.Function,), named)


def apply(op: Any, *args: Any) -> tuple[Any, ...]:
    functorch = torch._C._are_functorch_transforms_active()
    found: tuple[Any, ...] = _functions[op].apply(*args) if functorch else op(*args)
    return found


@torch.library.custom_op("bn_fast::replace", mutates_args=("old",))
def replace(old: torch.Tensor, new: torch.Tensor) -> None:
    """old.copy_(new), which torch.func.grad would refuse for a layer's own buffers."""
    old.copy_(new)


@replace.register_vmap
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
    replace(old.movedim(before, 0), new)
    return None, None
