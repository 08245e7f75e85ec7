"""What the figures of compare.py say: best peers, ratios, geometric means.

The JSON holds "machine" (a dict of texts and numbers), "peers" (names) and "cases". A case has its
"case" (name), kind, shape, axis, dtype, forward_bytes, backward_bytes and "implementations": by
name, "forward" and "backward" with "median" and "min" in seconds and the "errors"; or "failed", and
why.
"""

from statistics import geometric_mean
from typing import Any

Case = dict[str, Any]

OURS = ("bn_fast", "bn_fast out=")
LARGE_BYTES = 8_000_000  # of one array; smaller ones stay in a cache


def seconds(case: Case, name: str, direction: str) -> float | None:
    """Median time of forward, backward or "both"; None: not measured."""
    figures = case["implementations"].get(name, {})
    if "forward" not in figures:
        return None
    if direction == "both":
        return figures["forward"]["median"] + figures["backward"]["median"]
    return figures[direction]["median"]


def over_floor(case: Case, name: str, direction: str) -> float | None:
    time, floor = seconds(case, name, direction), seconds(case, "floor", direction)
    return time / floor if time and floor else None


def best_peer(case: Case, peers: list[str]) -> tuple[str, float] | None:
    """Who of them is fastest in forward + backward, and the seconds."""
    times = {name: seconds(case, name, "both") for name in peers}
    measured = {name: time for name, time in times.items() if time}
    return min(measured.items(), key=lambda item: item[1]) if measured else None


def gain(case: Case, name: str, peers: list[str]) -> float | None:
    """How many times the best peer's time that of `name` goes into, forward + backward."""
    best, time = best_peer(case, peers), seconds(case, name, "both")
    return best[1] / time if best and time else None


def summary(cases: list[Case], peers: list[str]) -> list[str]:
    """Geometric means and worst cases, a line each."""
    lines = []
    for name in OURS:
        gains = {case["case"]: gain(case, name, peers) for case in cases}
        lines += _line(f"best peer / {name}, forward + backward", gains, min)
    sizes = {
        f"arrays of {LARGE_BYTES // 10**6} MB and more": lambda size: size >= LARGE_BYTES,
        "smaller arrays": lambda size: size < LARGE_BYTES,
    }
    for what, fits in sizes.items():
        chosen = [case for case in cases if fits(case["forward_bytes"] // 2)]
        for direction in ("forward", "backward"):
            ratios = {case["case"]: over_floor(case, OURS[1], direction) for case in chosen}
            lines += _line(f"{OURS[1]} / floor, {direction}, {what}", ratios, max)
    return lines


def _line(what: str, ratios: dict[str, float | None], worst: Any) -> list[str]:
    measured = {case: ratio for case, ratio in ratios.items() if ratio}
    if not measured:
        return []
    case = worst(measured, key=measured.__getitem__)
    return [
        f"{what}: geometric mean {geometric_mean(measured.values()):.2f}"
        f" over {len(measured)} cases, worst {measured[case]:.2f} ({case})"
    ]


def milliseconds(time: float | None) -> str:
    """Three digits, never an exponent."""
    if time is None:
        return "-"
    ms = time * 1e3
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 1 else f"{ms:.4g}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"
