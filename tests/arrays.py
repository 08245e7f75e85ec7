"""The axes of the tests: dtypes, layouts, shapes, and arrays of ordinary data along them."""

import tempfile

import numpy as np

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

DTYPES = [np.float32, np.float64]
HALVES = [np.float16] if bfloat16 is None else [np.float16, bfloat16]


def strided(values, order, steps):
    """`values` in memory of axis order `order` (outermost first), `steps[d]` elements apart."""
    sizes = [n * abs(step) for n, step in zip(values.shape, steps, strict=True)]
    memory = np.full([sizes[d] for d in order], -77, values.dtype)
    view = memory.transpose(np.argsort(order))[tuple(slice(None, None, step) for step in steps)]
    view[...] = values
    return view


def _every(step):
    return lambda a: strided(a, range(a.ndim), [step] * a.ndim)


def _permuted(a):
    return strided(a, np.roll(range(a.ndim), 1), [1] * a.ndim)


def _features_last(a):
    """Images as (N, H, W, C) in memory, seen as (N, C, H, W)."""
    return strided(a, [0, *range(2, a.ndim), 1], [1] * a.ndim)


def _readonly(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def unaligned(a):
    memory = np.zeros(a.nbytes + 1, np.uint8)
    view = memory[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def _memory_mapped(a):
    if a.size == 0:
        return a
    with tempfile.TemporaryFile() as file:
        file.write(a.tobytes())
        file.flush()
        return np.memmap(file, a.dtype, "r", shape=a.shape)


# From a C-contiguous array to one of the same shape. The broadcast ones repeat a part of it.
LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "sliced": _every(2),
    "reversed": _every(-1),
    "sliced backwards": _every(-2),
    "permuted": _permuted,
    "features last": _features_last,
    "broadcast first": lambda a: np.broadcast_to(a[:1], a.shape),
    "broadcast last": lambda a: np.broadcast_to(a[..., :1], a.shape),
    "read-only": _readonly,
    "memory map": _memory_mapped,
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": unaligned,
}

# (shape, axis). The numbers around which they lie are limits of the layout: NARROW 16, BLOCK_ROWS
# 128, SHORT_RUN 64, ALONG_RUN 144, JOIN_COLUMNS, ALONG_WEIGHED 256, MAX_COLUMNS 512, PIECE 1024;
# and LANES 16.
SHAPES = [
    ((1, 5), 1),  # one value for each feature
    ((2, 5), 1),
    ((3, 4), 1),
    ((4, 1), 1),  # one feature
    ((130, 1), 1),
    ((3, 40), 1),  # more features than rows
    ((5, 2000), 1),
    ((700, 4), 1),
    *(((20, n), 1) for n in (15, 16, 17)),
    *(((19, n), 1) for n in (127, 128, 129)),
    *(((9, n), 1) for n in (255, 256, 257)),
    *(((9, n), 1) for n in (511, 512, 513)),
    *(((n, 130), 1) for n in (127, 128, 129)),
    ((17, 40), 0),
    ((6, 5, 4), 0),
    ((6, 5, 4), -1),
    ((4, 3, 1), 1),
    ((4, 3, 2), 1),
    ((5, 4, 7), 1),
    ((9, 6, 7, 7), 1),
    *(((4, n, 7, 7), 1) for n in (10, 11, 21)),  # 10 runs of 49 fit in MAX_COLUMNS
    ((3, 5, 14, 14), 1),
    ((2, 3, 56, 56), 1),
    ((5, 6, 7, 9), 3),
    *(((1, 2, n), 1) for n in (63, 64, 65)),
    *(((2, 3, n), 1) for n in (127, 128, 129)),
    *(((8, 3, n), 1) for n in (255, 256, 257)),
    *(((2, 2, n), 1) for n in (143, 144, 145, 191, 193)),
    *(((2, 2, n), 1) for n in (1023, 1024, 1025, 1087, 2100)),
    ((2, 3, 300), 1),
    ((2, 1, 1000), 1),
    ((3, 2, 4, 5, 6), 2),
]

# More rows than a chunk has, in every way that rows come about: alone, joined, runs, cut runs.
TALL = [
    *(((n, 130), 1) for n in (1023, 1024, 1025, 2049)),
    ((85 * 1024 + 1, 3), 1),
    ((1100, 12, 7), 1),
    ((70000, 1), 1),
    ((9, 2, 14000), 1),
]


def normal(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def problem(shape, axis, dtype, layout="C"):
    """x, dout, gamma, beta of ordinary size; x and dout in the layout.

    Only one of them repeats itself along an axis: a dout that follows x everywhere has dx = 0.
    """
    other = {"broadcast first": "broadcast last", "broadcast last": "broadcast first"}
    x = LAYOUTS[layout](3 + 2 * normal(shape, dtype, 1))
    dout = LAYOUTS[other.get(layout, layout)](normal(shape, dtype, 2) + dtype(0.5))
    n_features = shape[axis]
    return x, dout, 1 + normal(n_features, dtype, 3) / 4, normal(n_features, dtype, 4)


def hostile(x):
    """Some features that take the wide road: huge, tiny, not finite, constant."""
    first = np.moveaxis(x, 1, 0)
    for f, value in enumerate([1e30, 1e-30, np.inf, np.nan, 0]):
        if len(first) > 3 * f + 1:
            first[3 * f + 1] *= x.dtype.type(value)
    return x


def spread_weights(shape, axis, kind, seed=5):
    """Weights of x's shape, but for length 1 along axis if the kind is not "each": with zeros, but
    none has no weight."""
    if kind is None:
        return None
    kind, *each = kind.split()
    if not each:
        shape = tuple(1 if d == axis % len(shape) else n for d, n in enumerate(shape))
    w = np.random.default_rng(seed).integers(0, 4, shape)
    np.moveaxis(w, axis, -1)[(slice(1),) * (w.ndim - 1)] = 2
    return {"mask": w > 0, "integers": w, "real": w / 3.0}[kind]


def widened(half):
    """A half type's array as float32 in the same layout: of its bits, or its sums', none differ."""
    if half.size == 0 or any(step % 2 for step in half.strides):
        return half.astype(np.float32)
    ends = [(n - 1) * step // 2 for n, step in zip(half.shape, half.strides, strict=True)]
    first = -sum(min(0, end) for end in ends)
    memory = np.zeros(first + 1 + sum(max(0, end) for end in ends), np.float32)
    steps = [2 * step for step in half.strides]
    wide = np.lib.stride_tricks.as_strided(memory[first:], half.shape, steps)
    wide[...] = half
    return wide


def restepped(a):
    """The same memory, seen with other strides of axes of length 1, which say nothing."""
    strides = [s if n > 1 else s + 3 * a.itemsize for n, s in zip(a.shape, a.strides, strict=True)]
    return np.lib.stride_tricks.as_strided(a, a.shape, strides)


def twin(a):
    """The same values at the same steps in memory of its own; a copy where elements repeat."""
    if 0 in a.strides:
        return np.array(a)
    low, high = np.lib.array_utils.byte_bounds(a)
    memory = np.zeros(high - low, np.uint8)
    view = np.ndarray(a.shape, a.dtype, memory, a.ctypes.data - low, a.strides)
    view[...] = a
    return view
