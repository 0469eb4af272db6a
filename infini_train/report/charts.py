"""Charts of the training metrics: loss, learning rates, gradient norm, and throughput.

Each function draws one chart from the records of a run and writes its caption. It returns None if the run did not record the
values that the chart needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from infini_train.report import plotting as p
from infini_train.report.run_results import LARGE_PERPLEXITY, LAST_STEPS, HeldOut, Records

WIDE, HALF = 10.4, 5.2
"""Width in inches of a chart that spans the page, and of a chart in one of two columns."""


@dataclass(frozen=True)
class Chart:
    """A chart of the report: title, inline SVG, and caption. `wide` charts span both columns."""

    title: str
    svg: str
    caption: str
    wide: bool = False


@contextmanager
def chart_figure(width: float, height: float, **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """Yield a styled figure of this size in inches, and its axes as `Figure.subplots(**subplots)` returns them."""
    with matplotlib.rc_context(p.STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**subplots)


def number(value: float) -> str:
    """Format a number with three significant digits, or with all integer digits from 1,000 on."""
    return f"{value:,.0f}" if 1000 <= abs(value) < LARGE_PERPLEXITY else f"{value:.3g}"


def loss_chart(records: Records, held: HeldOut) -> Chart | None:
    """Draw training loss and held-out loss over steps."""
    steps, losses = records.steps, records.column("loss")
    with_memory, emptied = records.column("held_out_loss"), records.column("held_out_loss_memory_emptied")
    if not np.isfinite(losses).any():
        return None
    width = max(5, len(losses) // 50) | 1
    every = "training, each step" if records.record_unit == "steps" else "training, each logged step"
    smoothed = p.smooth(losses, width)
    with chart_figure(WIDE, 4.2) as (figure, axes):
        few = len(losses) < 2 * width
        p.line(axes, steps, losses, p.INK if few else p.FAINT, every, 1.8 if few else 0.9, marked=few)
        if not few:
            p.line(axes, steps, smoothed, p.INK, f"training, mean of {width} {records.record_unit}", 2.0)
        p.line(axes, steps, emptied, p.EMPTIED, "held out, memory emptied", marked=True)
        p.line(
            axes, steps, with_memory, p.WITH_MEMORY, "held out, with memory" if records.has_memory else "held out", marked=True
        )
        if held.unigram_entropy is not None:
            axes.axhline(held.unigram_entropy, color=p.MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="unigram entropy")
        p.value_axis(axes, "loss (nats per token)")
        p.step_axis(axes, steps)
        p.legend_above(axes, columns=5)
        svg = p.svg_of(figure, "loss", "Training and held-out loss over training steps")
    finite = losses[np.isfinite(losses)]
    ends = max(1, min(LAST_STEPS, len(finite) // 4))
    if len(finite) > 1:
        caption = (
            f"The training loss went from {finite[:ends].mean():.3f} to {finite[-ends:].mean():.3f} nats per token "
            f"(mean of the first and last {ends} {records.record_unit})"
            if ends > 1
            else f"The training loss went from {finite[0]:.3f} to {finite[-1]:.3f} nats per token"
        )
    else:
        caption = f"One step is recorded, with a training loss of {finite[0]:.3f} nats per token"
    measured = np.flatnonzero(np.isfinite(with_memory))
    if len(measured):
        caption += f"; on held-out text it was {with_memory[measured[-1]]:.3f} at step {steps[measured[-1]]:,.0f}"
        if np.isfinite(emptied[measured[-1]]):
            caption += f", and {emptied[measured[-1]]:.3f} with the memory emptied"
    if held.unigram_entropy is not None:
        caption += ". Below the dashed line (the unigram entropy) the model predicts better than token frequencies alone do"
    return Chart("Loss", svg, caption + ".", wide=True)


def learning_rate_chart(records: Records) -> Chart | None:
    """Draw the learning rates of the weights and of the gates over steps."""
    steps = records.steps
    panels = [
        (name, values, colour)
        for name, values, colour in (
            ("weights", records.column("lr"), p.WEIGHTS),
            ("gates β", records.column("gate_lr"), p.GATES),
        )
        if np.isfinite(values).any()
    ]
    if not panels:
        return None
    with chart_figure(HALF, 3.4, nrows=len(panels), sharex=True, squeeze=False) as (figure, grid):
        for axes, (name, values, colour) in zip(grid[:, 0], panels, strict=True):
            p.line(axes, steps, values, colour, width=2.0)
            axes.set_title(name, color=colour)
            p.value_axis(axes, "learning rate", from_zero=True)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=p.TICK_STEPS))
        p.step_axis(grid[-1, 0], steps)
        svg = p.svg_of(figure, "learning-rates", "Learning rates over training steps")
    sentences = []
    for name, values, _ in panels:
        finite = values[np.isfinite(values)]
        sentences.append(f"{name} peaked at {finite.max():.2g} and ended at {finite[-1]:.2g}")
    return Chart("Learning rates", svg, f"The learning rate of the {', that of the '.join(sentences)}.")


def gradient_chart(records: Records) -> Chart | None:
    """Draw the global gradient norm over steps, with its running median if there are enough steps."""
    steps, norms = records.steps, records.column("grad_norm")
    finite = norms[np.isfinite(norms)]
    if not len(finite):
        return None
    width = min(max(5, len(norms) // 50) | 1, 201)
    with chart_figure(HALF, 3.4) as (figure, axes):
        few = len(norms) < 2 * width
        p.line(axes, steps, norms, p.INK if few else p.FAINT, None, 1.6 if few else 0.9, marked=few)
        if not few:
            p.line(axes, steps, p.running_median(norms, width), p.INK, None, 2.0)
        p.value_axis(axes, "global L2 norm", log=p.log_if_wide(norms))
        p.step_axis(axes, steps)
        svg = p.svg_of(figure, "gradient", "Gradient norm over training steps")
    peak = int(np.nanargmax(np.where(np.isfinite(norms), norms, np.nan)))
    median_line = "" if few else f" (dark line: median of {width} {records.record_unit})"
    caption = (
        f"The gradient norm{median_line} has a median of {number(float(np.median(finite)))}; its highest value is "
        f"{number(norms[peak])}, at step {steps[peak]:,.0f}."
    )
    return Chart("Gradient norm", svg, caption)


def rate_chart(records: Records, key: str) -> Chart | None:
    """Draw throughput (key `tokens_per_second`) or model FLOPs utilisation (key `mfu`) over steps."""
    steps, values = records.steps, records.column(key)
    title, unit = ("Throughput", "tokens per second")
    if key == "mfu":
        title, unit, values = "Model FLOPs utilisation", "% of the device's peak", values * 100
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    median = float(np.median(finite))
    low, high = (float(edge) for edge in np.percentile(finite, [10, 90]))
    with chart_figure(HALF, 3.4) as (figure, axes):
        p.line(axes, steps, values, p.FAINT, None, 1.0, marked=True)
        axes.axhspan(low, high, color=p.MUTED, linewidth=0, alpha=0.22)
        axes.axhline(median, color=p.INK, linewidth=1.8)
        p.value_axis(axes, unit, from_zero=True)
        p.step_axis(axes, steps)
        svg = p.svg_of(figure, key, f"{title} over training steps")
    suffix = "%" if key == "mfu" else " tokens/s"
    show = number if key == "mfu" else p.compact
    caption = f"The median step (dark line) reached {show(median)}{suffix}"
    if len(finite) >= 10:
        caption += f"; 80% of the steps lie in the shaded band, {show(low)} to {show(high)}"
    return Chart(title, svg, caption + ".")
