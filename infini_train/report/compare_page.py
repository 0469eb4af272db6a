"""Results of a comparison as a Markdown table, and as an HTML page with a chart of perplexity and carried state size."""

from __future__ import annotations

import html

import numpy as np

from infini_train.config import RunConfig
from infini_train.report import plotting as p
from infini_train.report.charts import WIDE, chart_figure
from infini_train.report.compare_record import Measured
from infini_train.report.page import page, table

HEAD = ("attention", "state", "of infini's", "parameters", "perplexity", "spread", "emptied", "tokens/s", "peak memory")
MEANING = """state: number of values that one stream carries from segment to segment, summed over all layers. Full attention
carries no state between micro-batches: its context is the micro-batch. The context is shorter where a document begins
within the micro-batch. of infini's: state size relative to infini. perplexity: on held-out text, mean over the seeds.
spread: smallest and largest perplexity over the seeds, and their number. emptied: perplexity with the state emptied at every
segment. tokens/s and peak memory: measured in training, medians over the seeds."""
"""Explanation of the columns in HEAD."""


def by_variant(measured: list[Measured]) -> dict[str, list[Measured]]:
    """Group runs by variant, in order of first appearance."""
    grouped: dict[str, list[Measured]] = {}
    for each in measured:
        grouped.setdefault(each.variant, []).append(each)
    return grouped


def rows(measured: list[Measured]) -> list[tuple[str, ...]]:
    """Return the cells of the table, one row for each variant."""
    grouped = by_variant(measured)
    infini = next((runs[0].state_numbers for variant, runs in grouped.items() if variant.split()[0] == "infini"), None)
    found: list[tuple[str, ...]] = []
    for variant, runs in grouped.items():
        perplexities = np.exp([each.loss for each in runs])
        emptied = [each.loss_memory_emptied for each in runs if each.loss_memory_emptied is not None]
        state = runs[0].state_numbers
        found.append(
            (
                variant,
                f"{state:,}",
                f"{state / infini:.3g}×" if infini else "-",
                f"{runs[0].parameters:,}",
                f"{perplexities.mean():.3f}",
                f"{perplexities.min():.3f} to {perplexities.max():.3f} ({len(runs)})",
                f"{np.exp(emptied).mean():.3f}" if emptied else "-",
                f"{np.median([each.tokens_per_second for each in runs]):,.0f}",
                f"{np.median([each.peak_memory for each in runs]) / 1e9:.2f} GB",
            )
        )
    return found


def _machines(measured: list[Measured]) -> str:
    """Return the machines that the runs were measured on."""
    return " and ".join(dict.fromkeys(each.machine for each in measured))


def markdown_table(run: RunConfig, measured: list[Measured]) -> str:
    """Return the table in Markdown, with a heading and an explanation of the columns."""
    lines = [
        f"# Attention variants after {run.training.steps:,} steps of {run.tokens_per_step:,} tokens",
        "",
        f"Seeds {', '.join(map(str, run.compare.seeds))}; {_machines(measured)}. {' '.join(MEANING.split())}",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|---{'|---:' * (len(HEAD) - 1)}|",
        *(f"| {' | '.join(row)} |" for row in rows(measured)),
    ]
    return "\n".join(lines) + "\n"


def compare_page(run: RunConfig, measured: list[Measured]) -> str:
    """Return compare.html, a self-contained page."""
    caption = (
        "Left: held-out perplexity. Points are means over the seeds, lines their spread, and the best variant is on top. "
        "Right: the number of values that a stream carries from segment to segment."
    )
    body = (
        f'<figure class="wide"><div class="plot">{state_plot(measured)}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
        f'{table(HEAD, rows(measured))}<p class="intro">{html.escape(MEANING)}</p>'
    )
    lead = (
        f"{len(by_variant(measured))} attention variants, trained with the same data and model size for "
        f"{run.training.steps:,} steps of {run.tokens_per_step:,} tokens; {html.escape(_machines(measured))}"
    )
    return page("comparison", "Comparison of attention variants", lead, body)


def state_plot(measured: list[Measured]) -> str:
    """Draw perplexity with its spread over the seeds, and the state size, one row for each variant with the best on top."""
    grouped = by_variant(measured)
    means = {variant: float(np.exp([each.loss for each in runs]).mean()) for variant, runs in grouped.items()}
    order = sorted(means, key=means.__getitem__)
    with chart_figure(WIDE, 1.2 + 0.34 * len(order), ncols=2, sharey=True, width_ratios=(3, 2)) as (figure, (left, right)):
        for row, variant in enumerate(order):
            runs = grouped[variant]
            perplexities = np.exp([each.loss for each in runs])
            colour = p.WITH_MEMORY if variant.split()[0] == "infini" else p.EMPTIED
            left.plot([perplexities.min(), perplexities.max()], [row, row], color=colour, linewidth=2)
            left.plot([means[variant]], [row], marker="o", markersize=7, color=colour, markeredgecolor=p.SURFACE)
            state = runs[0].state_numbers
            right.plot([0, state], [row, row], color=colour, linewidth=2)
            right.plot([state], [row], marker="o", markersize=7, color=colour, markeredgecolor=p.SURFACE)
        left.set_yticks(range(len(order)), order)
        left.invert_yaxis()
        left.set_xlabel("held-out perplexity")
        right.set_xscale("symlog", linthresh=1000)
        largest = max(each.state_numbers for each in measured)
        right.set_xticks([0, *(10**power for power in range(3, 2 + max(3, len(str(largest)))))])
        right.set_xlabel("values carried (log scale beyond 1,000)")
        for axes in (left, right):
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
            axes.tick_params(length=0)
            axes.margins(x=0.06)
        return p.svg_of(figure, "compare", "Held-out perplexity and size of the carried state, by variant")
