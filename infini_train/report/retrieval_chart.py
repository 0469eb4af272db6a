"""Heat map of exact match on a retrieval task by length and depth."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from infini_train.report import plotting as p
from infini_train.report.charts import WIDE, Chart, chart_figure


def retrieval_cells(result: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the valid cells of passkey.json."""
    names = ("length", "depth", "samples", "exact_match", "token_accuracy")
    cells = (result or {}).get("cells") or []
    return [cell for cell in cells if isinstance(cell, dict) and all(isinstance(cell.get(n), int | float) for n in names)]


def retrieval_chart(result: dict[str, Any] | None) -> Chart | None:
    """Draw exact match with lengths as columns and depths as rows. Return None if there are no valid cells."""
    cells = retrieval_cells(result)
    if not cells:
        return None
    lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("length", "depth"))
    exact, forced = (np.full((len(depths), len(lengths)), np.nan) for _ in range(2))
    for cell in cells:
        place = depths.index(cell["depth"]), lengths.index(cell["length"])
        exact[place], forced[place] = cell["exact_match"], cell["token_accuracy"]
    kind = ((result or {}).get("task") or {}).get("kind", "passkey")
    counts = sorted({int(cell["samples"]) for cell in cells})
    texts = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    worst = np.unravel_index(int(np.nanargmin(exact)), exact.shape)
    caption = (
        f"Exact match on the task {kind} in per cent: texts whose answer is correct in every token under greedy decoding, "
        f"{texts} texts a cell. Depth 0 is the start of the text, 1 is directly before the question. The mean over all cells "
        f"is {np.nanmean(exact):.1%} exact match and {np.nanmean(forced):.1%} token accuracy under teacher forcing (correct "
        f"earlier answer tokens given). The worst cell has {exact[worst]:.0%}, at {lengths[worst[1]]:,} tokens and depth "
        f"{depths[worst[0]]:g}"
    )
    if (result or {}).get("complete") is False:
        caption += ". The measurement was stopped before its last cell"
    return Chart(f"Retrieval: {kind}", _heat_map(exact, lengths, depths), caption + ".", wide=True)


def _heat_map(exact: np.ndarray, lengths: list[int], depths: list[float]) -> str:
    colours = LinearSegmentedColormap.from_list("accuracy", ["#d55e00", "#f4f1ec", "#0072b2"], N=41)
    with chart_figure(WIDE, min(1.4 + 0.45 * len(depths), 7.0)) as (figure, axes):
        x, y = np.arange(len(lengths) + 1) - 0.5, np.arange(len(depths) + 1) - 0.5
        edges = {"edgecolors": p.SURFACE, "linewidth": 1.0}
        mesh = axes.pcolormesh(x, y, np.ma.masked_invalid(exact), cmap=colours, vmin=0, vmax=1, **edges)
        if exact.size <= 150:
            for (row, column), value in np.ndenumerate(exact):
                if np.isfinite(value):
                    shade = "#ffffff" if abs(value - 0.5) > 0.3 else "#1d2430"
                    axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=shade, fontsize=9)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set_xlabel("text length (tokens)")
        axes.set_ylabel("depth of the fact")
        axes.grid(False)
        axes.invert_yaxis()
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        bar = figure.colorbar(mesh, ax=axes, ticks=[0, 0.5, 1], fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
        if bar.solids is not None:
            bar.solids.set_edgecolor("face")
        bar.ax.set_yticklabels(["0%", "50%", "100%"])
        return p.svg_of(figure, "retrieval", "Exact match on the retrieval task by length and depth")
