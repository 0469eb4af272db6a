"""Plotting helpers for the report: curve thinning, axes, and SVG output that follows the light or dark colours of the page.

Figures are drawn with one placeholder colour per role. In the SVG, each placeholder becomes a CSS variable, which the page
defines for the light and for the dark theme.
"""

from __future__ import annotations

import html
import io
import re
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

MAX_POINTS = 1000
"""Maximum number of points of one drawn curve."""
FEW_POINTS = 40
"""Marked curves with at most this many points show a marker at each point."""
TICK_STEPS = (1, 2, 2.5, 5, 10)
"""Allowed distances between axis ticks, times a power of ten."""

SURFACE, INK, MUTED, GRID, FAINT = "#01f101", "#01f102", "#01f103", "#01f104", "#01f105"
WITH_MEMORY, EMPTIED, WEIGHTS, GATES, SHUFFLED = "#01f106", "#01f107", "#01f108", "#01f109", "#01f10a"
DEPTHS = tuple(f"#01f1{level:02x}" for level in range(0x20, 0x28))

_LIGHT = {
    "surface": "#ffffff",
    "ink": "#1d2430",
    "muted": "#5d6778",
    "grid": "#e3e7ed",
    "faint": "#b4bdca",
    "with-memory": "#0072b2",
    "emptied": "#d55e00",
    "weights": "#007a5a",
    "gates": "#a8508a",
    "shuffled": "#7a6a00",
}
_DARK = {
    "surface": "#1a1f27",
    "ink": "#e8ecf2",
    "muted": "#9ea9b9",
    "grid": "#313947",
    "faint": "#586374",
    "with-memory": "#56b4e9",
    "emptied": "#f28e3c",
    "weights": "#2fc79a",
    "gates": "#e08fc4",
    "shuffled": "#d6c64a",
}
_ROLES = dict(zip((SURFACE, INK, MUTED, GRID, FAINT, WITH_MEMORY, EMPTIED, WEIGHTS, GATES, SHUFFLED), _LIGHT, strict=True)) | {
    colour: f"depth-{level}" for level, colour in enumerate(DEPTHS)
}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.labelcolor": INK,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


def css_colours() -> tuple[str, str]:
    """Return the CSS variable declarations of the light and of the dark theme."""
    viridis = matplotlib.colormaps["viridis"]

    def declare(colours: dict[str, str], first: float, last: float) -> str:
        ramp = {
            f"depth-{level}": matplotlib.colors.to_hex(viridis(share))
            for level, share in enumerate(np.linspace(first, last, len(DEPTHS)))
        }
        return " ".join(f"--{name}: {colour};" for name, colour in (colours | ramp).items())

    return declare(_LIGHT, 0.72, 0.0), declare(_DARK, 0.38, 1.0)


def depth_colour(layer: int, num_layers: int) -> str:
    """Return the colour of a layer. Layers are spread evenly over the colour ramp."""
    return DEPTHS[round(layer / max(num_layers - 1, 1) * (len(DEPTHS) - 1))]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return the centred running mean over `width` values, ignoring values that are not finite."""
    half = max(width // 2, 0)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    totals = counts[high] - counts[low]
    return np.where(totals > 0, (sums[high] - sums[low]) / np.maximum(totals, 1), np.nan)


def running_median(values: np.ndarray, width: int) -> np.ndarray:
    """Return the centred running median over `width` values (odd), fewer at the ends, ignoring values that are not finite."""
    half = min(width, 201) // 2
    padded = np.concatenate([np.full(half, np.nan), np.where(np.isfinite(values), values, np.nan), np.full(half, np.nan)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    result = np.full(len(values), np.nan)
    known = np.isfinite(windows).any(axis=1)
    result[known] = np.nanmedian(windows[known], axis=1)
    return result


def thin(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to at most `limit` points.

    Keeps the first and last point, and the lowest and highest point of equally long intervals, so that spikes remain visible.
    """
    if len(x) <= limit:
        return x, y
    edges = np.linspace(0, len(x), (limit - 2) // 2 + 1).astype(int)
    keep = {0, len(x) - 1}
    for low, high in pairwise(edges):
        keep |= {low + int(np.argmin(y[low:high])), low + int(np.argmax(y[low:high]))}
    index = np.array(sorted(keep))
    return x[index], y[index]


def line(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    colour: str,
    label: str | None = None,
    width: float = 1.8,
    marked: bool = False,
    limit: int = MAX_POINTS,
    style: str = "-",
) -> None:
    """Draw one curve of the finite values of y."""
    finite = np.isfinite(y)
    if not finite.any():
        return
    x, y = thin(x[finite], y[finite], limit)
    marker = "o" if len(x) == 1 or (marked and len(x) <= FEW_POINTS) else ""
    axes.plot(
        x,
        y,
        linestyle=style,
        color=colour,
        linewidth=width,
        label=label,
        marker=marker,
        markersize=5,
        markeredgecolor=SURFACE,
        markeredgewidth=0.8,
    )


def legend_above(axes: Axes, columns: int) -> None:
    """Place the legend above the left end of the chart, where a narrow window shows it too."""
    axes.figure.legend(loc="outside upper left", ncols=columns, columnspacing=1.2, handlelength=1.4)


def compact(value: float) -> str:
    """Format a number with an SI suffix, such as 12.3 M for 12,300,000."""
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def log_if_wide(values: np.ndarray, factor: float = 20.0) -> bool:
    """Return whether a log scale fits: all finite values are positive and the largest exceeds `factor` times the smallest."""
    values = values[np.isfinite(values)]
    return bool(len(values) and values.min() > 0 and values.max() > factor * values.min())


def value_axis(axes: Axes, label: str, log: bool = False, from_zero: bool = False) -> None:
    """Set label, scale and ticks of the y axis."""
    axes.set_ylabel(label + (" (log scale)" if log else ""))
    formatter = FuncFormatter(lambda value, _: compact(value) if abs(value) >= 1000 else f"{value:.4g}")
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        wide = high / low > 1e4
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=TICK_STEPS))
        if from_zero:
            axes.set_ylim(0, axes.dataLim.y1 * 1.08 or 1)
    axes.yaxis.set_major_formatter(formatter)


def step_axis(axes: Axes, steps: np.ndarray, label: bool = True) -> None:
    """Set label, limits and ticks of an x axis of training steps."""
    if label:
        axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=TICK_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if len(steps) == 1:
        axes.set_xticks(steps)
    elif len(steps) > 1:
        margin = (steps[-1] - steps[0]) * 0.015
        axes.set_xlim(steps[0] - margin, steps[-1] + margin)


def svg_of(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an inline <svg> element without namespace and fixed size, with colours as CSS variables."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    opening, body = svg.split(">", 1)
    box = opening.split('viewBox="')[1].split('"')[0]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[\w.]+_\d+"', "", body)
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group()), body)
    body = re.sub(r"#01f1[0-9a-f]{2}", lambda match: f"var(--{_ROLES[match.group()]})", body)
    return f'<svg role="img" aria-label="{html.escape(description)}" viewBox="{box}">{body}'
