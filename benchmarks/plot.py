"""Draw the figures of pytest-benchmark's JSON: time / floor of each case and implementation; of the
norms other than batch norm, time / copy."""

import argparse
import sys
from pathlib import Path

from results import load, over, shown

try:
    import matplotlib
except ImportError:
    sys.exit("plot.py needs matplotlib: pip install -e '.[bench]'")

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

# Ours large, warm and on top; the others small and quiet. An implementation that is not listed
# gets a gray dot.
STYLES = {
    "bn_fast out=": {"marker": "D", "color": "#c1121f", "s": 42},
    "bn_fast": {"marker": "o", "color": "#f77f00", "s": 46},
    "numba": {"marker": "^", "color": "#2a9d8f", "s": 30},
    "torch": {"marker": "s", "color": "#4361ee", "s": 26},
    "torch.compile": {"marker": "P", "color": "#7209b7", "s": 34},
    "jax": {"marker": "v", "color": "#8d6e63", "s": 30},
    "reference": {"marker": "x", "color": "#555555", "s": 26},
    "copy": {"marker": "|", "color": "#000000", "s": 40},
}
LINES = {"reference", "copy"}  # markers without an area
TICKS = [0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="+", help="what --benchmark-json wrote")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--dtype", help="float32 or float64; default: the first in the file")
    parser.add_argument("--norms", action="store_true", help="those other than batch norm")
    options = parser.parse_args()
    record = load(*options.json)
    chosen = record.norms if options.norms else record.cases
    if not chosen:
        parser.error(f"no case of {'other norms' if options.norms else 'batch norm'} in the file")
    dtype = options.dtype or chosen[0]["dtype"]
    cases = [case for case in chosen if case["dtype"] == dtype]
    if not cases:
        parser.error(f"no case of dtype {dtype} in the file")
    draw(cases, record.machine, dtype, options.norms).savefig(options.picture, dpi=150)


def draw(cases, machine, dtype, norms):
    measure = "copy" if norms else "floor"
    cases = sorted(cases, key=lambda case: case["bytes"], reverse=True)
    names = list(dict.fromkeys(name for case in cases for name in case["seconds"]))
    names = [name for name in STYLES if name in names] + [
        name for name in names if name not in STYLES and name != "floor"
    ]
    names = [name for name in names if name != measure]
    height = 1.7 + 0.27 * len(cases)
    figure, axes = plt.subplots(
        1, 2, figsize=(11, height), sharex=True, sharey=True, layout="constrained"
    )
    rows = range(len(cases))
    for direction, ax in zip(("forward", "backward"), axes):
        for name in reversed(names):  # ours last, on top
            ratios = [over(case, name, measure, direction) for case in cases]
            ax.scatter(
                [ratio or float("nan") for ratio in ratios],
                rows,
                label=shown(name),
                **STYLES.get(name, {"marker": ".", "color": "#999999"}),
                linewidths=1.5 if name in LINES else 0,
                zorder=3 + (name.startswith("bn_fast")),
            )
        ax.axvline(1, color="black", linewidth=1)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(TICKS))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(axis="x", color="#dddddd", linewidth=0.8)
        ax.grid(axis="y", color="#eeeeee", linewidth=5)
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        ax.margins(y=0.6 / len(cases))
    times = "once" if norms else "twice"
    axes[0].set_xlabel(f"forward: time ÷ time to read x {times} and write as much")
    axes[1].set_xlabel(f"backward: time ÷ time to read x and dout {times} and write dx")
    axes[0].set_yticks(rows, [label(case) for case in cases], fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside lower center", ncols=len(names), frameon=False
    )
    title = f"Batch norm, {dtype}, training mode: time ÷ floor (1 = two passes over memory)"
    if norms:
        title = f"Layer, RMS, group and instance norm, {dtype}: time ÷ copy"
    figure.suptitle(f"{title}; ~ is not exact\n{machine}", fontsize=11)
    return figure


def label(case) -> str:
    shape = ", ".join(map(str, case["shape"]))
    axis = "" if case["axis"] == 1 else f" axis {case['axis']}"
    if case["norm"] != "batch":
        axis = f" {case['norm']}"
    megabytes = case["bytes"] / 1e6
    size = f"{megabytes:.3g} MB" if megabytes >= 0.1 else f"{megabytes * 1000:.3g} kB"
    return f"({shape}){axis}   {size}"


if __name__ == "__main__":
    main()
