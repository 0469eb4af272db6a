"""`convert` compared with transformers' Llama, and runs that start from weights in every kind of layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from infini_train.checkpoint.folder import list_checkpoints
from infini_train.cli.configuration import read_config
from infini_train.config import RunConfig, save_config
from infini_train.config.validation import ATTENTION
from infini_train.convert.llama import LLAMA_3_ROPE_SCALING
from infini_train.planning.parameter_counts import model_parameters
from infini_train.tokenizers.tokenizer import tokenizer_file
from infini_train.tokenizers.tokenizer_file import tokenizer_of
from tests.support.distributed.assemble import global_weights
from tests.support.distributed.cases import Case
from tests.support.distributed.command import call
from tests.support.llama3 import write_llama_3_tokenizer

JOBS = "tests.support.distributed.convert_jobs"
SIZES = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
}


def pretrained(folder: Path, run: RunConfig, model_class: Any, config_class: Any, **options: Any) -> Any:
    """Save a transformers model with random weights in several files, and the tokenizer of the run's data."""
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, "vocab_size": 512, **options})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, float(parameter.dim() == 1), 0.15)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()
    shutil.copy(tokenizer_file(Path(run.data.path)), folder)
    return model


@torch.no_grad()
def by_segment(model: Any, tokens: Tensor, length: int) -> Tensor:
    """Return the logits of a transformers model that processes each segment as a separate text."""
    return torch.cat([model(segment).logits for segment in tokens.split(length, dim=1)], dim=1).float()


