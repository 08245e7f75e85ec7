"""Print the figures of compare.py as a table in Markdown: a row for each case."""

import argparse
import json
from pathlib import Path

from results import OURS, best_peer, gain, milliseconds, over_floor, ratio, seconds, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="what compare.py --json wrote")
    record = json.loads(parser.parse_args().json.read_text())
    cases, peers, machine = record["cases"], record["peers"], record["machine"]
    names = list(dict.fromkeys(name for case in cases for name in case["implementations"]))

    print(f"{machine['cpu']}, {machine['threads']} threads, {machine['date']}.", end=" ")
    print("Medians in ms, forward / backward.\n")
    head = ["case", *names, f"{OURS[1]} ÷ floor", *(f"best peer ÷ {name}" for name in OURS)]
    print("|", " | ".join(head), "|")
    print("|---" + "|--:" * (len(head) - 1) + "|")
    for case in cases:
        cells = [case["case"]]
        for name in names:
            cells.append(both(milliseconds(seconds(case, name, d)) for d in DIRECTIONS))
        cells.append(both(ratio(over_floor(case, OURS[1], d)) for d in DIRECTIONS))
        best = best_peer(case, peers)
        gains = (ratio(gain(case, name, peers)) for name in OURS)
        cells += [f"{value} ({best[0]})" if best else "-" for value in gains]
        print("|", " | ".join(cells), "|")
    print()
    print(*(f"- {line}" for line in summary(cases, peers)), sep="\n")


DIRECTIONS = ("forward", "backward")


def both(texts) -> str:
    return " / ".join(texts)


if __name__ == "__main__":
    main()
