"""Comparison of attention variants: runs, record, table and page."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infini_train.checkpoint.folder import COMMIT_FILE, MANIFEST_FILE, STATE_FILE
from infini_train.cli.configuration import read_config
from infini_train.cli.main import main
from infini_train.config import CheckpointConfig, CompareConfig, RunConfig, save_config
from infini_train.evaluation.comparison import compare, compare_runs, run_forwarding_signals, variant_model
from infini_train.report.compare_page import compare_page, markdown_table
from infini_train.report.compare_record import Measured, add_to_record, read_record
from infini_train.resilience.stop_request import RESUMABLE_EXIT_CODE
from infini_train.runtime.errors import UserError
from infini_train.runtime.files import file_digest

RUN = RunConfig(run_dir="runs/x", compare=CompareConfig(variants=["infini update_rule=delta", "local"], seeds=[4, 5]))


def test_runs_differ_only_in_variant_and_seed():
    runs = compare_runs(RUN)
    assert [(each.variant, each.seed) for each in runs] == [(v, s) for s in (4, 5) for v in RUN.compare.variants]
    assert len({each.run.run_dir for each in runs}) == 4
    for each in runs:
        rule = "delta" if each.variant.startswith("infini") else "linear"
        assert (each.run.model.attention, each.run.model.update_rule) == (each.variant.split()[0], rule)
        assert each.run.training.seed == each.seed
        same = replace(each.run, run_dir=RUN.run_dir, logging=RUN.logging)
        same = replace(same, model=RUN.model, training=RUN.training)
        assert same == RUN


def test_values_of_a_variant_are_converted_to_numbers():
    assert variant_model(RUN, "memorizing bank_tokens=128 rotary_base=5e5").bank_tokens == 128
    assert variant_model(RUN, "local rotary_base=500000.0").rotary_base == 500000.0


@pytest.mark.parametrize(
    "variant,message",
    [
        ("", "write for example infini or"),
        ("infini delta", "write for example infini or"),
        ("infini rule=delta", "unrecognized arguments: --model.rule=delta; did you mean"),
        ("infini bank_tokens=many", "model.bank_tokens is many; it must be a whole number"),
        ("infini update_rule=gamma", "model.update_rule is gamma; it must be one of linear, delta"),
        ("infini tie_embeddings=1", "model.tie_embeddings is 1; it must be true or false"),
    ],
)
def test_invalid_keys_and_values_of_a_variant_are_named(variant, message):
    with pytest.raises(UserError, match=f"compare.variants has {variant!r}.*{message}"):
        variant_model(RUN, variant)


def test_an_earlier_run_with_other_settings_is_refused(tmp_path):
    """The run in the folder had another learning rate. The error comes before any run starts."""
    run = replace(RUN, run_dir=str(tmp_path))
    each = compare_runs(run)[1]
    Path(each.run.run_dir).mkdir(parents=True)
    earlier = replace(each.run, optimizer=replace(run.optimizer, learning_rate=0.5), checkpoint=CheckpointConfig(every=7))
    save_config(earlier, Path(each.run.run_dir) / "variant.yaml")
    with pytest.raises(
        UserError, match=r"local/seed-4 belongs to other settings \(optimizer.learning_rate is 0.0003, and was 0.5\)"
    ):
        compare(run)
    assert not (tmp_path / "infini-update_rule-delta").exists()


def test_an_earlier_run_on_other_documents_is_refused(tmp_path, monkeypatch):
    """The run has its last checkpoint, so no training starts that would refuse the data."""
    run = replace(RUN, run_dir=str(tmp_path))
    checkpoint = Path(compare_runs(run)[0].run.run_dir) / "checkpoints" / f"step_{run.training.steps:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST_FILE).write_text("{}")
    (checkpoint / STATE_FILE).write_text('{"dataset_fingerprint": "before"}')
    (checkpoint / COMMIT_FILE).write_text(file_digest(checkpoint / MANIFEST_FILE))
    monkeypatch.setattr("infini_train.evaluation.comparison.data_fingerprint", lambda run: "now")
    monkeypatch.setattr("infini_train.evaluation.comparison._run", lambda command, each: 1)
    with pytest.raises(UserError, match=r"update_rule-delta/seed-4 was trained on other documents than data\.path"):
        compare(run)
    monkeypatch.setattr("infini_train.evaluation.comparison.data_fingerprint", lambda run: "before")
    assert compare(run) == 1, "a run on the same documents is evaluated"


@pytest.mark.parametrize(
    "variants,message",
    [
        (
            "[infini, infinite]",
            "compare.variants has 'infinite': model.attention is infinite; it must be one of infini, full, local",
        ),
        ("[]", "compare.variants is []; give one or more"),
        ("['local head_dim=7']", "compare.variants 'local head_dim=7': model.head_dim is 7; rotary embedding needs an even"),
    ],
)
def test_invalid_variants_are_refused_before_any_run_starts(variants, message, tmp_path, capsys):
    assert main(["evaluate", "compare", "--run_dir", str(tmp_path / "run"), "--compare.variants", variants]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def measured(variant: str, seed: int, perplexity: float, state: int) -> Measured:
    return Measured(
        variant, seed, float(np.log(perplexity)), None if not state else 3.0, 1000, state, 500.0 + seed, 2e9, "a <machine>"
    )


def test_the_table_shows_means_spreads_and_state_sizes():
    results = [
        measured("infini", 1, 10.0, 400),
        measured("transformer_xl", 1, 9.0, 3200),
        measured("infini", 2, 12.0, 400),
        measured("transformer_xl", 2, 9.5, 3200),
        measured("local", 1, 20.0, 0),
    ]
    table = markdown_table(RUN, results)
    assert "| infini | 400 | 1× | 1,000 | 11.000 | 10.000 to 12.000 (2) | 20.086 | 502 | 2.00 GB |" in table
    assert "| transformer_xl | 3,200 | 8× | 1,000 | 9.250 | 9.000 to 9.500 (2) | 20.086 | 502 | 2.00 GB |" in table
    assert "| local | 0 | 0× | 1,000 | 20.000 | 20.000 to 20.000 (1) | - | 501 | 2.00 GB |" in table
    page = compare_page(RUN, results)
    assert "a &lt;machine&gt;" in page and page.count("<svg") == 1 and "transformer_xl" in page
    assert "src=" not in page and "#01f1" not in page, "the page is self-contained and every placeholder colour is replaced"


@pytest.fixture
def recorded(tmp_path: Path) -> RunConfig:
    """A comparison of one seed that has only its record: neither data nor run folders exist."""
    run = replace(RUN, run_dir=str(tmp_path / "run"), compare=replace(RUN.compare, seeds=[3]))
    run = replace(run, data=replace(RUN.data, path=str(tmp_path / "data")))
    Path(run.run_dir).mkdir()
    for number, variant in enumerate(run.compare.variants):
        add_to_record(run, "1234", measured(variant, 3, 10.0 + number, 400))
    return run


def record_path(run: RunConfig) -> Path:
    return Path(run.run_dir) / "compare.json"


def test_recorded_runs_are_not_repeated(recorded, capsys):
    before = record_path(recorded).read_bytes()
    assert compare(recorded) == 0
    assert record_path(recorded).read_bytes() == before
    assert "| 10.000 to 10.000 (1) |" in capsys.readouterr().out
    written = {path.name for path in Path(recorded.run_dir).iterdir()}
    assert written == {"compare.html", "compare.json", "compare.md"}


def test_the_table_is_printed_if_it_cannot_be_written(recorded, capsys):
    (Path(recorded.run_dir) / "compare.md.new").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"compare.md cannot be written \(No space left on device\); .*--run_dir"):
        compare(recorded)
    assert "| 10.000 to 10.000 (1) |" in capsys.readouterr().out


def test_the_table_shows_only_the_configured_variants(recorded):
    before = record_path(recorded).read_bytes()
    assert compare(replace(recorded, compare=replace(recorded.compare, variants=["local"]))) == 0
    assert record_path(recorded).read_bytes() == before
    assert (Path(recorded.run_dir) / "compare.md").read_text().count("| 400 |") == 1


def test_runs_added_by_other_processes_are_kept(recorded):
    other = replace(recorded, compare=replace(recorded.compare, seeds=[9]), training=replace(recorded.training, seed=77))
    record = add_to_record(other, None, measured("local", 9, 8.0, 400))
    assert [seed for _, seed in record] == [3, 3, 9]
    assert json.loads(record_path(recorded).read_text())["dataset"] == "1234"
    assert read_record(recorded, "1234") == record


def test_a_diverged_run_has_its_own_row(recorded, capsys):
    nan = float("nan")
    other = replace(recorded, compare=replace(recorded.compare, variants=["local"], seeds=[9]))
    add_to_record(other, None, replace(measured("local", 9, nan, 400), loss_memory_emptied=nan))
    assert "NaN" not in record_path(recorded).read_text()
    read = read_record(recorded, "1234")["local", 9]
    assert math.isnan(read.loss) and read.loss_memory_emptied is None
    assert compare(other) == 0
    assert "nan" in capsys.readouterr().out


def test_a_record_of_other_settings_or_data_is_refused(recorded):
    before = record_path(recorded).read_bytes()
    longer = replace(recorded, training=replace(recorded.training, steps=recorded.training.steps + 1))
    with pytest.raises(UserError, match=r"compare.json belongs to other settings \(training.steps is \d+, and was \d+\)"):
        compare(longer)
    with pytest.raises(UserError, match=r"compare.json belongs to other settings \(data.path .* holds other documents\)"):
        read_record(recorded, "5678")
    assert record_path(recorded).read_bytes() == before


NO_RUN = '{"config": {}, "dataset": null, "runs": [{}]}'
NO_OBJECT = '{"config": {}, "dataset": null, "runs": [1]}'


@pytest.mark.parametrize(
    "text,message",
    [("{", "is not readable"), *((text, "is not a record of") for text in ("{}", NO_RUN, NO_OBJECT))],
)
def test_a_damaged_record_is_never_replaced(recorded, text, message):
    record_path(recorded).write_text(text)
    with pytest.raises(UserError, match=message):
        compare(recorded)
    assert record_path(recorded).read_text() == text


def test_the_variants_in_the_config_file_are_valid():
    from infini_train.config.validation import validate

    path = Path(__file__).parents[3] / "configs" / "compare.yaml"
    for each in compare_runs(read_config(path)):
        validate(each.run, 1)


CHILD = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[2])))
pathlib.Path(sys.argv[1]).touch()
for _ in range(600):
    time.sleep(0.1)
"""


@pytest.mark.parametrize(("code", "expected"), [(0, RESUMABLE_EXIT_CODE), (3, 3)])
def test_a_command_that_gets_sigterm_and_exits_with_0_counts_as_stopped(tmp_path: Path, code: int, expected: int) -> None:
    ready = tmp_path / "ready"

    def send_sigterm_when_ready() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send_sigterm_when_ready)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    assert run_forwarding_signals([sys.executable, "-c", CHILD, str(ready), str(code)]) == expected
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert run_forwarding_signals([sys.executable, "-c", ""]) == 0