@pytest.mark.parametrize(
    "classes,options",
    [
        ((LlamaForCausalLM, LlamaConfig), {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
        ((LlamaForCausalLM, LlamaConfig), {"tie_word_embeddings": True, "vocab_size": 515, "num_key_value_heads": 1}),
        ((MistralForCausalLM, MistralConfig), {"num_key_value_heads": 4, "sliding_window": 32}),
    ],
    ids=["llama", "tied, with spare rows", "mistral"],
)
def test_a_converted_transformers_model_gives_the_same_logits(classes, options, pool, run_config, tmp_path):
    theirs = pretrained(tmp_path / "hf", run_config, *classes, **options)
    output = call("convert", "--source", str(tmp_path / "hf"), "--output", str(tmp_path / "ours"))
    assert ("the last 3 rows" in output) == (theirs.config.vocab_size == 515)
    run = read_config(tmp_path / "ours" / "config.yaml")
    assert (run.model.segment_length, run.model.first_segment, run.data.vocab_size) == (64, "local_only", 512)
    assert run.training.initial_weights == str(tmp_path / "ours" / "weights.safetensors")
    # Use local attention, so that the logits do not depend on a memory.
    local = replace(run, data=run_config.data, model=replace(run.model, attention="local"))
    tokens = torch.randint(3, 512, (2, 150), generator=torch.Generator().manual_seed(1))
    ours = pool(1).run(JOBS, "logits", local, run.training.initial_weights, tokens)[0]
    window = options.get("sliding_window", 64)
    expected = by_segment(theirs, tokens, 64)[..., :512]
    within = torch.arange(150) % 64 < window  # the segment is longer than the window of this Mistral
    assert expected[:, within].std() > 0.3
    torch.testing.assert_close(ours[:, within], expected[:, within], rtol=1e-4, atol=1e-4)
    if window < 64:
        assert (ours - expected)[:, ~within].abs().max() > 1e-3, "beyond the window the logits must differ"


@pytest.mark.parametrize("attention,first_segment", [("infini", "paper"), ("infini", "local_only"), ("full", "paper")])
def test_trained_weights_give_the_same_logits_in_transformers(attention, first_segment, pool, run_config, tmp_path):
    model = replace(run_config.model, attention=attention, first_segment=first_segment, initial_gate=0.7, update_rule="delta")
    training = replace(run_config.training, steps=3, segments_per_micro_batch=2)
    run = replace(run_config, run_dir=str(tmp_path / "run"), model=model, training=training)
    save_config(run, tmp_path / "run.yaml")
    call("pretrain", "--config", str(tmp_path / "run.yaml"))
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    output = call("convert", "--source", str(checkpoint), "--output", str(tmp_path / "hf"))
    context = 32 if attention == "full" else 16
    assert ("it has no memory" in output) == (attention != "full")

    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.max_position_embeddings == context and theirs.dtype == torch.float32
    tokens = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(1))
    ours = pool(1).run(JOBS, "logits", run, str(checkpoint), tokens)[0]
    torch.testing.assert_close(ours[:, :context], by_segment(theirs, tokens[:, :context], context), rtol=1e-4, atol=1e-5)
    if attention == "infini":
        beyond = by_segment(theirs, tokens[:, 16:32], 16)
        assert (ours[:, 16:32] - beyond).abs().max() > 1e-3, "with a memory the logits must differ"

    tokenizer, mine = AutoTokenizer.from_pretrained(tmp_path / "hf"), tokenizer_of(run.data.path)
    for text in ("two  words\n\n\tand a tab", " é ☃ 123"):
        assert tokenizer(text, add_special_tokens=False).input_ids == mine.encode(text)
    assert tokenizer("a").input_ids == [mine.bos_id, *mine.encode("a")]

    # A consolidated weights file gives the same result.
    weights = tmp_path / "weights.safetensors"
    call("checkpoint", "consolidate", "--path", str(checkpoint), "--output", str(weights))
    call("convert", "--source", str(weights), "--output", str(tmp_path / "again"))
    one, other = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_round_trip_is_bitwise_equal(pool, run_config, tmp_path):
    theirs = pretrained(tmp_path / "hf", run_config, LlamaForCausalLM, LlamaConfig)
    call("convert", "--source", str(tmp_path / "hf"), "--output", str(tmp_path / "ours"))
    call("convert", "--source", str(tmp_path / "ours" / "weights.safetensors"), "--output", str(tmp_path / "back"))
    back, before = load_file(tmp_path / "back" / "model.safetensors"), theirs.state_dict()
    assert back.keys() == before.keys()
    assert all(torch.equal(back[name], before[name]) for name in before)


def test_llama_3_1_converts_trains_and_converts_back(pool, run_config, tmp_path):
    """Its rotary embedding is scaled, and its tokenizer is a tokenizer.json."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(run_config.data.source).glob("*.txt")))
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA_3_ROPE_SCALING}
    theirs = pretrained(tmp_path / "hf", run_config, LlamaForCausalLM, LlamaConfig, head_dim=16, rope_parameters=rope)
    (tmp_path / "hf" / "tokenizer.model").unlink()
    write_llama_3_tokenizer(tmp_path / "hf", [text], 512)
    call("convert", "--source", str(tmp_path / "hf"), "--output", str(tmp_path / "ours"))
    run = read_config(tmp_path / "ours" / "config.yaml")
    assert (run.model.rotary_scaling, run.model.rotary_base, run.model.head_dim) == (8.0, 5e5, 16)
    assert run.data.tokenizer == str(tmp_path / "ours" / "tokenizer.json")
    data = ["--data.source", run_config.data.source, "--data.path", str(tmp_path / "data")]
    call("prepare", "--config", str(tmp_path / "ours" / "config.yaml"), *data)

    tokens = torch.randint(3, 512, (2, 150), generator=torch.Generator().manual_seed(1))
    local = replace(run, data=replace(run.data, path=str(tmp_path / "data")), model=replace(run.model, attention="local"))
    ours = pool(1).run(JOBS, "logits", local, run.training.initial_weights, tokens)[0]
    expected = by_segment(theirs, tokens, 64)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    unscaled = replace(theirs.config, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    other = LlamaForCausalLM(unscaled).eval()
    other.load_state_dict(theirs.state_dict())
    assert (by_segment(other, tokens, 64) - expected).abs().max() > 1e-3, "without scaling the logits must differ"

    sizes = ["--model.segment_length", "16", "--training.rows", "2", "--training.steps", "2"]
    sizes += ["--training.segments_per_micro_batch", "2", "--training.micro_batches_per_window", "2"]
    config = ["--config", str(tmp_path / "ours" / "config.yaml"), *data[2:], "--run_dir", str(tmp_path / "run"), *sizes]
    assert "starting from" in call("pretrain", *config, "--optimizer.warmup_steps", "1", processes=2)
    call("convert", "--source", str(list_checkpoints(tmp_path / "run")[-1]), "--output", str(tmp_path / "back"))
    back = LlamaForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert back.config.rope_parameters == rope
    trained = replace(local, model=replace(run.model, segment_length=16))
    ours = pool(1).run(JOBS, "logits", trained, str(list_checkpoints(tmp_path / "run")[-1]), tokens[:, :16])[0]
    torch.testing.assert_close(ours, by_segment(back, tokens[:, :16], 16), rtol=1e-4, atol=1e-4)
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "back"))
    assert before(text).input_ids == after(text).input_ids and before.eos_token_id == after.eos_token_id


CASES = [
    Case(zero=0),
    Case(dp=2, zero=1),
    Case(tp=2, dp=2, zero=2, sequence_parallel=True),
    Case(dp=2, zero=3),
    Case(pp=2, virtual=2),
    Case(cp=2),
]


@pytest.fixture(scope="module")
def source(run_config: RunConfig, pool: Callable[[int], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint and a weights file of the same model, which has local attention."""
    folder = tmp_path_factory.mktemp("source")
    model = replace(run_config.model, attention="local")
    run = replace(run_config, run_dir=str(folder / "run"), model=model, training=replace(run_config.training, steps=3))
    save_config(run, folder / "run.yaml")
    call("pretrain", "--config", str(folder / "run.yaml"))
    checkpoint = list_checkpoints(folder / "run")[-1]
    call("checkpoint", "consolidate", "--path", str(checkpoint), "--output", str(folder / "weights.safetensors"))
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, run_config: RunConfig, pool: Callable[[int], Any]) -> dict[str, Any]:
    training = replace(run_config.training, initial_weights=str(source / "weights.safetensors"))
    return pool(1).run(JOBS, "start", Case().apply(replace(run_config, training=training)), 2)[0]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layout_starts_from_the_same_weights(case, kind, source, expected, pool, run_config):
    path = source / "weights.safetensors" if kind == "file" else list_checkpoints(source / "run")[-1]
    training = replace(run_config.training, initial_weights=str(path))
    results = pool(case.processes).run(JOBS, "start", case.apply(replace(run_config, training=training)), 2)
    assert f"starting from {path}, step 3; as in a new model: gate (" in results[0]["said"]
    stored = load_file(source / "weights.safetensors")
    initial = global_weights(results, "initial")
    assert initial.keys() - stored.keys() == {
        f"decoder.layers.{layer}.self_attention.core_attention.attention.gate" for layer in range(4)
    }
    for name, value in initial.items():
        assert torch.equal(value, stored.get(name, torch.zeros(4))), name
    assert results[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert results[0]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    weights, theirs = global_weights(results), global_weights([expected])
    for name, value in theirs.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_gates_of_another_attention_are_not_loaded(pool, run_config, tmp_path):
    """One layer of `memorizing` has a gate with the same name as the gate of Infini-attention."""
    run = replace(run_config, run_dir=str(tmp_path / "run"), training=replace(run_config.training, steps=3))
    run.model = replace(run.model, attention="memorizing", initial_gate=1.5)
    save_config(run, tmp_path / "run.yaml")
    call("pretrain", "--config", str(tmp_path / "run.yaml"))
    training = replace(run_config.training, initial_weights=str(list_checkpoints(tmp_path / "run")[-1]))
    started = pool(1).run(JOBS, "start", Case().apply(replace(run_config, training=training)), 1)
    assert "as in a new model: gate (4)" in started[0]["said"]
    gates = [value for name, value in global_weights(started, "initial").items() if name.endswith("gate")]
    assert len(gates) == 4 and not any(value.any() for value in gates)
    # In the other direction, local attention ignores the gates of Infini-attention.
    run = replace(run_config, run_dir=str(tmp_path / "infini"), training=replace(run_config.training, steps=3))
    save_config(run, tmp_path / "infini.yaml")
    call("pretrain", "--config", str(tmp_path / "infini.yaml"))
    weights = ["--training.initial_weights", str(list_checkpoints(tmp_path / "infini")[-1]), "--model.attention", "local"]
    output = call("pretrain", "--config", str(tmp_path / "infini.yaml"), "--run_dir", str(tmp_path / "local"), *weights)
    assert "starting from" in output and "as in a new model" not in output


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_weights_load_into_float32_master_weights_without_rounding(zero, source, pool, run_config):
    path = source / "weights.safetensors"
    training = replace(run_config.training, initial_weights=str(path), precision="bfloat16")
    run = Case(zero=zero).apply(replace(run_config, training=training))
    masters = pool(1).run(JOBS, "master_weights", run)[0]
    stored = load_file(path)
    kept = {name for name in stored if torch.equal(masters[name].cpu(), stored[name])}
    assert kept == stored.keys()


def test_a_run_started_from_weights_resumes_without_the_weights_file(source, run_config, tmp_path):
    path = tmp_path / "weights.safetensors"
    shutil.copyfile(source / "weights.safetensors", path)
    run = replace(run_config, run_dir=str(tmp_path / "run"))
    run = replace(run, training=replace(run.training, initial_weights=str(path)))
    save_config(run, tmp_path / "run.yaml")
    config = ["--config", str(tmp_path / "run.yaml")]
    # Both calls use the same learning rates: the schedule ends at step 8.
    assert "starting from" in call("pretrain", *config, "--checkpoint.every", "4", processes=2)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    path.unlink()
    output = call("pretrain", *config, processes=2)
    assert "resuming from" in output and "starting from" not in output
    again = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in again] == [record["loss"] for record in records]
    output = call("pretrain", *config, "--training.initial_weights", "other.safetensors", expected=2)
    assert len(output.splitlines()) == 1 and "training.initial_weights is other.safetensors" in output


