"""Charts of Infini-attention: memory norms, gates, read-back accuracy, and perplexity by position in the document."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from infini_train.report import plotting as p
from infini_train.report.charts import HALF, WIDE, Chart, chart_figure, number
from infini_train.report.run_results import Records, perplexity


def position_chart(entries: list[dict[str, Any]], has_memory: bool) -> Chart | None:
    """Draw perplexity by segment of the document.

    Args:
        entries: by_position of evaluation.json.
        has_memory: whether the attention carries a state from segment to segment.
    """
    if not entries:
        return None
    labels, tokens = [], []
    for entry in entries:
        first, last = entry["first_segment"], entry.get("last_segment")
        span = f"{first:,}+" if last is None else f"{first:,}" if first == last else f"{first:,}–{last:,}"
        labels.append(span)
        tokens.append(entry.get("tokens"))
    names = [f"segment{'' if label.isdigit() else 's'} {label}" for label in labels]
    x = np.arange(len(entries), dtype=float)
    kept = np.array([perplexity(entry["loss"]) for entry in entries])

    def other(key: str) -> np.ndarray:
        return np.array([np.nan if entry.get(key) is None else perplexity(entry[key]) for entry in entries])

    emptied, shuffled = other("loss_memory_emptied"), other("loss_memory_shuffled")
    with chart_figure(WIDE, 3.8) as (figure, axes):
        if np.isfinite(shuffled).any():
            p.line(axes, x, shuffled, p.SHUFFLED, "memory of another row", marked=True)
        p.line(axes, x, emptied, p.EMPTIED, "memory emptied at every segment", marked=True)
        p.line(axes, x, kept, p.WITH_MEMORY, "with memory" if has_memory else None, marked=True)
        p.value_axis(axes, "perplexity", log=p.log_if_wide(np.concatenate([kept, emptied, shuffled])))
        show = [f"{a}\n{p.compact(n)} tok." if isinstance(n, int) else a for a, n in zip(labels, tokens, strict=True)]
        every = math.ceil(len(x) / 14)
        axes.set_xticks(x[::every], show[::every])
        axes.set_xlabel("segment of the document, counted from 0; below: number of held-out tokens measured")
        axes.set_xlim(-0.4, len(x) - 0.6)
        if np.isfinite(np.concatenate([emptied, shuffled])).any():
            p.legend_above(axes, columns=3)
        svg = p.svg_of(figure, "positions", "Held-out perplexity by position in the document")
    far = len(x) - 1
    caption = f"In {names[far]} perplexity is {number(kept[far])}" + (" with memory" if has_memory else "")
    if np.isfinite(emptied[far]):
        change = emptied[far] / kept[far] - 1
        caption += f" and {number(emptied[far])} with the memory emptied ({change:+.1%})"
    if np.isfinite(shuffled[far]):
        caption += f" and {number(shuffled[far])} with the memory of another row ({shuffled[far] / kept[far] - 1:+.1%})"
    caption += f", against {number(kept[0])} in {names[0]}" if far else ""
    if has_memory and entries[0]["first_segment"] == entries[0].get("last_segment") == 0:
        caption += ". In segment 0 the memory is still empty, so the curves must agree there"
    return Chart("Perplexity by position in the document", svg, caption + ".", wide=True)


def read_back_chart(evaluation: dict[str, Any] | None) -> Chart | None:
    """Draw the cosine between stored values and values read back with their keys, by age in segments.

    Args:
        evaluation: evaluation.json, whose `read_back` is drawn.
    """
    found = (evaluation or {}).get("read_back")
    if not isinstance(found, dict) or not found.get("ages"):
        return None
    ages = np.array(found["ages"])
    own, other = np.array(found["own_key"], dtype=float), np.array(found["other_key"], dtype=float)
    x = np.arange(len(ages), dtype=float)
    with chart_figure(WIDE, 3.4) as (figure, axes):
        p.line(axes, x, other.mean(axis=1), p.MUTED, "key of another token, mean over layers", 1.4, marked=True, style="--")
        _lines_by_layer(axes, x, own)
        p.value_axis(axes, "cosine")
        axes.set_xticks(x, [str(age) for age in ages])
        axes.set_xlabel("segments since the token was written")
        svg = p.svg_of(figure, "read-back", "Cosine between stored values and values read back with their keys, by age")
    gap = own.mean(axis=1) - other.mean(axis=1)
    caption = (
        f"Directly after writing, the cosine between stored and read value is {own[0].mean():.3f} with the token's own key "
        f"and {other[0].mean():.3f} with the key of another token (means over layers)"
    )
    if len(ages) > 1:
        caption += f". The difference goes from {gap[0]:.3f} to {gap[-1]:.3f} after {ages[-1]} segments"
    return Chart("Read-back accuracy of the memory", svg, caption + ".", wide=True)


def gate_map_chart(records: Records) -> Chart | None:
    """Draw the newest gate of every layer and head as a heat map."""
    found = records.nested("gates", 2)
    if found is None:
        return None
    steps, history = found
    gates = history[-1]
    layers, heads = gates.shape
    colours = LinearSegmentedColormap.from_list("mix", ["#d55e00", "#f4f1ec", "#0072b2"], N=41)
    with chart_figure(HALF, _gate_height(layers)) as (figure, axes):
        edges = {"edgecolors": p.SURFACE, "linewidth": 1.5 if layers * heads <= 256 else 0.4}
        x, y = np.arange(heads + 1) + 0.5, np.arange(layers + 1) + 0.5
        mesh = axes.pcolormesh(x, y, gates, cmap=colours, vmin=0, vmax=1, **edges)
        if layers <= 12 and heads <= 8:
            for (layer, head), value in np.ndenumerate(gates):
                dark = abs(value - 0.5) > 0.3
                shade = "#ffffff" if dark else "#1d2430"
                axes.text(head + 1, layer + 1, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=9)
        axes.set_xlabel("query head")
        axes.set_ylabel("layer")
        axes.grid(False)
        axes.invert_yaxis()
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, steps=[1, 2, 4, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=13, integer=True, steps=[1, 2, 4, 5, 10]))
        bar = figure.colorbar(mesh, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1], fraction=0.06, pad=0.03)
        bar.outline.set_visible(False)
        if bar.solids is not None:
            bar.solids.set_edgecolor("face")
        bar.ax.set_yticklabels(["0 local only", "0.25", "0.5", "0.75", "1 memory only"])
        svg = p.svg_of(figure, "gate-map", f"Gate of each head at step {steps[-1]:.0f}")
    layer, head = np.unravel_index(int(np.argmax(gates)), gates.shape)
    low_layer, low_head = np.unravel_index(int(np.argmin(gates)), gates.shape)
    caption = (
        f"At step {steps[-1]:,.0f} layer {layer + 1}, head {head + 1} has the largest gate "
        f"({gates.max():.2f}) and layer {low_layer + 1}, head {low_head + 1} the smallest ({gates.min():.2f}). "
        "A gate is the weight of the memory: at 0.5, memory and local attention have equal weight."
    )
    return Chart("Gates, sigmoid(β), of every head", svg, caption)


LOCAL_BELOW, MEMORY_ABOVE = 0.1, 0.9
"""Gates below or above these limits mark heads specialised in local attention or in memory. Heads in between mix both."""


def gate_histogram_chart(records: Records) -> Chart | None:
    """Draw the histogram of gates, which shows specialised and mixing heads as Figure 3 of the paper does."""
    found = records.nested("gates", 2)
    if found is None:
        return None
    steps, history = found
    first, last = history[0].ravel(), history[-1].ravel()
    edges = np.linspace(0.0, 1.0, 21)
    with chart_figure(WIDE, 3.0) as (figure, axes):
        for low, high in ((0.0, LOCAL_BELOW), (MEMORY_ABOVE, 1.0)):
            axes.axvspan(low, high, color=p.GRID, alpha=0.5, linewidth=0)
        axes.hist(last, bins=edges, color=p.GATES, rwidth=0.9, label=f"step {steps[-1]:,.0f}")
        axes.hist(first, bins=edges, histtype="step", color=p.INK, linewidth=1.2, label=f"step {steps[0]:,.0f}")
        p.value_axis(axes, "heads")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(0, 1)
        axes.set_xlabel("sigmoid(β): 0 is local attention only, 1 is memory only; shaded: specialised heads")
        p.legend_above(axes, columns=2)
        svg = p.svg_of(figure, "gate-histogram", f"Histogram of gates at step {steps[-1]:.0f}")
    local, memory = int((last < LOCAL_BELOW).sum()), int((last > MEMORY_ABOVE).sum())
    balanced = int((abs(last - 0.5) < 0.1).sum())
    caption = (
        f"Of {last.size} heads, {local} specialise in local attention (gate below {LOCAL_BELOW}), {memory} in memory (above "
        f"{MEMORY_ABOVE}), and {last.size - local - memory} mix both. {balanced} heads have a gate within 0.1 of 0.5."
    )
    return Chart("Specialised and mixing heads", svg, caption, wide=True)


def _gate_height(layers: int) -> float:
    """Return the height in inches of both gate charts, which are side by side."""
    return min(max(3.4, 1.2 + 0.2 * layers), 5.5)


def gate_course_chart(records: Records) -> Chart | None:
    """Draw the gates over steps: the mean of each layer, and single heads or their 10th to 90th percentile."""
    found = records.nested("gates", 2)
    if found is None:
        return None
    steps, history = found
    layers, heads = history.shape[1:]
    each_head = layers * heads <= 64
    low, high = history.min(axis=(1, 2)), history.max(axis=(1, 2))
    if not each_head:
        low, high = np.percentile(history, [10, 90], axis=(1, 2))
    with chart_figure(HALF, _gate_height(layers)) as (figure, axes):
        if not each_head:
            shown = np.unique(np.linspace(0, len(steps) - 1, 250).astype(int))
            axes.fill_between(steps[shown], low[shown], high[shown], color=p.GRID, linewidth=0)
        else:
            limit = p.MAX_POINTS // 4
            for layer, head in np.ndindex(layers, heads):
                p.line(axes, steps, history[:, layer, head], p.depth_colour(layer, layers), None, 0.6, limit=limit)
        _lines_by_layer(axes, steps, history.mean(axis=2))
        middle, half = (low.min() + high.max()) / 2, max(float(high.max() - low.min()) * 0.55, 0.05)
        axes.set_ylim(max(middle - half, -0.02), min(middle + half, 1.02))
        axes.axhline(0.5, color=p.FAINT, linewidth=1, linestyle=(0, (4, 3)))
        p.value_axis(axes, "sigmoid(β)")
        p.step_axis(axes, steps)
        svg = p.svg_of(figure, "gate-course", "Gates over training steps")
    means = history.mean(axis=(1, 2))
    caption = (
        f"{'Thick lines are' if each_head else 'Lines are'} the means of the layers, "
        f"{'thin lines are single heads' if each_head else 'the band covers 80% of the heads'}. The mean gate over all heads "
        f"went from {means[0]:.3f} to {means[-1]:.3f}; the gates of single heads now lie between {history[-1].min():.3f} and "
        f"{history[-1].max():.3f}."
    )
    return Chart("Gates over training", svg, caption)


def _lines_by_layer(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """Draw one line for each layer from values [S, layers].

    The legend names all layers if there are at most eight, otherwise the first, the middle and the last.
    """
    layers = values.shape[1]
    named = set(range(layers)) if layers <= 8 else {0, layers // 2, layers - 1}
    for layer in range(layers):
        label = f"layer {layer + 1}" if layer in named else None
        width = 1.8 if layers <= 8 else 1.1
        limit = max(p.MAX_POINTS // max(layers // 4, 1), 100)
        p.line(axes, steps, values[:, layer], p.depth_colour(layer, layers), label, width, limit=limit)
    p.legend_above(axes, columns=4)


def memory_charts(records: Records) -> list[Chart]:
    """Draw memory norms, memory gradients and write strengths by layer, as far as they are recorded."""
    charts = []
    mean_norm = "norm (mean over rows and heads)"
    kinds = (
        ("memory_norm", "Norm of the memory M", "Frobenius norm of M", mean_norm),
        ("memory_z_norm", "Norm of the normaliser z", "L2 norm of z", mean_norm),
        ("memory_grad_norm", "Gradient of the memory", "L2 norm over M and z", "norm"),
        ("memory_write_strength", "Learned strength of a write", "0 to 2", "strength (mean over tokens and heads)"),
    )
    for key, name, unit, quantity in kinds:
        found = records.nested(key, 1)
        if found is None:
            continue
        steps, norms = found
        with chart_figure(HALF, 3.4) as (figure, axes):
            _lines_by_layer(axes, steps, norms)
            p.value_axis(axes, unit, log=p.log_if_wide(norms))
            p.step_axis(axes, steps)
            svg = p.svg_of(figure, key, f"{name} by layer over training steps")
        largest = int(np.argmax(norms[-1]))
        middle = np.median(norms, axis=1)
        caption = (
            f"The {quantity} is largest in layer {largest + 1}, {number(norms[-1, largest])} at "
            f"step {steps[-1]:,.0f}; the median over layers went from {number(middle[0])} to {number(middle[-1])}."
        )
        charts.append(Chart(name, svg, caption))
    return charts
