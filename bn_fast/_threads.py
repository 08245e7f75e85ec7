"""How many threads a large call uses.

OpenMP's own setting is asked and never changed: PyTorch, threadpoolctl and others share it.
"""

import operator
import os
from collections.abc import Iterator
from math import ceil
from typing import SupportsIndex

import numpy as np

from ._core import cpu


def read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def cgroup_folders(
    controller: str, root: str = "/sys/fs/cgroup", table: str = "/proc/self/cgroup"
) -> Iterator[str]:
    """Where the limits of this process's cgroup stand, and of the groups above, which bind too.

    cgroup 1 has a tree for each controller. In a container the path of the table may not exist,
    because its own group is mounted as the root.
    """
    for line in read(table).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        folder = os.path.join(root, controller) if controllers else root
        for step in ["", *path.strip("/").split("/")]:
            folder = os.path.join(folder, step)
            yield folder


def _cgroup_cpus(*where: str) -> int | None:
    """The CPUs' worth of time that this process's cgroup may use, rounded up; None: no quota.

    cgroup 2 writes "quota period" or "max period" into cpu.max, cgroup 1 writes two files, with -1
    for no quota.
    """
    quotas = []
    for folder in cgroup_folders("cpu", *where):
        words = read(f"{folder}/cpu.max") or (
            f"{read(f'{folder}/cpu.cfs_quota_us')} {read(f'{folder}/cpu.cfs_period_us')}"
        )
        match words.split():
            case [quota, period] if quota not in ("max", "-1"):
                quotas.append(ceil(int(quota) / int(period)))
    return min(quotas, default=None)


def integer(value: SupportsIndex, name: str, least: int, most: int) -> int:
    """A setting that may be None, when it is not."""
    try:
        # True would mean one thread, or one byte, the opposite of what it says.
        if isinstance(value, (bool, np.bool)):
            raise TypeError
        n = operator.index(value)
    except TypeError:
        message = f"{name} must be an int or None, got {value!r} of type {type(value).__name__}"
        raise TypeError(message) from None
    if not least <= n <= most:
        raise ValueError(f"{name} must be between {least} and {most}, got {n}")
    return n


# More is surely a mistake, and libgomp ends the process when it cannot start a thread.
MAX_THREADS = 4096

# libgomp reads the variable once, when it is loaded, and so does this.
_OPENMP_KNOWS = "OMP_NUM_THREADS" in os.environ

_QUOTA = _cgroup_cpus()  # once: 0.15 ms, and a container's quota is set before it starts

_chosen: int | None = None  # what set_num_threads was given
_serial = not cpu.openmp  # true also in a forked child that must not use OpenMP


def set_num_threads(n: SupportsIndex | None) -> None:
    """Set how many threads a large call uses, in this process and for bn_fast alone.

    The results do not depend on it, to the last bit, and small calls use one thread anyway.

    Parameters
    ----------
    n : int or None
        At least 1; more than there are CPUs is allowed. None returns to the default: the CPUs that
        this process may use, by its affinity and its cgroup's quota, or what ``OMP_NUM_THREADS`` or
        threadpoolctl say.

    Raises
    ------
    TypeError
        If `n` is neither an integer nor None.
    ValueError
        If `n` is less than 1 or more than 4096.

    Examples
    --------
    >>> import bn_fast
    >>> bn_fast.set_num_threads(1)
    >>> bn_fast.get_num_threads()
    1
    >>> bn_fast.set_num_threads(None)
    """
    global _chosen
    _chosen = n if n is None else integer(n, "n", 1, MAX_THREADS)


def get_num_threads() -> int:
    """Return how many threads a large call would use now.

    Returns
    -------
    int
        What `set_num_threads` was given, or else the default. Always 1 in a build without OpenMP.

    Examples
    --------
    >>> import bn_fast
    >>> bn_fast.get_num_threads() >= 1
    True
    """
    if _serial:
        return 1
    chosen = _chosen  # once: another thread may set it
    if chosen is not None:
        return chosen
    # Asked anew at every call (0.6 us): torch, threadpoolctl and taskset change the answers.
    n = cpu.max_threads()
    if _OPENMP_KNOWS:
        return n
    if hasattr(os, "sched_getaffinity"):
        n = min(n, len(os.sched_getaffinity(0)))
    return min(n, _QUOTA or n)


# A forked child inherits libgomp's list of workers but not the workers, and its first parallel
# region would wait for them for ever. So they are ended before the fork, and both sides start new
# ones when needed (10 ms). Where OpenMP cannot do that, the child stays on one thread.
_fork_is_safe = True


def _before_fork() -> None:
    global _fork_is_safe
    _fork_is_safe = cpu.pause()


def _in_child() -> None:
    global _serial
    _serial = _serial or not _fork_is_safe


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
