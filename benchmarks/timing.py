"""Times many calls in turn, so that a slow moment of the machine meets all of them alike."""

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

# Calls shorter than this are repeated and timed together; longer ones are timed one by one.
BLOCK_SECONDS = 0.002
# Worker threads of OpenMP spin for up to 10 ms after a call, on a core that the next call needs.
PAUSE_SECONDS = 0.01
# Beyond this a call's arrays are not in any cache, and warming up is only a waste of time.
LONG_SECONDS = 0.1


def measure(
    calls: dict[str, Callable[[], Any]], rounds: int, progress: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """Median and minimum, over the rounds, of the seconds that one call takes."""
    repeats = {name: max(1, int(BLOCK_SECONDS / _seconds(call, 1))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()  # as timeit does
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                time.sleep(PAUSE_SECONDS)
                if not times[name] or times[name][-1] < LONG_SECONDS:
                    _seconds(call, repeats[name])  # wakes its threads, fills the cache
                times[name].append(_seconds(call, repeats[name]) / repeats[name])
            progress()
    finally:
        gc.enable()
    return {name: {"median": median(t), "min": min(t)} for name, t in times.items()}


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start
