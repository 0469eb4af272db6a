"""report.html: a self-contained page that shows the results of a run."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np

from infini_train.report import charts, memory_charts, plotting
from infini_train.report.charts import Chart, number
from infini_train.report.page import page
from infini_train.report.retrieval_chart import retrieval_chart
from infini_train.report.run_results import (
    LAST_STEPS,
    HeldOut,
    Records,
    held_out,
    perplexity,
    positions,
    read_json,
    read_metrics,
)
from infini_train.report.time_table import time_sections
from infini_train.runtime.files import COPIED_RUN_DIR, write_result

LONGEST_PROMPT = 1200
"""Number of characters shown of a prompt: those at its end, next to the continuation."""
LONGEST_TEXT = 6000
"""Number of characters shown of a continuation: those at its beginning."""
NO_DIFFERENCE = 0.01
"""Relative difference in perplexity below which the report states no clear difference."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from the files that the run recorded there.

    Reads metrics.jsonl and, if present, evaluation.json, passkey.json, generation.json, profile/ and config.yaml (shown
    verbatim). The page needs no network and no other file.

    Returns:
        The path of the page.

    Raises:
        UserError: metrics.jsonl does not exist or cannot be read, or the page cannot be written.
    """
    records = read_metrics(run_dir / "metrics.jsonl")
    notes = list(records.notes)
    evaluation = read_json(run_dir / "evaluation.json", "infini-train evaluate", notes)
    generation = read_json(run_dir / "generation.json", "infini-train generate", notes)
    retrieval = read_json(run_dir / "passkey.json", "infini-train evaluate passkey", notes)
    times = time_sections(run_dir, notes)
    held = held_out(records, evaluation)
    newest = int(records.steps[-1]) if records.rows else 0
    for result, name, command in (
        (evaluation, "evaluation.json", "evaluate"),
        (retrieval, "passkey.json", "evaluate passkey"),
        (generation, "generation.json", "generate"),
    ):
        if isinstance(step := (result or {}).get("step"), int) and step < newest:
            notes.append(f"{name} is of step {step:,}, but the run has trained further: run `infini-train {command}` again.")
    try:
        config = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        config = None

    sections = [
        _cards(records, held),
        "".join(f'<p class="note">{_code(note)}</p>' for note in notes),
        *_chart_sections(records, evaluation, held),
        _retrieval(retrieval),
        _sample(generation),
        times,
        _reading(records.has_memory or held.loss_memory_emptied is not None),
        _config(config),
    ]
    target = run_dir / "report.html"
    document = page(
        "training report",
        _text(run_dir.resolve().name),
        _lead(records, held),
        "\n".join(section for section in sections if section),
    )
    write_result(target, document, COPIED_RUN_DIR)
    return target


def _text(value: object) -> str:
    """Escape a value for HTML. Replace control characters and lone surrogates, which HTML cannot contain, by U+FFFD."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "�", str(value).replace("\r\n", "\n")))


def _lead(records: Records, held: HeldOut) -> str:
    """Return the summary of the run in sentences."""
    if not records.rows:
        return "No step is recorded yet: the run has just started, or ended before its first step."
    tokens = records.last("tokens")
    seen = f" and {plotting.compact(tokens)} tokens" if tokens else ""
    sentences = [f"Trained for {_steps(records)}{seen}."]
    if held.loss is not None:
        earlier = f" after {held.step:,} of them" if held.step is not None and held.step < records.steps[-1] else ""
        known = f"{held.text_description}, its perplexity{earlier} is {number(perplexity(held.loss))}"
        if held.unigram_entropy is not None:
            below = held.unigram_entropy - held.loss
            comparison = "better" if below >= 0 else "worse"
            known += f"; that is {abs(below):.2f} nats per token {comparison} than predicting from token frequencies alone"
        sentences.append(known + ".")
    if held.loss is not None and held.loss_memory_emptied is not None:
        change = perplexity(held.loss_memory_emptied) / perplexity(held.loss) - 1
        if abs(change) < NO_DIFFERENCE:
            sentences.append(f"Emptying its memory makes no clear difference ({change:+.2%} perplexity).")
        elif change > 0:
            sentences.append(f"Emptying its memory raises perplexity by {change:.1%}: the model relies on it.")
        else:
            sentences.append(f"Emptying its memory lowers perplexity by {-change:.1%}: the memory does not help yet.")
    return _text(" ".join(sentences))


