"""What memory lets anyone do: a copy, and the floor of an exact norm.

*copy* is the traffic of one pass: forward reads x and writes out, backward reads x and dout and
writes dx. *floor* is that of two: all inputs are read once, for the sums, then again backwards,
while what came last is still in a cache, and the output is written. Where a feature's values do not
fit the caches, no batch norm that is exact for any data goes below it. The floor of the other norms
reads twice as well, but chunk by chunk: a row is still in a cache when it is read again.

Python threads suffice, because NumPy releases the GIL. Arrays are there before, so that no page
has to be mapped.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from timeit import repeat

import numpy as np

Call = Callable[[], object]
Work = Callable[..., Call]  # of the inputs, then the output; what it returns does it

CHUNK_BYTES = 1 << 19  # fits L2; larger ones cost less to start


def one_pass(*arrays: np.ndarray) -> Call:
    """A copy of one input, a sum of two."""
    *inputs, out = arrays
    return partial(np.copyto, out, *inputs) if len(inputs) == 1 else partial(np.add, *inputs, out)


def two_passes(*arrays: np.ndarray) -> Call:
    chunks = _chunks(arrays)
    reads = [read for chunk in chunks for read in _reads(chunk)]
    return partial(_all, [*reads, *(one_pass(*chunk) for chunk in reversed(chunks))])


def two_passes_in_cache(*arrays: np.ndarray) -> Call:
    calls = ([*_reads(chunk), one_pass(*chunk)] for chunk in _chunks(arrays))
    return partial(_all, [one for chunk in calls for one in chunk])


def _chunks(arrays: tuple[np.ndarray, ...]) -> list[list[np.ndarray]]:
    step = CHUNK_BYTES // arrays[0].itemsize
    return [[a[i : i + step] for a in arrays] for i in range(0, arrays[0].size, step)]


def _reads(chunk: list[np.ndarray]) -> list[Call]:
    """NumPy's fastest way to read; of small arrays, though, the call takes longer than that."""
    return [partial(np.maximum.reduce, a) for a in chunk[:-1]]


def _all(calls: list[Call]) -> None:
    for call in calls:
        call()


def fastest(work: Work, arrays: tuple[np.ndarray, ...], n_threads: int) -> Call:
    """The work on one thread or on all, what is faster: waking threads takes some 20 us."""
    flat = [a.reshape(-1) for a in arrays]
    alone = work(*flat)
    if n_threads == 1:
        return alone
    # The pool's threads end when the function that holds it is gone.
    pool = ThreadPoolExecutor(n_threads - 1)
    mine, *theirs = (work(*part) for part in zip(*(np.array_split(a, n_threads) for a in flat)))

    def together() -> None:
        jobs = [pool.submit(one) for one in theirs]
        mine()
        wait(jobs)

    return min(alone, together, key=lambda call: min(repeat(call, number=1, repeat=10)))
