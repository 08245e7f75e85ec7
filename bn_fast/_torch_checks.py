"""All that can be said of tensors without their data, which transformed ones do not have."""

import math
import operator
from typing import Any

import torch

from . import _checks
from ._torch_tensors import DTYPES, bfloat16_type


def check_tensor(value: Any, name: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_cpu or value.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor on the CPU, got one on {value.device} with layout"
            f" {value.layout}"
        )
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be a tensor of 16, 32 or 64 bit floats, got {value.dtype}")
    if value.dtype is torch.bfloat16:
        bfloat16_type()


def check_channels(
    input: Any, weight: Any, bias: Any, running_mean: Any = None, running_var: Any = None
) -> None:
    check_tensor(input, "input")
    if input.dim() < 2:
        shape = tuple(input.shape)
        raise ValueError(f"input must have 2 or more dimensions (N, C, ...), got shape {shape}")
    parameters = {"weight": weight, "bias": bias}
    parameters |= {"running_mean": running_mean, "running_var": running_var}
    check_parameters(input.shape[1:2], "one value for each channel of input", parameters)


def check_parameters(shape: tuple[int, ...], what: str, tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(tensor, name)
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} must have shape {tuple(shape)}, {what}, got {tuple(tensor.shape)}"
                )


def check_running(running_mean: Any, running_var: Any, name: str, own_statistics: Any) -> None:
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


def momentum_of(momentum: Any) -> float:
    number: float = momentum
    if type(momentum) is not float:
        number = _checks._number(momentum, "momentum")
    if not -math.inf < number < math.inf:
        raise ValueError(f"momentum must be finite, got {number}")
    return number


def epsilon_of(eps: Any) -> float:
    if type(eps) is float and 0 <= eps < math.inf:
        return eps
    return _checks.epsilon(eps)


def shape_of(normalized_shape: Any) -> tuple[int, ...]:
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
