"""Validation of a configuration: an error is one line that names the key, the value and the remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from infini_train.config import LayoutConfig, RunConfig, save_config
from infini_train.config.validation import validate
from infini_train.runtime.errors import UserError

REPOSITORY = Path(__file__).parents[3]


def run_with(section: str, **values: object) -> RunConfig:
    run = RunConfig()
    return replace(run, **{section: replace(getattr(run, section), **values)})


def test_defaults_are_valid():
    validate(RunConfig(), 1)
    validate(RunConfig(), 8)


@pytest.mark.parametrize(
    "section,values,processes,words",
    [
        ("model", {"num_layers": 0}, 1, "model.num_layers is 0"),
        ("model", {"num_query_groups": 5}, 1, "model.num_attention_heads is 12, which model.num_query_groups = 5"),
        ("model", {"head_dim": 63}, 1, "model.head_dim is 63"),
        ("model", {"segment_length": -1}, 1, "model.segment_length is -1"),
        ("model", {"memory_eps": 1e-13}, 1, "model.memory_eps is 1e-13; use at least 1e-12"),
        ("training", {"memory_ageing": 2}, 1, "training.memory_ageing is 2, an exclusive bound, so it has no effect"),
        ("training", {"memory_ageing": 0}, 1, "training.memory_ageing is 0; use 1 to turn it off"),
        ("training", {"memory_ageing": 10**25}, 1, "training.memory_ageing is 10000000000000000000000000; use 1"),
        ("training", {"micro_batches_per_window": 1}, 1, "raise micro_batches_per_window"),
        ("training", {"rows": 6}, 4, "training.rows is 6"),
        ("training", {"precision": "bfloat16"}, 1, None),
        ("optimizer", {"warmup_steps": 1000}, 1, "optimizer.warmup_steps is 1000"),
        ("optimizer", {"schedule": "wsd"}, 1, "optimizer.decay_steps is 0"),
        ("optimizer", {"beta1": 1.0}, 1, "optimizer.beta1 is 1.0; it must be at least 0 and below 1"),
        ("optimizer", {"beta2": -0.1}, 1, "optimizer.beta2 is -0.1"),
        ("optimizer", {"weight_decay": -1.0}, 1, "optimizer.weight_decay is -1.0; use 0 or a positive number"),
        ("optimizer", {"gate_weight_decay": -1.0}, 1, "optimizer.gate_weight_decay is -1.0"),
        ("optimizer", {"final_learning_rate_fraction": -3.0}, 1, "optimizer.final_learning_rate_fraction is -3.0"),
        ("training", {"seed": -1}, 1, "training.seed is -1"),
        ("training", {"seed": 1 << 63}, 1, "training.seed is 9223372036854775808"),
        ("optimizer", {"clip_grad_norm": -1.0}, 1, "use 0 to turn clipping off"),
        ("checkpoint", {"keep": 1}, 1, "checkpoint.keep is 1"),
        ("checkpoint", {"copy_to": "s3://key:secret@bucket/runs"}, 1, "checkpoint.copy_to has a user or password"),
        ("evaluation", {"every": -1}, 1, "evaluation.every is -1"),
        ("health", {"max_consecutive_skips": 0}, 1, "health.max_consecutive_skips is 0"),
        ("health", {"max_rollbacks": 0}, 1, "health.max_rollbacks is 0"),
        ("health", {"spike_zscore": -1.0}, 1, "health.spike_zscore is -1.0"),
        ("health", {"spike_window": 3}, 1, "health.spike_window is 3"),
        ("health", {"on_spike": "rollback", "spike_zscore": 0.0}, 1, "health.on_spike is rollback"),
        ("health", {"hang_seconds": -1.0}, 1, "health.hang_seconds is -1.0"),
        ("health", {"first_step_seconds": 599.0}, 1, "health.first_step_seconds is 599.0"),
        ("health", {"save_seconds": 599.0}, 1, "health.save_seconds is 599.0"),
        ("data", {"held_out_fraction": 1.0}, 1, "data.held_out_fraction is 1.0"),
        ("layout", {"tensor_parallel_size": 8}, 8, "which layout.tensor_parallel_size = 8 does not divide"),
        ("layout", {"pipeline_parallel_size": 5}, 5, "model.num_layers is 12, which layout.pipeline_parallel_size = 5"),
        ("layout", {"pipeline_parallel_size": 4}, 6, "start a multiple of 4"),
        ("layout", {"pipeline_parallel_size": 2, "zero_stage": 3}, 2, "use zero_stage 2 or 1"),
        ("layout", {"offload_optimizer": True, "zero_stage": 0}, 1, "layout.offload_optimizer is true with zero_stage 0"),
        ("layout", {"sequence_parallel": True}, 1, "layout.sequence_parallel is true with tensor_parallel_size 1"),
        ("layout", {"context_parallel_size": 2}, 2, "training.segments_per_micro_batch is 1"),
        ("layout", {"virtual_stages": 0}, 1, "layout.virtual_stages is 0"),
        ("layout", {"virtual_stages": 2}, 1, "layout.virtual_stages is 2 with pipeline_parallel_size 1"),
        (
            "layout",
            {"virtual_stages": 4, "pipeline_parallel_size": 4},
            4,
            "model.num_layers is 12, which layout.pipeline_parallel_size × virtual_stages = 16",
        ),
        ("layout", {"zero_stage": 4}, 1, "layout.zero_stage is 4"),
    ],
)
def test_error_names_key_value_and_remedy(section, values, processes, words):
    run = run_with(section, **values)
    if words is None:
        validate(run, processes)
        return
    with pytest.raises(UserError) as error:
        validate(run, processes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_tied_embeddings_need_one_pipeline_stage():
    run = run_with("model", tie_embeddings=True)
    validate(run, 1)
    with pytest.raises(UserError, match="tie_embeddings to false or pipeline_parallel_size to 1"):
        validate(replace(run, layout=LayoutConfig(pipeline_parallel_size=2)), 2)


def test_full_attention_refuses_context_parallelism():
    run = replace(run_with("model", attention="full"), layout=LayoutConfig(context_parallel_size=2))
    run.training.segments_per_micro_batch = 2
    with pytest.raises(UserError, match=r"layout\.context_parallel_size is 2 with"):
        validate(run, 2)


@pytest.mark.parametrize("attention", ["window", "transformer_xl", "memorizing", "linear"])
def test_other_attentions_refuse_context_parallelism(attention):
    run = replace(run_with("model", attention=attention), layout=LayoutConfig(context_parallel_size=2))
    with pytest.raises(UserError, match=rf"layout\.context_parallel_size is 2 with model\.attention {attention}"):
        validate(replace(run, training=replace(run.training, segments_per_micro_batch=2)), 2)


def test_negative_recompute_layers_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"training\.recompute_layers is -1; use 0 for all layers of a chunk, or a positive number"
    ):
        validate(run_with("training", recompute="layer", recompute_layers=-1), 1)


@pytest.mark.parametrize("attention", ["recurrent_memory", "feedback"])
@pytest.mark.parametrize(
    "section,values,key",
    [
        ("layout", {"tensor_parallel_size": 2, "sequence_parallel": True}, "layout.sequence_parallel"),
        ("training", {"recompute": "layer"}, "training.recompute"),
        ("layout", {"context_parallel_size": 2}, "layout.context_parallel_size"),
    ],
)
def test_memory_tokens_refuse_sequence_parallel_context_parallel_and_layer_recompute(attention, section, values, key):
    run = run_with("model", attention=attention)
    run = replace(run, **{section: replace(getattr(run, section), **values)})
    with pytest.raises(UserError, match=f"{key} is .* with model.attention {attention}"):
        validate(run, 2)


@pytest.mark.parametrize("width", [-1, 1, 64])
def test_short_convolution_must_be_shorter_than_a_segment(width):
    with pytest.raises(UserError, match=rf"model\.short_convolution is {width}; use 0 .* model\.segment_length = 64"):
        validate(run_with("model", segment_length=64, short_convolution=width), 2)


@pytest.mark.parametrize("attention", ["recurrent_memory", "feedback"])
def test_short_convolution_refuses_memory_tokens(attention):
    with pytest.raises(UserError, match=rf"model\.short_convolution is 4, but model\.attention {attention}"):
        validate(run_with("model", attention=attention, short_convolution=4), 2)


@pytest.mark.parametrize("width,attention,rest", [(0, "infini", "short_convolution is 0"), (4, "window", "attention window")])
def test_document_reach_needs_a_convolution_and_infini_attention(width, attention, rest):
    run = run_with("model", attention=attention, short_convolution=width, short_convolution_reach="document")
    with pytest.raises(UserError, match=rf"model\.short_convolution_reach is document, but model\.{rest}"):
        validate(run, 2)


def test_recurrent_memory_needs_one_pipeline_stage():
    run = replace(run_with("model", attention="recurrent_memory"), layout=LayoutConfig(pipeline_parallel_size=2))
    with pytest.raises(UserError, match=r"layout\.pipeline_parallel_size is 2 with model\.attention recurrent_memory"):
        validate(run, 2)


def test_memorizing_needs_one_pipeline_stage():
    run = replace(run_with("model", attention="memorizing"), layout=LayoutConfig(pipeline_parallel_size=2))
    with pytest.raises(UserError, match=r"layout\.pipeline_parallel_size is 2 with model\.attention memorizing"):
        validate(run, 2)


def test_the_table_of_layouts_matches_validation():
    """Validation accepts exactly the layouts in the table of docs/layouts.md."""
    allowed = set()
    for line in (REPOSITORY / "docs" / "layouts.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 5 or not cells[0][0].isdigit():
            continue
        pipelines = [1] if cells[0] == "1" else [2, 4]
        tensors = [1] if cells[1] == "1" else [1, 2, 4]
        precisions = [name for name, cell in zip(("float32", "bfloat16"), cells[3:], strict=True) if cell == "yes"]
        allowed |= {
            (pp, tp, int(zero), precision)
            for pp in pipelines
            for tp in tensors
            for zero in cells[2].split(",")
            for precision in precisions
        }
    assert allowed
    for pp in (1, 2, 4):
        for tp in (1, 2, 4):
            for zero in (0, 1, 2, 3):
                for precision in ("float32", "bfloat16"):
                    run = replace(
                        run_with("training", precision=precision),
                        layout=LayoutConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp, zero_stage=zero),
                    )
                    try:
                        validate(run, tp * pp)
                        passes = True
                    except UserError:
                        passes = False
                    assert passes == ((pp, tp, zero, precision) in allowed), (pp, tp, zero, precision)


def test_saved_config_has_every_key(tmp_path):
    save_config(RunConfig(), tmp_path / "config.yaml")
    loaded = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert loaded["model"]["segment_length"] == 2048
    assert set(loaded) == set(RunConfig.__dataclass_fields__)
