"""The timing loop: blocks of calls take turns, so that a slow moment of the machine meets all."""

import time
from collections.abc import Callable, Mapping
from timeit import Timer
from typing import Any, TypeVar

# Calls shorter than this are repeated, and the block is timed; longer ones are timed one by one.
BLOCK_SECONDS = 0.002
# Worker threads of OpenMP spin for up to 10 ms after a call, on a core that the next block needs.
PAUSE_SECONDS = 0.01
# Beyond this a call's arrays are not in any cache, and warming up is only a waste of time.
LONG_SECONDS = 0.1

Name = TypeVar("Name")


def measure(calls: Mapping[Name, Callable[[], Any]], rounds: int) -> dict[Name, list[float]]:
    """Seconds of one call of each, in each of the rounds.

    A block is all of one call: an engine that writes past the caches would slow down whoever is
    called next, and here that is itself.
    """
    timers = {name: Timer(call) for name, call in calls.items()}  # without garbage collection
    for timer in timers.values():
        timer.timeit(1)  # the first call maps pages, which the others need not
    repeats = {name: max(1, int(BLOCK_SECONDS / t.timeit(1))) for name, t in timers.items()}
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timer in timers.items():
            time.sleep(PAUSE_SECONDS)
            if not times[name] or times[name][-1] < LONG_SECONDS:
                timer.timeit(repeats[name])  # wakes its threads, fills the cache
            times[name].append(timer.timeit(repeats[name]) / repeats[name])
    return times


def fastest(calls: Mapping[Name, Callable[[], Any]], rounds: int) -> dict[Name, float]:
    """What else a machine does never makes a call faster."""
    return {name: min(times) for name, times in measure(calls, rounds).items()}
