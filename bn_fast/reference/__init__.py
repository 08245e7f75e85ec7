"""What the functions of bn_fast mean, in plain NumPy, and an oracle to judge any of them by.

None of it calls compiled code. `batch` has batch normalization, the derivations of its backward
pass, and the oracle.
"""

from .batch import (
    ACTIVATIONS,
    Cache,
    FrozenCache,
    Moments,
    backward_apply,
    backward_reduce,
    batchnorm_backward,
    batchnorm_backward_alt,
    batchnorm_backward_column_wise,
    batchnorm_backward_element_wise,
    batchnorm_backward_three_pathways,
    batchnorm_double_backward,
    batchnorm_forward,
    moments,
    normalize,
    oracle_backward,
    oracle_double_backward,
    oracle_forward,
    spatial_batchnorm_backward,
    spatial_batchnorm_forward,
)

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
    "moments",
    "normalize",
    "oracle_backward",
    "oracle_double_backward",
    "oracle_forward",
    "spatial_batchnorm_backward",
    "spatial_batchnorm_forward",
]
