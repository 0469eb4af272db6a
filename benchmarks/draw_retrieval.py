"""Draw the README's picture of retrieval: accuracy by length and depth, from a committed record.

python -m benchmarks.draw_retrieval benchmarks/results/passkey-cpu.json docs/images/retrieval.svg
"""

from __future__ import annotations

import argparse
import json
from math import isnan
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def worst_accuracy(record: dict[str, Any]) -> dict[tuple[int, float], float]:
    """Return the token accuracy of each (length, depth), of the seed with the lowest."""
    worst: dict[tuple[int, float], float] = {}
    for seed in record["seeds"]:
        for cell in seed["cells"]:
            place = cell["length"], cell["depth"]
            worst[place] = min(worst.get(place, 1.0), cell["token_accuracy"])
    return worst


def draw(record: dict[str, Any], output: Path) -> None:
    """Write the heat map of a record as SVG, the same bytes for the same record."""
    worst = worst_accuracy(record)
    lengths = sorted({length for length, _ in worst})
    depths = sorted({depth for _, depth in worst})
    grid = [[worst.get((length, depth), float("nan")) for length in lengths] for depth in depths]
    plt.rcParams.update({"svg.hashsalt": "retrieval", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})
    figure, axes = plt.subplots(figsize=(7.2, 3.4), facecolor="white")
    axes.imshow(grid, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if isnan(value):
                axes.text(column, row, "not measured", ha="center", va="center", color="gray", fontsize=8)
            else:
                axes.text(column, row, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.9 else "black")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    longest = record["settings"]["task"]["max_tokens"]
    axes.set_xlabel(f"tokens of the text (trained on at most {longest:,})")
    axes.set_ylabel("depth of the number")
    seeds = len(record["seeds"])
    axes.set_title(f"Token accuracy of the worst of {seeds} seeds, 0.7M parameters", fontsize=11)
    figure.tight_layout()
    figure.savefig(output, format="svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw the record that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    draw(json.loads(arguments.record.read_text(encoding="utf-8")), arguments.output)


if __name__ == "__main__":
    main()
