"""How much memory of released results is kept for the next ones."""

import os
import sys
from typing import SupportsIndex

from . import _results
from ._threads import cgroup_folders, integer, read

_MOST = 512 * 2**20
_SHARE = 8  # of the memory that this process may use


def _cgroup_bytes(*where: str) -> int | None:
    """The memory that this process's cgroup may use; None: no limit.

    cgroup 2 writes it, or "max", into memory.max, cgroup 1 into memory.limit_in_bytes, where a
    number beyond every machine's memory is no limit.
    """
    limits = []
    for folder in cgroup_folders("memory", *where):
        limit = read(f"{folder}/memory.max") or read(f"{folder}/memory.limit_in_bytes")
        if limit.strip().isdecimal():
            limits.append(int(limit))
    return min(limits, default=None)


def _default() -> int:
    """Bytes; 0 in a build that keeps nothing."""
    usable = _results.usable_memory()
    return int(min(_MOST, min(usable, _cgroup_bytes() or usable) / _SHARE))


def set_result_cache(n_bytes: SupportsIndex | None) -> None:
    """Set how much memory of released results is kept for the next ones, in this process.

    A new array of many megabytes costs as much in page faults as the arithmetic that fills it. So
    the memory of an `out` or `dx` of 128 KiB and more that nobody refers to any more is kept and
    becomes that of a later result, up to an eighth smaller, in any thread. It is ordinary in every
    other way: an array owns its data, and can be resized. What is kept counts as memory of this
    process, but the kernel takes it when it needs it (Linux; huge pages alone, so up to 2 MiB of
    each result stay): that of results of 64 MiB and more at once, of 4 MiB and more when 32 later
    ones have not taken it.

    Parameters
    ----------
    n_bytes : int or None
        At most so many bytes are kept, and nothing that was not wanted for 256 results; 0: nothing,
        and results come from NumPy's own allocator. None returns to the default: 512 MiB or an
        eighth of the memory that this process may use (by its cgroup, its limit on addresses and
        the machine's size), and no more than the two largest of the last 128 to 256 results take.
        The environment variable ``BN_FAST_RESULT_CACHE`` gives the number to begin with.

    Raises
    ------
    TypeError
        If `n_bytes` is neither an integer nor None.
    ValueError
        If `n_bytes` is negative or more than can be addressed.

    Notes
    -----
    A forked child begins with nothing kept. Where a handler of memory has been set with
    ``PyDataMem_SetHandler``, results come from that.

    Examples
    --------
    >>> import bn_fast
    >>> bn_fast.set_result_cache(0)
    >>> bn_fast.get_result_cache()
    0
    >>> bn_fast.set_result_cache(None)
    """
    if n_bytes is None:
        _results.set_limit(_default(), True)
    else:
        _results.set_limit(integer(n_bytes, "n_bytes", 0, sys.maxsize), False)


def get_result_cache() -> int:
    """Return how many bytes of released results are kept at most.

    Returns
    -------
    int
        What `set_result_cache` was given, or else the default. Always 0 on Windows, and in a build
        for AddressSanitizer.

    Examples
    --------
    >>> import bn_fast
    >>> bn_fast.get_result_cache() <= 512 * 2**20
    True
    """
    return _results.get_limit()


_asked = os.environ.get("BN_FAST_RESULT_CACHE", "")
try:
    set_result_cache(int(_asked) if _asked else None)
except ValueError:
    raise ImportError(
        f"BN_FAST_RESULT_CACHE must be a number of bytes, 0 or more, got {_asked!r}"
    ) from None