def _cards(records: Records, held: HeldOut) -> str:
    """Return the cards with the main numbers of the run."""
    finite = records.finite("loss")
    cards = []
    if len(finite):
        last = finite[-LAST_STEPS:]
        detail = "nats per token"
        if len(last) > 1:
            detail += f", mean of the last {len(last)} {records.record_unit}; last value {finite[-1]:.3f}"
        cards.append(("Training loss", f"{last.mean():.3f}", detail, ""))
    if held.loss is not None:
        detail = f"loss {held.loss:.3f}; {held.source}"
        cards.append(
            (
                "Held-out perplexity" + (" with memory" if held.loss_memory_emptied is not None else ""),
                number(perplexity(held.loss)),
                detail,
                "with-memory",
            )
        )
    if held.loss_memory_emptied is not None:
        emptied = number(perplexity(held.loss_memory_emptied))
        detail = f"loss {held.loss_memory_emptied:.3f}; same weights, same text"
        cards.append(("Held-out perplexity, memory emptied", emptied, detail, "emptied"))
    if held.unigram_entropy is not None:
        detail = "nats per token: the loss of predicting from token frequencies alone"
        cards.append(("Unigram entropy", f"{held.unigram_entropy:.3f}", detail, ""))
    if (tokens := records.last("tokens")) is not None:
        cards.append(("Tokens seen", plotting.compact(tokens), f"{tokens:,.0f} in {_steps(records)}", ""))
    if len(rates := records.finite("tokens_per_second")):
        seconds = records.finite("step_seconds")
        complete = len(seconds) == records.steps[-1]
        detail = "tokens per second" + (f"; {_duration(seconds.sum())} for all steps" if complete else "")
        cards.append(("Median throughput", plotting.compact(float(np.median(rates))), detail, ""))
    if len(padding := records.finite("padding")):
        cards.append(("Padding", f"{padding.mean():.1%}", "of the token positions, mean over steps", ""))
    items = (
        f'<div class="card {style}"><dt>{_text(name)}</dt><dd class="value">{_text(value)}</dd><dd>{_text(detail)}</dd></div>'
        for name, value, detail, style in cards
    )
    return f'<dl class="cards">{"".join(items)}</dl>' if cards else ""


def _steps(records: Records) -> str:
    count = int(records.steps[-1])
    return f"{count:,} step{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _chart_sections(records: Records, evaluation: dict[str, Any] | None, held: HeldOut) -> list[str]:
    if not records.rows:
        return []
    has_memory = records.has_memory or held.loss_memory_emptied is not None
    by_position = memory_charts.position_chart(positions(evaluation), has_memory)
    missing_evaluation = "No evaluation.json with perplexity by position: run `infini-train evaluate` to measure it."
    missing_gates = "This run recorded no gates: its attention has none."
    if records.has_gates:
        missing_gates = "The recorded gates are not finite: the run has diverged."
    gates = [
        memory_charts.gate_map_chart(records),
        memory_charts.gate_course_chart(records),
        memory_charts.gate_histogram_chart(records),
    ]
    memory = [*memory_charts.memory_charts(records), memory_charts.read_back_chart(evaluation)]
    health = [
        charts.learning_rate_chart(records),
        charts.gradient_chart(records),
        charts.rate_chart(records, "tokens_per_second"),
        charts.rate_chart(records, "mfu"),
    ]
    compared = (
        "All curves come from the same weights. They were trained with a memory, so the curve with the memory emptied shows "
        "how much the model relies on its memory, not how well a model without memory would do. The memory of another row is "
        "similarly full, but comes from another document. The difference to the row's own memory shows how much the content of "
        "the memory contributes."
    )
    return [
        _section("Learning", "", [charts.loss_chart(records, held)], "No finite loss is recorded."),
        _section(
            "Effect of the memory" if has_memory else "Perplexity by position",
            compared if by_position and has_memory else "",
            [by_position],
            missing_evaluation,
        ),
        _section(
            "Gates",
            "Each head mixes the memory with local attention inside the segment. sigmoid(β) is the weight of the memory, "
            "1 - sigmoid(β) that of local attention."
            if gates[0]
            else "",
            gates,
            missing_gates,
        ),
        _section("Memory", "", memory, "This run recorded no finite memory norms.") if records.has_gates or any(memory) else "",
        _section("Training progress", "", health, "No learning rates, gradient norms or throughput are recorded."),
    ]


