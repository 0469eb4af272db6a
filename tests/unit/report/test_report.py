"""report.html: self-contained, escaped, and complete for killed, diverged and partly recorded runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infini_train.report.plotting import MAX_POINTS, running_median, smooth, svg_of, thin
from infini_train.report.run_report import write_report
from infini_train.report.run_results import read_metrics
from infini_train.report.summary import summary_lines
from infini_train.runtime.errors import UserError

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Outline(HTMLParser):
    """Parser that checks that every element is closed, and collects elements, headings and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def step_record(step: int, **extra: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 4096,
        "loss": 8.0 / (1 + 0.1 * step) + 3,
        "grad_norm": 1.0,
        "lr": 3e-4,
        "gate_lr": 1e-2,
        "tokens_per_second": 5000.0 + step,
        "mfu": 0.4,
        "padding": 0.02,
        "step_seconds": 0.8,
        "gates": [[0.5, 0.6], [0.4, 0.51 + 0.0001 * step]],
        "memory_norm": [10.0 + step, 20.0 + step],
        "memory_z_norm": [100.0 + step, 200.0 + step],
        **extra,
    }


def write_run(run_dir: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return run_dir


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("runs") / "a <b> run"
    records = [step_record(step) for step in range(1, 61)]
    records[29] |= {"held_out_loss": 5.5, "held_out_loss_memory_emptied": 5.7}
    records[59] |= {"held_out_loss": 4.5, "held_out_loss_memory_emptied": 4.9}
    write_run(run_dir, records)
    evaluation = {
        "step": 60,
        "tokens": 9000,
        "with_memory": {"loss": 4.0, "perplexity": 54.598},
        "memory_emptied": {"loss": 4.2, "perplexity": 66.686},
        "unigram_entropy": 6.25,
        "by_position": [
            {"first_segment": 0, "last_segment": 0, "tokens": 5000, "loss": 4.3, "loss_memory_emptied": 4.3},
            {
                "first_segment": 1,
                "last_segment": 1,
                "tokens": 3000,
                "loss": 4.1,
                "loss_memory_emptied": 4.3,
                "loss_memory_shuffled": 4.4,
            },
            {
                "first_segment": 2,
                "last_segment": 3,
                "tokens": 1000,
                "loss": 3.9,
                "loss_memory_emptied": 4.2,
                "loss_memory_shuffled": 4.25,
            },
        ],
    }
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    generation = {
        "prompt": "<b>Once</b> & ",
        "text": "<script>alert('x')</script>\x00\ud800 the end",
        "prompt_tokens": 7,
        "segments": 1,
    }
    (run_dir / "generation.json").write_text(json.dumps(generation))
    (run_dir / "config.yaml").write_text("model:\n  update_rule: delta  # <i>not markup</i>\n")
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


def test_page_has_every_section(full_page: str) -> None:
    assert outline(full_page).headings == [
        "a <b> run",
        "Learning",
        "Loss",
        "Effect of the memory",
        "Perplexity by position in the document",
        "Gates",
        "Gates, sigmoid(β), of every head",
        "Gates over training",
        "Specialised and mixing heads",
        "Memory",
        "Norm of the memory M",
        "Norm of the normaliser z",
        "Training progress",
        "Learning rates",
        "Gradient norm",
        "Throughput",
        "Model FLOPs utilisation",
        "Sample",
        "How to read this page",
    ]
    assert full_page.count("<svg") == full_page.count("<figcaption>") == 11
    assert "Configuration of the run" in full_page


def test_page_shows_the_numbers_of_the_run(full_page: str) -> None:
    cards = dict(re.findall(r'<dt>([^<]+)</dt><dd class="value">([^<]+)</dd>', full_page))
    assert cards == {
        "Training loss": "4.224",
        "Held-out perplexity with memory": "54.6",
        "Held-out perplexity, memory emptied": "66.7",
        "Unigram entropy": "6.250",
        "Tokens seen": "246 k",
        "Median throughput": "5.03 k",
        "Padding": "2.0%",
    }
    assert "Emptying its memory raises perplexity by 22.1%" in full_page
    assert "In segments 2–3 perplexity is 49.4 with memory and 66.7 with the memory emptied (+35.0%)" in full_page
    assert "and 70.1 with the memory of another row (+41.9%)" in full_page
    assert "it was 4.500 at step 60, and 4.900 with the memory emptied" in full_page


def test_axes_carry_units(full_page: str) -> None:
    labels = {text.strip() for text in outline(full_page).text}
    assert labels >= {
        "loss (nats per token)",
        "training step",
        "perplexity",
        "query head",
        "layer",
        "sigmoid(β)",
        "Frobenius norm of M",
        "L2 norm of z",
        "global L2 norm",
        "tokens per second",
        "% of the device's peak",
        "0 local only",
        "1 memory only",
    }


def test_page_is_self_contained(full_page: str) -> None:
    assert "http:" not in full_page and "https:" not in full_page and "@import" not in full_page
    for tag, attributes in outline(full_page).elements:
        assert tag not in {"script", "link", "img", "iframe", "object"}
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", full_page))


def test_every_internal_reference_has_one_target(full_page: str) -> None:
    ids = re.findall(r' id="([^"]+)"', full_page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', full_page)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_all_placeholder_colours_are_replaced(full_page: str) -> None:
    assert "#01f1" not in full_page
    style = full_page[: full_page.index("</style>")]
    used = set(re.findall(r"var\((--[\w-]+)\)", full_page))
    light, dark = style.split("prefers-color-scheme: dark", 1)
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_text_is_escaped(full_page: str) -> None:
    assert "<script" not in full_page and "<b>" not in full_page and "<i>" not in full_page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;�� the end" in full_page
    assert '<span class="prompt">&lt;b&gt;Once&lt;/b&gt; &amp; </span><ins>' in full_page
    assert "# &lt;i&gt;not markup&lt;/i&gt;" in full_page


def test_optional_inputs_may_be_absent(tmp_path: Path) -> None:
    memory = ("gates", "gate_lr", "mfu", "memory_norm", "memory_z_norm")
    records = [{k: v for k, v in step_record(step, held_out_loss=5.0).items() if k not in memory} for step in (1, 2, 3)]
    page = write_report(write_run(tmp_path / "run", records)).read_text(encoding="utf-8")
    found = outline(page)
    assert "This run recorded no gates" in page
    assert "<code>infini-train evaluate</code>" in page and "<code>infini-train generate</code>" in page
    assert "no readable config.yaml" in page
    assert "Model FLOPs utilisation" not in page and "Norm of the memory M" not in page
    assert "held out" in found.text and "with memory" not in page
    assert "gates β" not in page


@pytest.mark.parametrize("lines", [0, 1])
def test_runs_with_zero_or_one_step_have_a_page(tmp_path: Path, lines: int) -> None:
    page = write_report(write_run(tmp_path, [step_record(1)][:lines])).read_text(encoding="utf-8")
    outline(page)
    assert page.count("<svg") == (10 if lines else 0)
    assert ("No step is recorded yet" in page) == (lines == 0)


def test_results_of_an_earlier_step_get_a_note(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, [step_record(step) for step in range(1, 7)])
    (run_dir / "evaluation.json").write_text(json.dumps({"step": 4, "with_memory": {"loss": 4.0}}))
    (run_dir / "generation.json").write_text(json.dumps({"step": 6, "prompt": "a", "text": "b"}))
    page = write_report(run_dir).read_text()
    assert "its perplexity after 4 of them is 54.6" in page
    assert (
        "evaluation.json is of step 4, but the run has trained further: run <code>infini-train evaluate</code> again." in page
    )
    assert "generation.json is of" not in page and "Generated after step 6." in page
    assert "held-out perplexity (evaluation of step 4): 54.60" in "".join(summary_lines(run_dir))


@pytest.mark.parametrize(
    "recorded,words",
    [
        ({"same_data": True}, "On text that it was not trained on, its perplexity is 54.6"),
        (
            {"same_data": False},
            "On held-out text of other data than its own, which may include text from its training, its",
        ),
        ({"same_data": None}, "On held-out text, its perplexity is 54.6"),
        ({}, "On held-out text, its perplexity is 54.6"),
    ],
)
def test_text_is_called_unseen_only_for_the_data_of_the_run(recorded: dict[str, Any], words: str, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, [step_record(step) for step in range(1, 7)])
    (run_dir / "evaluation.json").write_text(json.dumps({"step": 6, "with_memory": {"loss": 4.0}, **recorded}))
    assert words in write_report(run_dir).read_text()
    assert ("on other data than it was trained on" in "".join(summary_lines(run_dir))) == (recorded.get("same_data") is False)


def test_report_shows_memory_of_attention_without_gates(tmp_path: Path) -> None:
    """Attention such as Transformer-XL has memory but no gates. The position chart still has a legend."""
    records = [{key: value for key, value in step_record(step).items() if key != "gates"} for step in range(1, 7)]
    run_dir = write_run(tmp_path, records)
    places = [
        {"first_segment": n, "last_segment": n, "tokens": 9, "loss": 4.0, "loss_memory_emptied": 4.0 + n} for n in range(2)
    ]
    evaluation = {"step": 6, "with_memory": {"loss": 4.0}, "memory_emptied": {"loss": 4.5}, "by_position": places}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(run_dir).read_text()
    assert "This run recorded no gates: its attention has none." in page and "Effect of the memory" in page
    assert "memory emptied at every segment" in outline(page).text, "the legend"


def test_captions_count_logged_steps(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path, [step_record(10 * step) for step in range(1, 61)])).read_text()
    assert "(mean of the first and last 10 logged steps)" in page
    every = write_report(write_run(tmp_path, [step_record(step) for step in range(1, 61)])).read_text()
    assert "(mean of the first and last 10 steps)" in every


def test_error_for_missing_metrics_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist.*infini-train pretrain") as refusal:
        write_report(tmp_path)
    assert "\n" not in str(refusal.value)


def test_truncated_last_line_is_left_out_with_a_note(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, [step_record(1), step_record(2)], tail='{"step": 3, "lo')
    records = read_metrics(run_dir / "metrics.jsonl")
    assert records.steps.tolist() == [1, 2]
    assert "The last line of metrics.jsonl (line 3) is incomplete" in write_report(run_dir).read_text(encoding="utf-8")


def test_line_torn_by_a_kill_and_followed_by_a_resumed_run(tmp_path: Path) -> None:
    resumed = json.dumps(step_record(2, loss=1.5)) + "\n"
    run_dir = write_run(tmp_path, [step_record(1), step_record(2)], tail='{"step": 3, "lo\n' + resumed)
    records = read_metrics(run_dir / "metrics.jsonl")
    assert records.column("loss")[-1] == 1.5 and len(records.rows) == 2
    assert any("(line 3)" in note for note in records.notes)


def test_the_latest_record_of_a_step_wins(tmp_path: Path) -> None:
    first = [step_record(step) for step in range(1, 9)]
    again = [step_record(step, loss=2.0) for step in range(5, 8)]
    records = read_metrics(write_run(tmp_path, first + again) / "metrics.jsonl")
    assert records.steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert records.column("loss").tolist()[4:] == [2.0, 2.0, 2.0]
    assert records.notes == [
        "4 steps were recorded and then repeated from a checkpoint; only the latest record of each step is shown."
    ]


def test_losses_that_are_not_finite_get_a_note(tmp_path: Path) -> None:
    records = [step_record(step, loss=float("nan") if step == 2 else 4.0) for step in range(1, 4)]
    page = write_report(write_run(tmp_path, records)).read_text(encoding="utf-8")
    assert "not finite at 1 step." in page


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("healthy_steps", [0, 1])
def test_a_diverged_run_has_a_page(tmp_path: Path, healthy_steps: int) -> None:
    nan, inf = float("nan"), float("inf")
    broken = {"loss": nan, "grad_norm": inf, "gates": [[nan, nan]] * 2, "memory_norm": [nan, 1.0], "memory_z_norm": [inf, nan]}
    records = [step_record(step, **(broken if step > healthy_steps else {})) for step in (1, 2)]
    page = write_report(write_run(tmp_path, records)).read_text(encoding="utf-8")
    outline(page)
    assert ("The recorded gates are not finite" in page) == (healthy_steps == 0)


def test_damaged_evaluation_gets_a_note(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, [step_record(1)])
    (run_dir / "evaluation.json").write_text('{"step": 1')
    assert "evaluation.json is not readable JSON" in write_report(run_dir).read_text(encoding="utf-8")


def test_long_runs_keep_the_page_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=12_000)
    records = [
        step_record(step + 1, loss=4 + noise[step], grad_norm=2 + noise[step] / 8, memory_norm=[noise[step], 1.0])
        for step in range(len(noise))
    ]
    assert write_report(write_run(tmp_path, records)).stat().st_size < 400_000


