"""Time all implementations side by side in one process, case after case.

Each round calls every implementation's forward and backward in turn; medians over the rounds are
compared. Results are checked first, and compilation is over before anything is timed. The exit
status is 1 if bn_fast was wrong anywhere.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

try:
    import cpuinfo
except ImportError:
    sys.exit("compare.py needs pytest-benchmark's py-cpuinfo: pip install -e '.[bench]'")

from results import OURS, best_peer, gain, milliseconds, over_floor, ratio, seconds, summary


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["all"],
        metavar="PATTERN",
        help="all (the default), smoke, a kind as in cases.py, or a name with wildcards",
    )
    parser.add_argument(
        "--implementations", nargs="+", metavar="NAME", help="default: all that are installed"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="bind the process to N CPUs")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default: 9")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to keep the figures, after each case"
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.threads is not None:
        try:
            bind_to_cpus(options.threads)
        except ValueError as error:
            parser.error(str(error))

    # Only now: NumPy, OpenMP, numba and XLA count the CPUs when they are imported.
    from cases import select
    from implementations import IMPLEMENTATIONS

    try:
        options.cases = select(options.cases)
    except ValueError as error:
        parser.error(f"--cases: {error}")
    available = {one.name: one for one in IMPLEMENTATIONS if one.is_importable}
    chosen = options.implementations or list(available)
    if unknown := [name for name in chosen if name not in available]:
        parser.error(f"--implementations: {unknown} not among {list(available)}")
    # The floor first: everything is measured by it.
    options.implementations = [one for name, one in available.items() if name in chosen]
    return options


def bind_to_cpus(n: int) -> None:
    """The one way to say a number of threads that every implementation obeys."""
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("--threads works on Linux only")
    cpus = sorted(os.sched_getaffinity(0))
    if not 1 <= n <= len(cpus):
        raise ValueError(f"--threads must be between 1 and {len(cpus)}, the CPUs here, got {n}")
    os.sched_setaffinity(0, cpus[:n])


def machine(implementations) -> dict:
    from implementations import n_cpus

    import bn_fast

    versions = {"python": platform.python_version()}
    for module in sorted({one.needs for one in implementations} - {"bn_fast"}):
        try:
            versions[module] = version(module)
        except PackageNotFoundError:  # a module without metadata
            versions[module] = "?"
    return {
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.machine()),
        "threads": n_cpus(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "build": bn_fast.build_info(),
    }


def run_case(case, implementations, rounds, display) -> dict:
    """All figures of one case."""
    from implementations import judge
    from problem import Problem
    from timing import measure

    problem = Problem(case)
    figures, calls = {}, {}
    for implementation in implementations:
        name = implementation.name
        display.say(f"{case.name}: preparing {name}")
        try:
            prepared = implementation.prepare(problem)
            figures[name] = {"errors": judge(implementation, prepared, problem)}
            calls[f"{name} forward"] = prepared.forward
            calls[f"{name} backward"] = prepared.backward
        except Exception as error:  # the others can still be compared; the row says what happened
            figures[name] = {"failed": f"{type(error).__name__}: {error}"}
    left = rounds

    def progress():
        nonlocal left
        left -= 1
        display.say(f"{case.name}: {left} rounds to go")

    times = measure(calls, rounds, progress)
    for name in figures:
        for direction in ("forward", "backward"):
            if f"{name} {direction}" in times:
                figures[name][direction] = times[f"{name} {direction}"]
    return {
        "case": case.name,
        "kind": case.kind,
        "shape": case.shape,
        "axis": case.axis,
        "dtype": str(case.dtype),
        "forward_bytes": case.forward_bytes,
        "backward_bytes": case.backward_bytes,
        "implementations": figures,
    }


HEAD = ("implementation", "forward ms", "backward ms", "f / floor", "b / floor", "error")


def rows(result: dict) -> list[tuple[str, ...]]:
    """A case's cells as they are printed."""
    cells = []
    for name, figures in result["implementations"].items():
        if "failed" in figures:
            cells.append((name, "failed", "", "", "", ""))
            continue
        times = [milliseconds(seconds(result, name, d)) for d in ("forward", "backward")]
        ratios = [ratio(over_floor(result, name, d)) for d in ("forward", "backward")]
        errors = figures["errors"]
        error = f"{max(errors['out'], errors['dx']):.1e}" if errors else ""
        cells.append((name, *times, *ratios, error))
    return cells


def verdicts(result: dict, peers: list[str]) -> list[str]:
    """What stands below a case's table."""
    lines = []
    for name, figures in result["implementations"].items():
        if "failed" in figures:
            lines.append(f"{name} failed: {figures['failed'].splitlines()[0]}")
    best = best_peer(result, peers)
    if best:
        gains = {name: gain(result, name, peers) for name in OURS}
        said = ", ".join(f"{ratio(value)} x {name}" for name, value in gains.items() if value)
        lines.append(f"best peer: {best[0]}, {milliseconds(best[1])} ms = {said}")
    return lines


class PlainDisplay:
    """Text, where rich is not installed."""

    def say(self, what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)

    def show(self, title: str, cells: list[tuple[str, ...]], below: list[str]) -> None:
        self.say("")
        print(f"\n{title}")
        for row in [HEAD, *cells]:
            print(f"  {row[0]:<15}" + "".join(f" {cell:>12}" for cell in row[1:]))
        for line in below:
            print(f"  {line}")
        sys.stdout.flush()


class RichDisplay:
    """Tables, and a line at the bottom that says what is being done."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console()
        self.status = self.console.status("")
        if self.console.is_terminal:
            self.status.start()

    def say(self, what: str) -> None:
        self.status.update(what)

    def show(self, title: str, cells: list[tuple[str, ...]], below: list[str]) -> None:
        from rich.table import Table

        table = Table(title=title, title_justify="left", title_style="bold")
        for heading in HEAD:
            table.add_column(heading, justify="left" if heading == HEAD[0] else "right")
        for row in cells:
            table.add_row(*row, style="bold" if row[0] in OURS else None)
        self.console.print(table)
        for line in below:
            self.console.print(line, highlight=False, markup=False)


def main() -> int:
    options = arguments()
    record = {
        "machine": machine(options.implementations),
        "peers": [one.name for one in options.implementations if one.is_peer],
        "cases": [],
    }
    display = RichDisplay() if find_spec("rich") else PlainDisplay()
    for number, case in enumerate(options.cases, 1):
        result = run_case(case, options.implementations, options.rounds, display)
        title = f"{number} of {len(options.cases)}: {case.name}, {case.array_bytes / 1e6:.3g} MB"
        display.show(title, rows(result), verdicts(result, record["peers"]))
        record["cases"].append(result)
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    display.say("")
    print(f"\n{len(options.cases)} cases, {record['machine']['threads']} threads")
    print(*summary(record["cases"], record["peers"]), sep="\n")
    wrong = [
        f"{case['case']}: {name}"
        for case in record["cases"]
        for name in OURS
        if "failed" in case["implementations"].get(name, {})
    ]
    if wrong:
        print("WRONG:", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
