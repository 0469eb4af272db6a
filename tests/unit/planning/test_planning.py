"""Formulas of the plan: small cases calculated by hand, and the effect of configuration changes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import step
from infini_train.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from infini_train.model.flops import training_flops_per_token
from infini_train.planning.activations import layer_bytes, micro_batch_bytes
from infini_train.planning.communication import Traffic, stage_traffic
from infini_train.planning.estimate import HOST_SECONDS, MESSAGE_SECONDS, traffic_seconds
from infini_train.planning.gpu_memory import stage_memory
from infini_train.planning.layout_plan import Plan, plan, with_layout, with_training
from infini_train.planning.parameter_counts import count, stage_parameters, total_parameters
from infini_train.planning.sizes import Sizes
from infini_train.runtime.errors import UserError
from infini_train.runtime.hardware import GPUS, bfloat16_peak


def small(**training: object) -> RunConfig:
    """Return a run with two layers, 2 query heads, 1 key/value head and segments of 4 tokens."""
    return RunConfig(
        model=ModelConfig(
            num_layers=2,
            hidden_size=8,
            num_attention_heads=2,
            num_query_groups=1,
            head_dim=4,
            ffn_hidden_size=6,
            segment_length=4,
        ),
        data=DataConfig(vocab_size=10),
        training=TrainingConfig(**{"rows": 1, "micro_batches_per_window": 2, "precision": "bfloat16", **training}),
    )


def large(**training: object) -> RunConfig:
    """Return a run with about a billion parameters."""
    return RunConfig(
        model=ModelConfig(
            num_layers=16, hidden_size=2048, num_attention_heads=16, num_query_groups=8, head_dim=128, ffn_hidden_size=8192
        ),
        training=TrainingConfig(**{"rows": 64, "precision": "bfloat16", **training}),
    )


def planned(run: RunConfig, gpus: int = 8, **layout: object) -> Plan:
    return plan(with_layout(run, **layout), gpus, "h100-80gb")


def test_parameter_count_by_hand():
    # Per layer: qkv 4 heads × 4 × 8, projection 8 × 8, fc1 12 × 8, fc2 8 × 6, two norms, two gates.
    layer = 128 + 64 + 96 + 48 + 16 + 2
    assert total_parameters(small()) == 2 * layer + 8 + 2 * 80
    assert count(stage_parameters(Sizes(small(), 1), 0)) == total_parameters(small())


@pytest.mark.parametrize(
    "layout", [{}, {"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 4}], ids=str
)
def test_stages_together_hold_each_parameter_once(layout):
    sizes = Sizes(with_layout(large(), **layout), 8)
    by_stage = [stage_parameters(sizes, stage) for stage in range(sizes.pp)]
    names = [name for shapes in by_stage for name in shapes]
    assert len(names) == len(set(names))
    held = sum(count(shapes) for shapes in by_stage)
    norms = sum(count({name: shape}) for shapes in by_stage for name, shape in shapes.items() if "layernorm" in name)
    assert sizes.tp * (held - norms) + norms == total_parameters(large())


def test_flops_by_hand():
    linear = 2 * (128 + 64 + 96 + 48) + 80
    attention, read, write = 2 * 2 * 2 * 4 * 4 / 2, 2 * 2 * 4 * 5, 2 * 1 * 4 * 4
    assert training_flops_per_token(small()) == 6 * linear + 3 * 2 * (attention + read + write)


def test_activations_of_a_layer_by_hand():
    norms = 2 * (4 * 8 * 2 + 4 * 4)
    products = 2 * 4 * 8 * 2 + 4 * 8 * 2 + 4 * 18 * 2
    softmax = (2 * 32 + 2 * 16) * 2 + 4 * 2 * 4
    memory = (16 + 16 + 32 + 2 * 4 * 2 + 16 + 4) * 4  # σ(K), V, σ(Q), two scales, M, z; no copies with one head and row
    assert layer_bytes(Sizes(small(), 1)) == norms + products + softmax + memory


def test_activations_with_recomputation_by_hand():
    sizes = Sizes(with_layout(small(recompute="layer"), pipeline_parallel_size=2), 2)
    hidden = 4 * 8 * 2
    assert micro_batch_bytes(sizes, 0, 0) == 4 * 8 + hidden + hidden  # token ids, the layer's input, the sent output
    assert micro_batch_bytes(sizes, 1, 0, recompute="stage") == hidden
    assert micro_batch_bytes(sizes, 0, 0, recompute="stage") == 0


@pytest.mark.parametrize(
    "precision,zero,weights,gradients,optimizer",
    [
        ("bfloat16", 1, 2, 4, 12 / 8),
        ("float32", 0, 4, 4, 8),
        ("float32", 1, 4, 4, 12 / 8),
        ("float32", 2, 4, 4 / 8, 12 / 8),
        ("float32", 3, 4 / 8, 4 / 8, 12 / 8),
    ],
)
def test_bytes_per_parameter(precision, zero, weights, gradients, optimizer):
    run = large(precision=precision)
    memory = planned(run, zero_stage=zero).memory
    number = total_parameters(run)
    assert memory.weights == pytest.approx(weights * number, rel=1e-3)
    assert memory.gradients == pytest.approx(gradients * number, rel=1e-3)
    assert memory.optimizer == pytest.approx(optimizer * number, rel=1e-3)


def test_memory_states_by_hand():
    """One row, 8 key/value heads, 16 layers, 8 micro-batches in flight; plus the last leaving state and one gradient."""
    run = large(rows=8)
    state = 16 * 8 * (128 * 128 + 128) * 4
    assert planned(run).memory.in_flight == 8
    assert planned(run).memory.memory_states == (8 + 1 + 1) * state


def test_categories_add_up_to_the_total():
    memory = planned(large()).memory
    categories = memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.memory_states
    assert memory.total == categories + memory.buffers
    assert memory.buffers > 0


@pytest.mark.parametrize(
    "less,more",
    [
        ({"recompute": "stage"}, {"recompute": "layer"}),
        ({"recompute": "layer"}, {"recompute": "none"}),
        ({"micro_batches_per_window": 4}, {"micro_batches_per_window": 8}),
        ({"rows": 32}, {"rows": 64}),
    ],
)
def test_activations_grow_with(less, more):
    assert planned(large(**less)).memory.activations < planned(large(**more)).memory.activations


def test_recompute_stage_saves_memory_for_long_windows():
    """In a short window, the recomputed activations of a whole stage need more memory than the inputs of its layers."""

    def total(recompute: str, window: int) -> int:
        return planned(large(rows=8, recompute=recompute, micro_batches_per_window=window)).memory.total

    assert total("layer", 4) < total("stage", 4)
    assert total("stage", 512) < total("layer", 512) < total("none", 512)


@pytest.mark.parametrize("layout", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_splitting_the_model_saves_weights_and_gradients(layout):
    whole, split = planned(large()).memory, planned(large(), **layout).memory
    assert split.weights < 0.6 * whole.weights
    assert split.gradients < 0.6 * whole.gradients


def test_more_micro_batches_reduce_the_bubble():
    def share(windows: int, rows: int = 64) -> float:
        time = planned(large(windows_per_step=windows, rows=rows), pipeline_parallel_size=4).time
        assert (time.host > time.device) == (rows < 64)
        return time.bubble / (time.compute + time.communication + time.bubble)

    assert share(1) == pytest.approx(3 / 11)
    assert share(4) == pytest.approx(3 / 35)
    assert share(1, rows=2) == pytest.approx(3 / 11)  # where the host limits a stage, the bubble includes host time


def test_recomputation_costs_a_third_more_time_and_reduces_mfu():
    none, layer = planned(large(rows=8)), planned(large(rows=8, recompute="layer"))
    assert 1.2 < layer.time.compute / none.time.compute < 1.36
    assert layer.mfu < none.mfu < 1


def test_fewer_recomputed_layers_need_more_memory_and_less_time():
    plans = [planned(large(rows=8, recompute="layer", recompute_layers=layers)) for layers in (4, 8, 16, 0, 99)]
    assert plans[0].time.compute < plans[1].time.compute < plans[2].time.compute
    assert plans[0].memory.activations > plans[1].memory.activations > plans[2].memory.activations
    some, none, every = plans[1], planned(large(rows=8)), plans[2]
    assert some.time.compute == pytest.approx((none.time.compute + every.time.compute) / 2, rel=0.01)
    # 0 means all layers, and so does a number above the number of layers.
    assert plans[3].time == plans[4].time == every.time and plans[3].memory == plans[4].memory == every.memory


@pytest.mark.parametrize("model", step.MODELS)
@pytest.mark.parametrize("attention", ["infini linear", "local"])
def test_plan_is_close_to_a_measured_step(model: str, attention: str) -> None:
    """The plan is compared with the last record of an H200."""
    lines = (Path(step.__file__).parent / "results" / "step.jsonl").read_text(encoding="utf-8").splitlines()
    record = next(each for each in map(json.loads, reversed(lines)) if each["device"] == "NVIDIA H200")
    measured = next(row for row in record["rows"] if (row["model"], row["attention"]) == (model, attention))
    found = plan(step.step_run(model, attention, 3, fused_layers="fused"), 1, "h200-141gb")
    assert found.memory.total / 1e9 == pytest.approx(measured["peak_gb"], rel=0.03)
    assert found.tokens_per_second == pytest.approx(measured["tokens_per_second"], rel=0.13)


def test_the_host_limits_micro_batches_that_are_too_small():
    small, larger = (
        planned(large(rows=8, recompute="layer", segments_per_micro_batch=each, micro_batches_per_window=8 // each)).time
        for each in (1, 8)
    )
    assert small.host == pytest.approx(8 * 16 * HOST_SECONDS * 4 / 3)
    assert larger.host == pytest.approx(small.host / 8)
    assert small.device == pytest.approx(larger.device, rel=0.02)
    assert small.compute == small.host > small.device
    assert larger.compute == larger.device > larger.host
    assert small.total > larger.total


def test_ring_bytes_by_hand():
    def sent(operation: str) -> float:
        return Traffic("data", operation, "", messages=3, bytes=100, size=4, stride=1, processes=4).wire_bytes  # type: ignore[arg-type]

    assert sent("all_reduce") == 3 * 2 * 75
    assert sent("all_gather") == sent("reduce_scatter") == 3 * 75
    assert sent("send") == 3 * 100


def test_links_follow_the_order_of_ranks():
    """The order is tensor, context, data, pipeline. With 8 GPUs per node, tp 4 × cp 2 fill a node; others use the network."""
    run = large(segments_per_micro_batch=2)
    sizes = Sizes(with_layout(run, tensor_parallel_size=4, context_parallel_size=2, pipeline_parallel_size=2), 32)
    links = {item.kind: item.link(8) for item in stage_traffic(sizes, 0)}
    assert links == {"tensor": "NVLink", "context": "NVLink", "pipeline": "network", "data": "network"}


@pytest.mark.parametrize("processes", [*range(1, 9), 12, 16, 20, 24, 48, 96])
def test_link_is_nvlink_only_if_every_group_of_the_kind_is_in_one_node(processes: int):
    """The expected value is counted over all groups, rank by rank, with 8 GPUs per node."""
    for span in (each for each in range(2, processes + 1) if processes % each == 0):
        for stride in (each for each in range(1, span) if span % each == 0):
            groups = [
                range(block + first, block + span, stride) for block in range(0, processes, span) for first in range(stride)
            ]
            nodes = [Counter(rank // 8 for rank in group) for group in groups]
            item = Traffic(
                "data", "all_reduce", "", messages=1, bytes=1, size=span // stride, stride=stride, processes=processes
            )
            assert (item.link(8) == "NVLink") is all(len(each) == 1 for each in nodes), (span, stride)
            assert item.per_node(8) == min(min(each.values()) for each in nodes), (span, stride)


def test_seconds_of_a_message_by_hand():
    """A group with two ranks on each node uses two network adapters per node."""
    item = Traffic("data", "all_reduce", "", messages=1, bytes=10**9, size=8, stride=4, processes=32)
    gpu = GPUS["h100-80gb"]
    assert item.per_node(8) == 2
    assert traffic_seconds(item, gpu) == pytest.approx(1.75e9 / (2 * 50e9 * 0.8) + MESSAGE_SECONDS["network"])


def test_context_group_messages_do_not_depend_on_the_segment_length():
    def sizes(length: int) -> list[int]:
        run = large(segments_per_micro_batch=2)
        run = with_layout(replace(run, model=replace(run.model, segment_length=length)), context_parallel_size=2)
        return [item.bytes for item in stage_traffic(Sizes(run, 8), 0) if item.kind == "context"]

    assert sizes(512) == sizes(4096)
    assert len(sizes(512)) == 4


@pytest.mark.parametrize(("chunk", "expected"), [(3, [(2, 3), (1, 2)]), (4, [(2, 4)]), (5, [(1, 5), (1, 3)]), (9, [(1, 8)])])
def test_the_last_chunk_of_a_loss_may_be_shorter(chunk: int, expected: list[tuple[int, int]]):
    """Two segments of 4 tokens in each of two rows."""
    run = small(rows=2, segments_per_micro_batch=2, micro_batches_per_window=1, loss_chunk_tokens=chunk)
    run = with_layout(replace(run, model=replace(run.model, num_query_groups=2)), tensor_parallel_size=2)
    traffic = stage_traffic(Sizes(run, 2), 0)
    sent = [(item.messages, item.bytes) for item in traffic if item.what == "gradient of the output layer's input"]
    assert sent == [(messages, 2 * tokens * 8 * 2) for messages, tokens in expected]


def test_one_process_sends_nothing():
    assert stage_traffic(Sizes(large(), 1), 0) == []


def test_unknown_gpu_lists_the_known_ones():
    with pytest.raises(UserError, match="'h100' is not known; known are a100-40gb, a100-80gb, h100-80gb, h200-141gb"):
        plan(large(), 8, "h100")


def test_invalid_layouts_are_refused_as_in_pretrain():
    with pytest.raises(UserError, match="does not fit 6 process"):
        planned(large(), 6, tensor_parallel_size=4)
    with pytest.raises(UserError, match=r"training\.rows is 64"):
        planned(large(), 128)


@pytest.mark.parametrize(
    "name,peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA RTX A1000", None),
        ("Quadro RTX 8000", None),
    ],
)
def test_bfloat16_peak_by_cuda_device_name(name, peak):
    assert bfloat16_peak(name) == peak


def test_plan_works_for_every_known_gpu():
    totals = {plan(large(), 8, name).memory.total for name in GPUS}
    assert len(totals) == 1, "the GPU memory of a run does not depend on the GPU type"
    times = [plan(with_training(large(), rows=8), 8, name).time.total for name in GPUS]
    assert times == sorted(times, reverse=True)


def test_memory_of_a_pipeline_is_that_of_its_worst_stage():
    each = planned(large(), pipeline_parallel_size=4)
    assert each.memory.total == max(stage_memory(each.sizes, stage).total for stage in range(4))


def test_planning_imports_no_torch():
    code = (
        "import sys; from infini_train.config import RunConfig; from infini_train.planning.layout_plan import plan; "
        "print(plan(RunConfig(), 8, 'h100-80gb').fits); assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in ("True", "False")


@pytest.fixture
def observed():
    """Sizes of a run with a pipeline, and messages exactly as planned for its second stage."""
    from infini_train.planning.dry_run.recorded_operations import Message

    run = with_layout(large(rows=8), tensor_parallel_size=2, pipeline_parallel_size=2)
    sizes = Sizes(run, 8)
    messages = []
    for item in stage_traffic(sizes, 1):
        ranks = tuple(range(0, item.size * item.stride, item.stride))
        messages += [Message(item.operation, ranks, item.bytes)] * item.messages
    return sizes, messages


def test_planned_messages_have_no_differences(observed):
    from infini_train.planning.dry_run.differences import message_differences

    sizes, messages = observed
    assert message_differences(sizes, 1, messages) == []
    assert message_differences(sizes, 1, [*messages, replace(messages[0], bytes=4)]) == [], "flags are not planned"


@pytest.mark.parametrize("change", ["one missing", "one more", "another size", "another group", "unplanned"])
def test_message_differences_are_reported(observed, change):
    from infini_train.planning.dry_run.differences import message_differences

    sizes, messages = observed
    send = next(message for message in messages if message.operation == "send")
    tensor = next(message for message in messages if message.ranks == (0, 1))
    rest = [message for message in messages if message is not tensor]
    changed = {
        "one missing": [message for message in messages if message is not send],
        "one more": [*messages, tensor],
        "another size": [*rest, replace(tensor, bytes=tensor.bytes + 2)],
        "another group": [replace(message, ranks=(0, 4)) if message.ranks == (0, 1) else message for message in messages],
        "unplanned": [*messages, replace(tensor, operation="all_to_all")],
    }[change]
    assert message_differences(sizes, 1, changed)
