"""`infini-train evaluate compare` on a small corpus: every attention variant, stopped by a signal and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from infini_train.config import CompareConfig, LayoutConfig, save_config
from infini_train.data.preparation import prepare
from infini_train.resilience.stop_request import RESUMABLE_EXIT_CODE
from tests.support.corpus import small_run, write_corpus
from tests.support.distributed.command import call
from tests.support.warm.interpreter import python

VARIANTS = [
    "infini",
    "infini update_rule=delta",
    "transformer_xl",
    "memorizing",
    "window",
    "linear",
    "local",
    "full",
    "recurrent_memory",
    "feedback",
]


def test_a_stopped_comparison_of_every_variant_is_resumed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    run = small_run(tmp_path)
    # The bank of 40 tokens overflows within a document.
    model = replace(run.model, num_layers=2, bank_tokens=40, bank_top_k=4, memory_tokens=3)
    training = replace(run.training, steps=3, segments_per_micro_batch=4, micro_batches_per_window=1)
    optimizer = replace(run.optimizer, warmup_steps=0)
    compare = CompareConfig(variants=VARIANTS, seeds=[7])
    run = replace(run, model=model, training=training, optimizer=optimizer, compare=compare, layout=LayoutConfig(zero_stage=0))
    prepare(run)
    save_config(run, tmp_path / "compare.yaml")
    command = ["evaluate", "compare", "--config", str(tmp_path / "compare.yaml")]

    second = tmp_path / "run" / "infini-update_rule-delta" / "seed-7"
    process = subprocess.Popen(
        [python(), "-m", "infini_train", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 200
    while not (second / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    # The run saves and stops, unless it has just finished training and is being evaluated.
    assert process.wait(100) in (RESUMABLE_EXIT_CODE, -signal.SIGTERM, 128 + signal.SIGTERM)
    first = tmp_path / "run" / "infini" / "seed-7" / "metrics.jsonl"
    kept = first.stat().st_mtime_ns

    output = call(*command)
    assert first.stat().st_mtime_ns == kept, "a finished run is not trained again"
    report = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert [each["variant"] for each in report["runs"]] == VARIANTS
    by_variant = {each["variant"]: each for each in report["runs"]}
    heads, tokens = model.num_attention_heads, model.memory_tokens * model.hidden_size
    for variant, each in by_variant.items():
        own = {"infini": 2 * heads, "memorizing": heads, "recurrent_memory": tokens, "feedback": 2 * tokens}
        added = own.get(variant.split()[0], 0)
        assert each["parameters"] - added == by_variant["local"]["parameters"], "equal except for gates and memory tokens"
        assert each["tokens_per_second"] > 0 and each["peak_memory"] > 1e8
        assert (each["loss_memory_emptied"] is None) == (each["state_numbers"] == 0)
    losses = {variant: each["loss"] for variant, each in by_variant.items()}
    assert len(set(losses.values())) == len(losses), "every variant computes another loss"
    assert "| transformer_xl |" in output and (tmp_path / "run" / "compare.html").exists()
