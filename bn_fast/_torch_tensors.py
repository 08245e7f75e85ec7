"""Tensors' memory as arrays, and arrays' as tensors, without a copy."""

from typing import Any

import numpy as np
import torch

from ._types import Array

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def bfloat16_type() -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError(
            "bn_fast.torch needs ml_dtypes for bfloat16: pip install ml_dtypes"
        ) from error
    return bfloat16


def to_array(tensor: torch.Tensor, door: str = "batch_norm") -> Array:
    """The tensor's own memory; force only drops the gradient and settles negative bits."""
    array: Array
    try:
        if tensor.dtype is torch.bfloat16:  # which Tensor.numpy does not know
            array = tensor.detach().view(torch.int16).numpy(force=True).view(bfloat16_type())
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


def to_parameter(tensor: torch.Tensor | None, door: str = "batch_norm") -> Array | None:
    if tensor is None:
        return None
    if tensor.dtype.itemsize == 2:  # storage alone: the kernels take parameters of 32 or 64 bits
        tensor = tensor.detach().float()
    return to_array(tensor, door)


def to_tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.bfloat16 and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def in_strides(result: Any, input: torch.Tensor) -> torch.Tensor:
    """The result as `torch.empty_like(input)` lies, where NumPy chose otherwise."""
    strides = torch.empty_like(input, device="meta").stride()
    return result if result.stride() == strides else torch.empty_like(input).copy_(result)


def new_gradient(input: Any, shape: Any) -> torch.Tensor:
    """A gradient of weight or bias."""
    wide = input.dtype is torch.float64
    found: torch.Tensor = input.new_empty(shape, dtype=torch.float64 if wide else torch.float32)
    return found