def test_thin_keeps_ends_and_spikes() -> None:
    x, y = np.arange(50_000.0), np.random.default_rng(1).normal(size=50_000)
    y[31_234], y[7] = 99.0, -99.0
    kept_x, kept_y = thin(x, y)
    assert len(kept_x) <= MAX_POINTS and np.all(np.diff(kept_x) > 0)
    assert kept_x[0] == 0 and kept_x[-1] == 49_999
    assert kept_y.max() == 99.0 and kept_y.min() == -99.0


def test_smoothing_ignores_values_that_are_not_finite() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0, np.inf])
    np.testing.assert_allclose(smooth(values, 3), [1.0, 2.0, 4.0, 4.0, 5.0])
    np.testing.assert_allclose(running_median(values, 3), [1.0, 2.0, 4.0, 4.0, 5.0])
    assert np.isnan(smooth(np.array([np.nan]), 3)).all()


def test_labels_are_kept_when_coordinates_are_shortened() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.text(0.123456, 0.5, "0.00025")
    svg = svg_of(figure, "label", 'a "quoted" description')
    assert ">0.00025<" in svg and "a &quot;quoted&quot; description" in svg


def test_unreadable_files_get_a_note(tmp_path: Path) -> None:
    """Folders replace files without read permission, because root can read those."""
    run_dir = write_run(tmp_path, [step_record(1)])
    for name in ("evaluation.json", "config.yaml"):
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).mkdir()
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "evaluation.json is not readable JSON" in page and "no readable config.yaml" in page
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read \(Is a directory\)"):
        write_report(run_dir)
