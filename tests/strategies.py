"""What hypothesis draws: arrays of any order and form, problems of them, hostile ones too."""

import tempfile

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from bn_fast._core import core

from .arrays import DTYPES, normal, strided, unaligned
from .problems import SHAPES, around

# No database: the package under test may be installed where nothing can be written.
few = settings(max_examples=250, deadline=None, database=None, derandomize=True)

MODES = ["train", "test"]
EPS = [1e-5, 1e-3, 0.5]


def memory_mapped(a):
    """The array in a file, its strides kept."""
    low = np.lib.array_utils.byte_bounds(a)[0]
    memory = np.lib.array_utils.byte_bounds(a)[1] - low
    with tempfile.TemporaryFile() as file:
        file.truncate(memory)
        array = np.ndarray(
            a.shape, a.dtype, np.memmap(file, np.uint8), a.ctypes.data - low, a.strides
        )
    array[...] = a
    array.flags.writeable = False
    return array


@st.composite
def arrays(draw, shape, wild=False, dtypes=DTYPES):
    """An array of this shape in any order and direction, with gaps, repeats and odd addresses."""
    ndim = len(shape)
    seed = draw(st.integers(0, 2**16))
    dtype = draw(st.sampled_from(dtypes))
    values = normal(shape, dtype, seed) + dtype(draw(st.sampled_from([0, 100])))
    if wild:
        values += dtype(draw(st.sampled_from([0, 0, 1e4, -3e5])))
        values *= dtype(draw(st.sampled_from([1, 1, 1, 1e-3, 1e5, 1e8, 1e-12])))
        if draw(st.integers(0, 4)) == 0:  # constant along some axis, or everywhere
            which = draw(st.integers(0, 2**ndim - 1))
            values[...] = values[
                tuple(slice(0, 1 if which >> d & 1 else None) for d in range(ndim))
            ]
    repeated = tuple(slice(0, 1) if draw(st.integers(0, 9)) == 0 else slice(None) for _ in shape)
    values = values[repeated]
    steps = draw(st.tuples(*[st.sampled_from([1, 1, 1, -1, 2, -3])] * ndim))
    array = strided(values, draw(st.permutations(range(ndim))), steps)
    form = draw(
        st.sampled_from(["", "", "", "byte-swapped", "unaligned", "integers", "memory map"])
    )
    if form == "byte-swapped" and array.dtype.kind == "f":  # ml_dtypes has none
        array = array.astype(array.dtype.newbyteorder())
    elif form == "unaligned":
        array = unaligned(array)
    elif form == "integers":
        array = (4 * array % 30000).astype(np.int16)
    elif form == "memory map":
        array = memory_mapped(array)
    array = np.broadcast_to(array, shape)
    return array


@st.composite
def shapes_of_any_kind(draw):
    shape = draw(st.lists(st.integers(1, 12), min_size=2, max_size=5))
    if draw(st.booleans()):
        long = draw(st.integers(0, len(shape) - 1))
        shape = [min(n, 4) for n in shape]
        shape[long] = draw(st.integers(1, 600))
    return tuple(shape)


@st.composite
def x_and_dout(draw, shape, wild, dtypes):
    x, dout = draw(arrays(shape, wild, dtypes)), draw(arrays(shape, wild))
    shares = draw(st.integers(0, 9))
    if shares == 0:
        dout = x
    elif shares == 1:
        dout = x[::-1]  # shares memory with x, at other places
    return x, dout


@st.composite
def problems(draw, wild=False, dtypes=DTYPES):
    shape = draw(shapes_of_any_kind())
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    x, dout = draw(x_and_dout(shape, wild, dtypes))
    values = st.lists(
        st.floats(-4, 4, width=16).filter(lambda v: v == 0 or abs(v) > 0.1),
        min_size=shape[axis],
        max_size=shape[axis],
    )
    gamma, beta = np.array(draw(values)), np.array(draw(values))
    return x, dout, gamma, beta, axis


@st.composite
def norm_problems(draw, wild=False, dtypes=DTYPES):
    """A norm's name, axis and num_groups; x, dout, gamma and beta, of which each may be None."""
    shape = draw(shapes_of_any_kind())
    ndim = len(shape)
    norm = draw(st.sampled_from(["layernorm", "rmsnorm", "groupnorm", "instancenorm"]))
    num_groups = None
    if norm in ("layernorm", "rmsnorm"):
        any_axis = st.integers(-ndim, ndim - 1)
        some = st.lists(any_axis, min_size=1, max_size=ndim, unique_by=lambda d: d % ndim)
        axis = draw(st.one_of(any_axis, some.map(tuple)))
        along = sorted({d % ndim for d in np.atleast_1d(axis)})
    else:
        axis = draw(st.integers(1, ndim - 1)) - draw(st.sampled_from([0, ndim]))
        along = [axis]
        if norm == "groupnorm":
            n = shape[axis]
            num_groups = draw(st.sampled_from([g for g in range(1, n + 1) if n % g == 0]))
    x, dout = draw(x_and_dout(shape, wild, dtypes))
    size = tuple(shape[d] for d in along)
    seed = draw(st.integers(0, 1000))
    gamma = draw(st.sampled_from([1 + normal(size, np.float64, seed) / 4, None]))
    beta = draw(st.sampled_from([normal(size, np.float64, seed + 1), None]))
    if norm == "rmsnorm":
        beta = None
    return (norm, axis, num_groups), x, dout, gamma, beta


SIZES = sorted({n for n in around(*core.boundaries.values()) if 0 < n < 1 << 14} | {1, 2, 3})


@st.composite
def shapes(draw, most=1 << 17):
    """(N, C, ...) at any of the engine's boundaries at once, of no more than `most` elements."""
    if draw(st.booleans()):
        return draw(st.sampled_from(SHAPES))
    shape = []
    for _ in range(draw(st.integers(2, 4))):
        shape.append(draw(st.sampled_from([n for n in SIZES if n <= most])))
        most //= shape[-1]
    return tuple(draw(st.permutations(shape)))


@st.composite
def neighbors(draw, axes, valid):
    """A row of the axes as `calls.check_first` takes it, and what it takes besides: a shape, a
    feature, and up to three more hostile ones."""
    row = {}
    for name, values in axes.items():
        row[name] = draw(st.sampled_from([v for v in values if valid(row | {name: v})]))
    shape = draw(shapes())
    feature = st.integers(0, shape[1] - 1)
    kinds = st.sampled_from([kind for kind in axes["kind"] if valid(row | {"kind": kind})])
    return row, {
        "shape": shape,
        "place": draw(feature),
        "beside": draw(st.lists(st.tuples(kinds, feature), max_size=3)),
        "seed": draw(st.integers(0, 1000)),
    }