def _section(title: str, intro: str, found: list[Chart | None], missing: str) -> str:
    """Return a section with its charts, or with the sentence `missing` if there are none."""
    figures = [chart for chart in found if chart is not None]
    elements = [f"<h2>{_text(title)}</h2>"]
    if intro:
        elements.append(f'<p class="intro">{_text(intro)}</p>')
    if not figures:
        elements.append(f'<p class="missing">{_code(missing)}</p>')
    else:
        elements.append(f'<div class="charts">{"".join(_figure(chart) for chart in figures)}</div>')
    return f"<section>{''.join(elements)}</section>"


def _code(sentence: str) -> str:
    """Escape a sentence for HTML and turn text in backticks into <code>."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(sentence))


def _figure(chart: Chart) -> str:
    return (
        f'<figure class="{"wide" if chart.wide else "half"}"><h3>{_text(chart.title)}</h3>'
        f'<div class="plot">{chart.svg}</div><figcaption>{_text(chart.caption)}</figcaption></figure>'
    )


def _retrieval(result: dict[str, Any] | None) -> str:
    """Return the retrieval section, or an empty string if retrieval was not measured."""
    chart = retrieval_chart(result)
    return "" if chart is None else _section("Retrieval", "", [chart], "")


def _sample(generation: dict[str, Any] | None) -> str:
    if generation is None:
        missing = "No generation.json: run `infini-train generate` to continue a prompt."
        return f'<section><h2>Sample</h2><p class="missing">{_code(missing)}</p></section>'
    prompt, text = str(generation.get("prompt") or ""), str(generation.get("text") or "")
    facts = [
        f"{count:,} {name}{'' if count == 1 else 's'}"
        for name, count in (("token", generation.get("prompt_tokens")), ("segment", generation.get("segments")))
        if isinstance(count, int)
    ]
    intro = f"The prompt has {' in '.join(facts)}. " if facts else ""
    if isinstance(step := generation.get("step"), int):
        intro += f"Generated after step {step:,}. "
    intro += "The prompt is grey; the text that the model generated is highlighted."
    if len(prompt) > LONGEST_PROMPT:
        intro += f" Only the last {LONGEST_PROMPT:,} of the prompt's {len(prompt):,} characters are shown."
        prompt = "…" + prompt[-LONGEST_PROMPT:]
    if len(text) > LONGEST_TEXT:
        intro += f" Only the first {LONGEST_TEXT:,} of the continuation's {len(text):,} characters are shown."
        text = text[:LONGEST_TEXT] + "…"
    return (
        f'<section><h2>Sample</h2><p class="intro">{_text(intro)}</p>'
        f'<pre class="sample"><span class="prompt">{_text(prompt)}</span><ins>{_text(text)}</ins></pre></section>'
    )


def _reading(has_memory: bool) -> str:
    terms = [
        ("Perplexity", "exp(loss), the effective number of equally likely next tokens; lower is better."),
        ("Segment", "block of tokens with exact local attention; heads see earlier tokens only through their memory."),
        (
            "Memory emptied",
            "same weights and text, but M and z are set to zero at every segment, so only local attention remains.",
        ),
        (
            "Memory of another row",
            "same weights and text, but each row reads the memory that another row has written so far. "
            "Its own memory is carried on unread.",
        ),
        (
            "Curves",
            f"at most {plotting.MAX_POINTS:,} points each; of longer curves, the minima and maxima of equal intervals are "
            "drawn, so spikes remain visible.",
        ),
    ]
    if not has_memory:
        terms = [term for term in terms if term[0] not in ("Segment", "Memory emptied", "Memory of another row")]
    items = "".join(f"<dt>{_text(term)}</dt><dd>{_text(meaning)}</dd>" for term, meaning in terms)
    return f'<section><h2>How to read this page</h2><dl class="terms">{items}</dl></section>'


def _config(config: str | None) -> str:
    if config is None:
        return '<section><p class="missing">The run directory has no readable config.yaml.</p></section>'
    return (
        "<section><details><summary>Configuration of the run (config.yaml)</summary>"
        f'<pre class="config">{_text(config)}</pre></details></section>'
    )
