"""Print the figures of pytest-benchmark's JSON as tables in Markdown.

    python -m pytest benchmarks --benchmark-json speed.json && python benchmarks/table.py speed.json

Implementations: a row for each case. Options: a table for each case, a row for each option.
"""

import argparse
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
    summary,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", type=Path, nargs="+", help="what --benchmark-json wrote")
    record = load(*parser.parse_args().json)
    print(f"{record.machine}. Medians in ms, forward / backward.")
    # A row stays in a cache between the passes: a copy is the measure there, not two passes.
    for cases, measure in ((record.cases, "floor"), (record.norms, "copy")):
        if cases:
            show_implementations(cases, record.peers, measure)
    for name, options in groupby(record.options, key=lambda case: case["case"]):
        show_options(name, list(options))


def show_implementations(cases: list[Case], peers: list[str], measure: str) -> None:
    names = names_in(cases)
    show(
        ["case", *names, f"{OURS[1]} ÷ {measure}", *(f"best peer ÷ {name}" for name in OURS)],
        [
            [
                case["case"],
                *(times(case, name) for name in names),
                ratios(case, OURS[1], measure),
                *(best_over(case, name, peers) for name in OURS),
            ]
            for case in cases
        ],
    )
    print(*(f"- {line}" for line in summary(cases, peers, measure)), sep="\n")


def show_options(name: str, options: list[Case]) -> None:
    """ "÷ plain" is what the option costs, with the caller's buffers on both sides."""
    names = [one for one in names_in(options) if one != "plain"]
    peers = [one for one in names if one not in OURS]
    show(
        [name, *names, "÷ plain", *(f"{peer} ÷ {OURS[0]}" for peer in peers)],
        [
            [
                case["option"],
                *(times(case, one) for one in names),
                ratios(case, OURS[1], "plain"),
                *(ratios(case, peer, OURS[0]) for peer in peers),
            ]
            for case in options
        ],
    )


def names_in(cases: list[Case]) -> list[str]:
    return list(dict.fromkeys(name for case in cases for name in case["seconds"]))


def times(case: Case, name: str) -> str:
    return " / ".join(milliseconds(seconds(case, name, d)) for d in DIRECTIONS)


def ratios(case: Case, name: str, other: str) -> str:
    return " / ".join(ratio(over(case, name, other, d)) for d in DIRECTIONS)


def best_over(case: Case, name: str, peers: list[str]) -> str:
    best = best_peer(case, peers)
    return f"{ratio(gain(case, name, peers))} ({best[0]})" if best else "-"


def show(head: list[str], rows: list[list[str]]) -> None:
    rule = ["---", *["--:"] * (len(head) - 1)]
    print("", *(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)), "", sep="\n")


if __name__ == "__main__":
    main()
