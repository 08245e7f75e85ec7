"""What the functions of bn_fast mean, in plain NumPy, and an oracle to judge any of them by.

None of it calls compiled code. `batch` has batch normalization and `pieces` that of a batch in
several parts, `norms` layer, RMS, group and instance normalization: twins of the public functions.
`derivations` has the backward pass once for each of three derivations, `oracle` the same results in
long double.
"""

from ._caches import ACTIVATIONS, Cache, FrozenCache
from .batch import (
    batchnorm_backward,
    batchnorm_backward_alt,
    batchnorm_double_backward,
    batchnorm_forward,
    spatial_batchnorm_backward,
    spatial_batchnorm_forward,
)
from .derivations import (
    batchnorm_backward_column_wise,
    batchnorm_backward_element_wise,
    batchnorm_backward_three_pathways,
)
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
from .oracle import oracle_backward, oracle_double_backward, oracle_forward
from .pieces import Moments, backward_apply, backward_reduce, moments, normalize

__all__ = [
    "ACTIVATIONS",
    "Cache",
    "FrozenCache",
    "Moments",
    "backward_apply",
    "backward_reduce",
    "batchnorm_backward",
    "batchnorm_backward_alt",
    "batchnorm_backward_column_wise",
    "batchnorm_backward_element_wise",
    "batchnorm_backward_three_pathways",
    "batchnorm_double_backward",
    "batchnorm_forward",
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
    "oracle_backward",
    "oracle_double_backward",
    "oracle_forward",
    "rms_norm",
    "rmsnorm_backward",
    "rmsnorm_forward",
    "spatial_batchnorm_backward",
    "spatial_batchnorm_forward",
    "spatial_groupnorm_backward",
    "spatial_groupnorm_forward",
]
