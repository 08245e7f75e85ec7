"""What the figures say that `python -m pytest benchmarks --benchmark-json FILE` keeps.

A case is a dict: what describes it ("case", its name, kind, shape, axis, dtype, bytes of x, and the
"option" that was timed, or "") and "seconds" of each implementation and direction: of its fastest
block, as what else a machine does never makes it faster.
"""

import json
import math
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from cases import DIRECTIONS

Case = dict[str, Any]

OURS = ("bn_fast", "bn_fast out=")
LARGE_BYTES = 8_000_000  # of one array; smaller ones stay in a cache


class Record(NamedTuple):
    machine: str  # its name, the threads and the date
    peers: list[str]
    cases: list[Case]  # of batch norm
    options: list[Case]
    norms: list[Case]  # of the other norms


def load(*paths: Path) -> Record:
    """Of one run, or of several of one machine and day."""
    runs = [json.loads(path.read_text()) for path in paths]
    given = runs[0]
    cases: dict[tuple[str, str], Case] = {}
    peers = {}
    for one in (one for run in runs for one in run["benchmarks"]):
        info = one["extra_info"]
        case = cases.setdefault((info["case"], info["option"]), {**info, "seconds": {}})
        times = case["seconds"].setdefault(info["who"], {})
        known = times.get(info["direction"], math.inf)
        times[info["direction"]] = min(known, one["stats"]["min"])
        if info.get("is_peer"):
            peers[info["who"]] = True
    machine = given["machine_info"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    cpu = machine["cpu"].get("brand_raw", machine["machine"])
    plain = [case for case in cases.values() if not case["option"]]
    return Record(
        f"{cpu}, {threads}, {given['datetime'][:10]}",
        list(peers),
        [case for case in plain if case["norm"] == "batch"],
        [case for case in cases.values() if case["option"]],
        [case for case in plain if case["norm"] != "batch"],
    )


def seconds(case: Case, name: str, direction: str) -> float | None:
    """Time of forward, backward or "both"; None: not measured."""
    times = case["seconds"].get(name, {})
    if direction != "both":
        return times.get(direction)
    return sum(times.values()) if len(times) == len(DIRECTIONS) else None


def over(case: Case, name: str, other: str, direction: str) -> float | None:
    time, others = seconds(case, name, direction), seconds(case, other, direction)
    return time / others if time and others else None


def best_peer(case: Case, peers: list[str], direction: str = "both") -> tuple[str, float] | None:
    """Who of them is fastest, and the seconds."""
    times = {name: seconds(case, name, direction) for name in peers}
    measured = {name: time for name, time in times.items() if time}
    return min(measured.items(), key=lambda item: item[1]) if measured else None


def gain(case: Case, name: str, peers: list[str], direction: str = "both") -> float | None:
    """How many times the time of `name` goes into the best peer's."""
    best, time = best_peer(case, peers, direction), seconds(case, name, direction)
    return best[1] / time if best and time else None


def summary(
    cases: list[Case], peers: list[str], measure: str = "floor", direction: str = "both"
) -> list[str]:
    """Geometric means and worst cases, a line each."""
    lines = []
    for name in OURS:
        gains = {case["case"]: gain(case, name, peers, direction) for case in cases}
        n_won = sum(1 for one in gains.values() if one and one > 1)
        lines += _line(f"best ~ ÷ {shown(name)} (faster on {n_won})", gains, min)
    sizes = {
        f"{LARGE_BYTES // 10**6} MB and more": lambda size: size >= LARGE_BYTES,
        "smaller": lambda size: size < LARGE_BYTES,
    }
    for name, other in ((OURS[1], measure), (OURS[0], OURS[1])):
        for what, fits in sizes.items():
            chosen = [case for case in cases if fits(case["bytes"])]
            ratios = {case["case"]: over(case, name, other, direction) for case in chosen}
            lines += _line(f"{shown(name)} ÷ {shown(other)}, {what}", ratios, max)
    return lines


def shown(name: str) -> str:
    """The name in a table; ~ where digits are lost, see `behaviour.py digits`."""
    if name in ("copy", "floor"):
        return name
    return {"bn_fast": "fresh", "bn_fast out=": "out=", "reference": "~NumPy"}.get(name, f"~{name}")


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
