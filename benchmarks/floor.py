"""What memory lets anyone do: a copy, and the floor of exact batch norm.

*copy* is the traffic of one pass: forward reads x and writes out, backward reads x and dout and
writes dx. *floor* is that of two: all inputs are read once, for the sums, then again backwards,
while what came last is still in a cache, and the output is written. Where a feature's values do not
fit the caches, no batch norm that is exact for any data goes below it.

Python threads suffice, because NumPy releases the GIL. Arrays are there before, so that no page
has to be mapped.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from timeit import repeat

import numpy as np

Work = Callable[..., object]  # of the inputs, then the output

CHUNK_BYTES = 1 << 19  # fits L2; larger ones cost less to start


def one_pass(*arrays: np.ndarray) -> None:
    """A copy of one input, a sum of two."""
    *inputs, out = arrays
    if len(inputs) == 1:
        np.copyto(out, inputs[0])
    else:
        np.add(*inputs, out)


def two_passes(*arrays: np.ndarray) -> None:
    *inputs, out = arrays
    step = CHUNK_BYTES // out.itemsize
    chunks = [slice(start, start + step) for start in range(0, out.size, step)]
    for chunk in chunks:
        for a in inputs:
            np.maximum.reduce(a[chunk])  # NumPy's fastest way to read
    for chunk in reversed(chunks):
        one_pass(*(a[chunk] for a in arrays))


def fastest(work: Work, arrays: tuple[np.ndarray, ...], n_threads: int) -> Callable[[], None]:
    """The work on one thread or on all, what is faster: waking threads takes some 20 us."""
    flat = [a.reshape(-1) for a in arrays]
    alone = partial(work, *flat)
    if n_threads == 1:
        return alone
    # The pool's threads end when the function that holds it is gone.
    pool = ThreadPoolExecutor(n_threads - 1)
    mine, *theirs = zip(*(np.array_split(a, n_threads) for a in flat))

    def together() -> None:
        jobs = [pool.submit(work, *part) for part in theirs]
        work(*mine)
        wait(jobs)

    return min(alone, together, key=lambda call: min(repeat(call, number=1, repeat=10)))
