"""A comparison as a table, and as a page with a picture: perplexity against the size of the state that a stream carries."""

from __future__ import annotations

import html

import numpy as np

from infini_train.config import RunConfig
from infini_train.evaluation import plotting as p
from infini_train.evaluation.charts import WIDE, chart_figure
from infini_train.evaluation.compare import Measured
from infini_train.evaluation.page import page, table

HEAD = ("attention", "state", "of infini's", "parameters", "perplexity", "spread", "emptied", "tokens/s", "peak memory")
MEANING = """state: numbers that one stream carries from segment to segment, over all layers (full attention carries nothing
between micro-batches: it keeps its whole context). perplexity: of the held-out text, mean over the seeds; spread: smallest and
largest.
emptied: the same with the state emptied at every segment. tokens/s and peak memory: of training, medians over the seeds."""


def by_variant(measured: list[Measured]) -> dict[str, list[Measured]]:
    """Runs of each variant, in the order of the first seed."""
    grouped: dict[str, list[Measured]] = {}
    for each in measured:
        grouped.setdefault(each.variant, []).append(each)
    return grouped


def rows(measured: list[Measured]) -> list[tuple[str, ...]]:
    """The table's cells."""
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


def markdown_table(run: RunConfig, measured: list[Measured], machine: str) -> str:
    """The table with what one needs to read it."""
    lines = [
        f"# Rivals after {run.training.steps:,} steps of {run.tokens_per_step:,} tokens",
        "",
        f"Seeds {', '.join(map(str, run.compare.seeds))}; {machine}. {' '.join(MEANING.split())}",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|---{'|---:' * (len(HEAD) - 1)}|",
        *(f"| {' | '.join(row)} |" for row in rows(measured)),
    ]
    return "\n".join(lines) + "\n"


def compare_page(run: RunConfig, measured: list[Measured], machine: str) -> str:
    """compare.html, complete in itself."""
    caption = (
        "Held-out perplexity by the numbers that a stream carries from segment to segment: lower and further left is better. A "
        "point is the mean over the seeds, a line their spread. Attention that carries nothing stands at the left end."
    )
    body = (
        f'<figure class="wide"><div class="plot">{state_plot(measured)}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
        f'{table(HEAD, rows(measured))}<p class="intro">{html.escape(MEANING)}</p>'
    )
    lead = (
        f"{len(by_variant(measured))} kinds of attention, the same data, size and {run.training.steps:,} steps of "
        f"{run.tokens_per_step:,} tokens; {html.escape(machine)}"
    )
    return page("comparison", "Infini-attention and its rivals", lead, body)


def state_plot(measured: list[Measured]) -> str:
    """Perplexity over state size, one point a variant with the seeds' spread."""
    with chart_figure(WIDE, 4.6) as (figure, axes):
        for variant, runs in by_variant(measured).items():
            perplexities = np.exp([each.loss for each in runs])
            colour = p.WITH_MEMORY if variant.split()[0] == "infini" else p.EMPTIED
            # A logarithm has no zero: what carries nothing stands at one number.
            x = max(runs[0].state_numbers, 1)
            axes.plot([x, x], [perplexities.min(), perplexities.max()], color=colour, linewidth=2)
            axes.plot([x], [perplexities.mean()], marker="o", markersize=8, color=colour, markeredgecolor=p.SURFACE)
            axes.annotate(variant, (x, perplexities.mean()), xytext=(8, 5), textcoords="offset points", fontsize=9.5)
        axes.set_xscale("symlog", linthresh=1000)
        largest = max(each.state_numbers for each in measured)
        axes.set_xticks([0, *(10**power for power in range(3, 2 + max(3, len(str(largest)))))])
        axes.margins(x=0.12, y=0.12)
        axes.set_xlabel("numbers of the carried state (log scale beyond 1,000)")
        p.value_axis(axes, "held-out perplexity")
        return p.svg_of(figure, "compare", "Held-out perplexity by size of the carried state")
