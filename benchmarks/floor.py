"""What memory lets anyone do: a copy, and the floor of an exact norm.

*copy* is the traffic of one pass: forward reads x and writes out, backward reads x and dout and
writes dx. *floor* is that of two: all inputs are read once, for the sums, then again backwards,
while what came last is still in a cache, and the output is written. Where a feature's values do not
fit the caches, no batch norm that is exact for any data goes below it. The floor of the other norms
reads twice as well, but chunk by chunk: a row is still in a cache when it is read again.

It is C, built when it is first needed: NumPy has no way to write past the caches. The arrays are
there before, so that no page has to be mapped.
"""

import ctypes
import subprocess
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import repeat

import numpy as np

Call = Callable[[], object]

LINE = 64
WHOLE = 1 << 60  # all of an array as one chunk
CHUNK = (1 << 19) // LINE  # fits L2


@cache
def library() -> ctypes.CDLL:
    source = Path(__file__).with_suffix(".c")
    with TemporaryDirectory() as folder:
        built = f"{folder}/floor.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, source, "-o", built], check=True)
        return ctypes.CDLL(built)


def traffic(arrays: tuple[np.ndarray, ...], passes: int, chunk: int, n_threads: int) -> Call:
    """A call that reads all arrays but the last, so often, and writes that: of such calls, on one
    thread or all, past the caches or not, the fastest."""
    *inputs, out = (a.ctypes.data_as(ctypes.c_void_p) for a in arrays)  # which keep the arrays
    x, z = (*inputs, None)[:2]
    n_lines, chunk = (ctypes.c_long(n) for n in (arrays[0].nbytes // LINE, chunk))
    calls = [
        partial(library().traffic, x, z, out, n_lines, chunk, passes, n, past_caches)
        for n, past_caches in product({1, n_threads}, (0, 1))
    ]
    return min(calls, key=lambda call: min(repeat(call, number=1, repeat=10)))
