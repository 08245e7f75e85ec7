"""Batch, layer, RMS, group and instance norm for NumPy arrays: compiled, threaded, exact."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from ._config import __version__, build_info, show_config
from ._memory import get_result_cache, set_result_cache
from ._threads import get_num_threads, set_num_threads
from .functional import (
    batchnorm_backward,
    batchnorm_backward_alt,
    batchnorm_double_backward,
    batchnorm_forward,
    spatial_batchnorm_backward,
    spatial_batchnorm_forward,
)
from .layer import BatchNorm
from .norms import (
    group_norm,
    groupnorm_backward,
    groupnorm_forward,
    instance_norm,
    instancenorm_backward,
    instancenorm_forward,
    layer_norm,
    layernorm_backward,
    layernorm_forward,
    rms_norm,
    rmsnorm_backward,
    rmsnorm_forward,
    spatial_groupnorm_backward,
    spatial_groupnorm_forward,
)
from .pieces import Moments, backward_apply, backward_reduce, moments, normalize

if TYPE_CHECKING:
    from . import reference as reference  # which types it for `import bn_fast` alone

__all__ = [
    "BatchNorm",
    "Moments",
    "__version__",
    "backward_apply",
    "backward_reduce",
    "batchnorm_backward",
    "batchnorm_backward_alt",
    "batchnorm_double_backward",
    "batchnorm_forward",
    "build_info",
    "get_num_threads",
    "get_result_cache",
    "group_norm",
    "groupnorm_backward",
    "groupnorm_forward",
    "instance_norm",
    "instancenorm_backward",
    "instancenorm_forward",
    "layer_norm",
    "layernorm_backward",
    "layernorm_forward",
    "moments",
    "normalize",
    "rms_norm",
    "rmsnorm_backward",
    "rmsnorm_forward",
    "set_num_threads",
    "set_result_cache",
    "show_config",
    "spatial_batchnorm_backward",
    "spatial_batchnorm_forward",
    "spatial_groupnorm_backward",
    "spatial_groupnorm_forward",
]


def __getattr__(name: str) -> ModuleType:
    """bn_fast.reference, imported when it is asked for: nothing here needs it (4 ms)."""
    if name == "reference":
        return import_module("bn_fast.reference")
    raise AttributeError(f"module 'bn_fast' has no attribute {name!r}")