OPTIONS = {"infini": {"write_strength": "learned", "short_convolution": 3}, "local": {"tie_embeddings": True}}


@pytest.mark.parametrize("attention", ATTENTION)
def test_planned_parameters_are_those_of_the_model(attention, pool, run_config):
    model = replace(run_config.model, attention=attention, **OPTIONS.get(attention, {}))
    run = replace(run_config, model=model)
    assert pool(1).run(JOBS, "parameter_shapes", run)[0] == model_parameters(run)


def test_incompatible_weights_are_refused_before_the_start(source, run_config, tmp_path):
    run = replace(run_config, run_dir=str(tmp_path / "run"))
    save_config(run, tmp_path / "run.yaml")
    weights = source / "weights.safetensors"
    not_committed = tmp_path / "step_00000001"
    not_committed.mkdir()
    other = tmp_path / "other.safetensors"
    call("checkpoint", "consolidate", "--path", str(list_checkpoints(source / "run")[-1]), "--output", str(other))
    other.write_bytes(other.read_bytes()[:1000])
    for arguments, words in (
        (
            ["--training.initial_weights", "nowhere.safetensors"],
            "training.initial_weights nowhere.safetensors: there is no such",
        ),
        (["--training.initial_weights", str(not_committed)], "there is no finished checkpoint"),
        (["--training.initial_weights", str(other)], "write it again"),
        (["--training.initial_weights", str(weights), "--model.num_layers", "2"], "set model.num_layers to 4"),
        (["--training.initial_weights", str(weights), "--model.rotary_base", "500000"], "set model.rotary_base to 10000.0"),
        (["--training.initial_weights", str(weights), "--model.short_convolution", "3"], "lacks decoder.layers.0"),
    ):
        output = call("pretrain", "--config", str(tmp_path / "run.yaml"), *arguments, processes=2, expected=2)
        assert len(output.splitlines()) == 1 and words in output, output
    assert not (tmp_path / "run").exists()
