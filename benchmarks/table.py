"""Print the figures of pytest-benchmark's JSON as tables in Markdown.

    python -m pytest benchmarks --benchmark-json speed.json && python benchmarks/table.py speed.json

Implementations: a row for each case, a table for each dtype. Options: a row for each, a column for
each case.
"""

import argparse
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from cases import DIRECTIONS
from results import (
    OURS,
    Case,
    best_peer,
    gain,
    load,
    milliseconds,
    over,
    ratio,
    seconds,
    shown,
    summary,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", type=Path, nargs="+", help="what --benchmark-json wrote")
    parser.add_argument(
        "--direction", choices=(*DIRECTIONS, "both"), default="both", help="default: both together"
    )
    parser.add_argument("--brief", action="store_true", help="both dtypes' ratios in one table")
    options = parser.parse_args()
    record = load(*options.json)
    print(f"{record.machine}.")
    # A row stays in a cache between the passes: a copy is the measure there, not two passes.
    for cases, measure in ((record.cases, "floor"), (record.norms, "copy")):
        grouped = groupby(sorted(cases, key=dtype_of), key=dtype_of)
        by_dtype = {dtype: list(some) for dtype, some in grouped}
        if options.brief and cases:
            show_brief(by_dtype, record.peers, measure, options.direction)
            continue
        for dtype, some in by_dtype.items():
            show_implementations(dtype, some, record.peers, measure, options.direction)
    if record.options:
        show_options(record.options)


def dtype_of(case: Case) -> str:
    return case["dtype"]


def show_implementations(
    dtype: str, cases: list[Case], peers: list[str], measure: str, direction: str
) -> None:
    what = "Forward + backward" if direction == "both" else direction.capitalize()
    print(f"\n{what}, {dtype}, fastest blocks in ms; ~ is not exact.")
    names = list(dict.fromkeys(name for case in cases for name in case["seconds"]))
    names = [name for name in names if name not in {"copy", "floor"} - {measure}]
    show(
        ["", *(shown(name) for name in names), f"out= ÷ {measure}", "best ~ ÷ out="],
        [
            [
                label(case),
                *(milliseconds(seconds(case, name, direction)) for name in names),
                ratio(over(case, OURS[1], measure, direction)),
                best_over(case, peers, direction),
            ]
            for case in cases
        ],
    )
    print(*(f"- {line}" for line in summary(cases, peers, measure, direction)), sep="\n")


def show_brief(
    by_dtype: dict[str, list[Case]], peers: list[str], measure: str, direction: str
) -> None:
    rows = {label(case): [label(case)] for cases in by_dtype.values() for case in cases}
    for cases in by_dtype.values():
        cells = {
            label(case): [
                milliseconds(seconds(case, OURS[1], direction)),
                ratio(over(case, *OURS, direction)),
                ratio(over(case, OURS[1], measure, direction)),
                best_over(case, peers, direction),
            ]
            for case in cases
        }
        for name, row in rows.items():
            row += cells.get(name, ["-"] * 4)
    print(
        f"\nFor each dtype: out= in ms, fresh ÷ out=, out= ÷ {measure}, the best of the ~ ÷ out=."
    )
    heads = ([dtype, "fresh ÷", f"÷ {measure}", "best ~ ÷"] for dtype in by_dtype)
    show(["", *(one for some in heads for one in some)], list(rows.values()))
    for dtype, cases in by_dtype.items():
        lines = summary(cases, peers, measure, direction)
        print(f"\n{dtype}:\n", *(f"- {line}" for line in lines), sep="\n")


def label(case: Case) -> str:
    name = case["case"].removesuffix(f"-{case['dtype']}")
    return name.replace(f"-axis{len(case['shape']) - 1}", " last")


def best_over(case: Case, peers: list[str], direction: str) -> str:
    best = best_peer(case, peers, direction)
    return f"{ratio(gain(case, OURS[1], peers, direction))} {best[0]}" if best else "-"


def show_options(cases: list[Case]) -> None:
    """What each costs with the caller's buffers, and how much longer it takes the others."""
    columns = {name: list(some) for name, some in groupby(cases, key=lambda case: case["case"])}
    peers = {name: True for case in cases for name in case["seconds"]}
    peers = [name for name in peers if name not in (*OURS, "plain")]

    def table(title: str, cell: Callable[[Case, str], str]) -> None:
        rows = {}
        for case in cases:
            rows.setdefault(case["option"], {})[case["case"]] = " / ".join(
                cell(case, direction) for direction in DIRECTIONS
            )
        filled = [
            [option, *(row.get(name, "-") for name in columns)] for option, row in rows.items()
        ]
        show([title, *columns], [row for row in filled if set("".join(row[1:])) - set("-/ ")])

    def cost(case: Case, direction: str) -> str:
        if case["option"] == "plain":
            return milliseconds(seconds(case, OURS[1], direction)) + " ms"
        return ratio(over(case, OURS[1], "plain", direction))

    print("\nForward / backward, with out=: plain batch norm, and times that.")
    table("option", cost)
    for peer in peers:
        table(f"{peer} ÷ fresh", lambda case, way, peer=peer: ratio(over(case, peer, OURS[0], way)))


def show(head: list[str], rows: list[list[str]]) -> None:
    rule = ["---", *["--:"] * (len(head) - 1)]
    print("", *(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)), "", sep="\n")


if __name__ == "__main__":
    main()
