"""Time each option of bn_fast against plain batch norm, NumPy and PyTorch's eager mode.

A row for each option and shape: medians in ms, forward / backward (in a terminal, one above the
other). "÷ plain" is what the option costs, with the caller's buffers on both sides; the second
order is held against plain's backward. All calls of a row are timed in turn, and were judged
before. The exit status is 1 if one was wrong.
"""

import argparse
import sys
import time
from collections.abc import Iterator

import numpy as np
from cases import Case
from implementations import n_cpus
from problem import Problem
from results import milliseconds, ratio
from timing import measure
from variants import PEERS, PLAIN, VARIANTS, Given, Variant, prepare

try:
    import cpuinfo
    from rich.console import Console
    from rich.table import Table
except ImportError:
    sys.exit("options.py needs rich and pytest-benchmark's py-cpuinfo: pip install -e '.[bench]'")

SHAPES = [(256, 512), (65536, 128), (16384, 1024), (32, 64, 56, 56)]
SMALL = (64, 32)
OURS = "bn_fast", "bn_fast out="
HEAD = ["option", *OURS, "÷ plain", *PEERS, *(f"{peer} ÷ bn_fast" for peer in PEERS)]


def rows(shape: tuple[int, ...], variants: list[Variant], rounds: int) -> Iterator[list[str]]:
    """The cells of each option's row; the last is a complaint if something was wrong."""
    problem = Problem(Case("options", shape, 1, np.dtype("float32")))
    plain = prepare(Given(PLAIN, problem))
    for variant in variants:
        try:
            calls = plain if variant is PLAIN else prepare(Given(variant, problem))
        except AssertionError as error:
            yield [variant.name, f"WRONG: {error}"]
            continue
        timed = {("plain", d): getattr(plain[OURS[1]], d) for d in DIRECTIONS}
        timed |= {(who, d): getattr(one, d) for who, one in calls.items() for d in DIRECTIONS}
        timed = {key: call for key, call in timed.items() if call is not None}
        medians = {key: t["median"] for key, t in measure(timed, rounds, lambda: None).items()}

        def both(form, above, below=None, medians=medians):
            return " / ".join(form(quotient(medians, above, below, d)) for d in DIRECTIONS)

        cells = [variant.name, *(both(milliseconds, name) for name in OURS)]
        cells.append("" if variant is PLAIN else both(ratio, OURS[1], "plain"))
        cells += [both(milliseconds, peer) if peer in calls else "" for peer in PEERS]
        cells += [both(ratio, peer, OURS[0]) if peer in calls else "" for peer in PEERS]
        yield cells


DIRECTIONS = ("forward", "backward")


def quotient(medians: dict, above: str, below: str | None, direction: str) -> float | None:
    time = medians.get((above, direction))
    if time is None or below is None:
        return time
    return time / medians[below, direction]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    names = [one.name for one in VARIANTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="OPTION")
    parser.add_argument(
        "--shape", nargs="+", type=int, action="append", metavar="N", help="repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--markdown", action="store_true", help="for docs/performance.md")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if any(len(shape) < 2 or min(shape) < 1 for shape in options.shape or []):
        parser.error("--shape takes 2 or more lengths, of at least 1")

    shapes = [SMALL] if options.quick else map(tuple, options.shape or SHAPES)
    variants = [v for v in VARIANTS if v.name in options.only and v.is_importable]
    cpu = cpuinfo.get_cpu_info().get("brand_raw", "?")
    console = Console()
    print(f"{cpu}, {n_cpus()} threads, {time.strftime('%Y-%m-%d')}, float32.", end=" ")
    print("Medians in ms, forward / backward.")
    wrong = False
    for shape in shapes:
        name = " x ".join(map(str, shape))
        cells = []
        with console.status("") as status:
            for row in rows(shape, variants, options.rounds):
                status.update(f"{name}: {row[0]} done")
                wrong |= row[-1].startswith("WRONG")
                cells.append(row)
        show(console, name, cells, options.markdown)
    return int(wrong)


def show(console: Console, name: str, cells: list[list[str]], markdown: bool) -> None:
    if markdown:
        lines = [[name, *HEAD[1:]], *cells]
        lines.insert(1, ["---", *["--:"] * (len(HEAD) - 1)])
        print("", *("| " + " | ".join(line) + " |" for line in lines), sep="\n", flush=True)
        return
    table = Table(title=name, title_justify="left", title_style="bold", show_lines=True)
    for heading in HEAD:
        first = heading == HEAD[0]
        table.add_column(
            heading, justify="left" if first else "right", min_width=10 if first else None
        )
    for line in cells:
        table.add_row(line[0], *(cell.replace(" / ", "\n") for cell in line[1:]))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
