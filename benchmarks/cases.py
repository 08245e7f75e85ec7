"""The one table of cases that every benchmark is run on."""

import math
from dataclasses import dataclass
from fnmatch import fnmatch

import numpy as np

DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """One x: its kind in the table, shape, feature axis and dtype; another norm than batch norm."""

    kind: str
    shape: tuple[int, ...]
    axis: int
    dtype: np.dtype
    norm: str = "batch"
    num_groups: int | None = None

    @property
    def name(self) -> str:
        norm = "" if self.norm == "batch" else f"{self.norm}-"
        axis = "" if self.axis == 1 or norm else f"-axis{self.axis}"
        return norm + "x".join(map(str, self.shape)) + axis + f"-{self.dtype}"

    @property
    def array_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# kind, shape, feature axis
SHAPES = [
    # what layers of real networks have, from a call that is all overhead to 200 MB
    ("layer", (32, 64), 1),
    ("layer", (256, 512), 1),
    ("layer", (256, 1024), 1),
    ("layer", (1024, 4096), 1),
    ("layer", (65536, 128), 1),
    ("layer", (32, 64, 56, 56), 1),
    ("layer", (32, 256, 14, 14), 1),
    ("layer", (16, 512, 7, 7), 1),
    ("layer", (32, 56, 56, 64), 3),
    ("layer", (100000, 512), 1),
    ("layer", (64, 64, 112, 112), 1),
    # feature counts that fill no vector and no tile
    ("odd", (100000, 1), 1),
    ("odd", (65536, 3), 1),
    ("odd", (32768, 10), 1),
    ("odd", (4096, 33), 1),
    ("odd", (2048, 251), 1),
    ("odd", (1000, 333), 1),
    # runs that are no multiple of a vector, and very long ones
    ("runs", (64, 251, 7, 7), 1),
    ("runs", (128, 33, 7, 7), 1),
    ("runs", (10, 333, 31, 29), 1),
    ("runs", (4, 33, 17, 40, 40), 1),
    ("runs", (16, 1, 224, 224), 1),
    ("runs", (8, 3, 224, 224), 1),
    ("runs", (2, 64, 224, 224), 1),
    ("runs", (256, 10, 100), 1),
    # very many rows, very many features
    ("tall", (1000000, 3), 1),
    ("tall", (1000000, 24), 1),
    ("tall", (262144, 64), 1),
    ("wide", (16, 65536), 1),
    ("wide", (64, 100000), 1),
    ("wide", (512, 20000), 1),
    # rows a power of two apart, which fall into few sets of a cache
    ("power of two", (512, 8192), 1),
    ("power of two", (2048, 2048), 1),
    ("power of two", (16384, 1024), 1),
    # images with the features last
    ("features last", (16, 224, 224, 3), 3),
    ("features last", (64, 14, 14, 160), 3),
    ("features last", (64, 7, 7, 512), 3),
    ("features last", (64, 112, 112, 64), 3),
]

# Layer and RMS norm, over the last axis: transformers, at training and at each token they say;
# very many short rows; the smallest call.
ROWS = [
    (8192, 1024),
    (65536, 128),
    (512, 768),
    (32, 197, 768),
    (4096, 4096),
    (65536, 8),
    (400000, 4),
    (1, 288),
    (1, 4096),
    (32, 64),
]
# Group and instance norm, shape and groups: networks for pictures, and the smallest call.
IMAGES = [
    ((32, 64, 56, 56), 8),
    ((32, 256, 14, 14), 32),
    ((16, 512, 7, 7), 32),
    ((2, 320, 64, 64), 32),
    ((4, 64, 8), 8),
]

DTYPES = [np.dtype("float32"), np.dtype("float64")]
CASES = [
    *(Case(kind, shape, axis, dtype) for kind, shape, axis in SHAPES for dtype in DTYPES),
    *(
        Case(f"{norm} norm", shape, len(shape) - 1, dtype, norm)
        for norm in ("layer", "rms")
        for shape in ROWS
        for dtype in DTYPES
    ),
    *(
        Case(f"{norm} norm", shape, 1, dtype, norm, groups if norm == "group" else None)
        for norm in ("group", "instance")
        for shape, groups in IMAGES
        for dtype in DTYPES
    ),
]

# A second's work in all, with each walk and both dtypes: run by CI, so that nothing here rots.
SMOKE = [
    "32x64-float32",
    "32x64-float64",
    "4096x33-float32",
    "1000x333-float64",
    "16x512x7x7-float32",
    "128x33x7x7-float64",
    "64x7x7x512-axis3-float32",
    "layer-512x768-float32",
    "layer-1x288-float64",
    "rms-32x64-float32",
    "group-16x512x7x7-float32",
    "instance-4x64x8-float32",
]


def select(patterns: list[str]) -> list[Case]:
    """The cases that any pattern means: all, smoke, a kind, or a name with wildcards."""
    chosen = []
    for pattern in patterns:
        found = [
            case
            for case in CASES
            if pattern in ("all", case.kind)
            or (pattern == "smoke" and case.name in SMOKE)
            or fnmatch(case.name, pattern)
        ]
        if not found:
            kinds = ", ".join(dict.fromkeys(case.kind for case in CASES))
            raise ValueError(
                f"no case is called {pattern!r}; there are all, smoke, the kinds {kinds}, and names"
                f" such as {CASES[0].name} or '*-float64'"
            )
        chosen += found
    return list(dict.fromkeys(chosen))
