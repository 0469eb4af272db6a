"""Bytes that autograd saves for the kernels, compared with the plan for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from infini_kernels import MemoryState, infini_attention, local_attention
from infini_kernels.triton import blocks
from infini_train.config import ModelConfig, RunConfig, TrainingConfig
from infini_train.model.self_attention import SplitHeads
from infini_train.planning.activations import attention_bytes
from infini_train.planning.sizes import Sizes

ROWS, SEGMENTS = 2, 4
KINDS: dict[str, dict[str, Any]] = {
    "local": {"attention": "local"},
    "linear": {},
    "delta": {"update_rule": "delta"},
    "linear, learned writes": {"write_strength": "learned"},
    "delta, learned writes": {"update_rule": "delta", "write_strength": "learned"},
    "linear, sharp features": {"feature_map": "softmax"},
    "delta, corrected normaliser": {"update_rule": "delta", "normaliser": "corrected", "feature_map": "softmax"},
}


@pytest.fixture(autouse=True)
def without_launches() -> Iterator[None]:
    blocks.observers.append(lambda *launch: None)
    yield
    blocks.observers.pop()


def kept_bytes(work: Callable[[], Any], known: list[Tensor]) -> int:
    """Return the bytes of the storages that autograd saves, without those of known tensors."""
    found: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    for tensor in known:
        found.pop(tensor.untyped_storage()._cdata, None)
    del result
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_saves_the_planned_bytes(kind: str, precision: str) -> None:
    model = ModelConfig(
        **{"num_attention_heads": 4, "num_query_groups": 2, "head_dim": 32, "segment_length": 64, **KINDS[kind]}
    )
    training = TrainingConfig(rows=ROWS, segments_per_micro_batch=SEGMENTS, precision=precision)  # type: ignore[arg-type]
    sizes = Sizes(RunConfig(model=model, training=training), 1, kernels=True)
    groups, width, length = model.num_query_groups, model.head_dim, model.segment_length
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]
    mixed = torch.randn(SEGMENTS * length, ROWS, (4 + 2 * groups) * width, dtype=dtype, requires_grad=True)
    gate, write_gate = torch.zeros(4, requires_grad=True), torch.zeros(groups, width, requires_grad=True)
    memory = MemoryState.zeros(ROWS, groups, width, model.memory_value_width)
    for state in memory:
        state.requires_grad_()
    angle = torch.randn(length, width // 2)
    rotary = angle.cos(), angle.sin()

    def work() -> Any:
        q, k, v = (x.transpose(0, 1) for x in SplitHeads.apply(mixed * 1.0, groups, width))
        if kind == "local":
            return local_attention(q, k, v, segment_length=length, rotary=rotary, backend="triton")
        return infini_attention(
            q,
            k,
            v,
            gate,
            memory,
            segment_length=length,
            update_rule=model.update_rule,
            rotary=rotary,
            lengths=torch.full((ROWS, SEGMENTS), length),
            reset=torch.zeros(ROWS, SEGMENTS, dtype=torch.bool),
            backend="triton",
            write_gate=write_gate if model.write_strength == "learned" else None,
            normaliser=model.normaliser,
            feature_map=model.feature_map,
        )

    found = kept_bytes(work, [gate, write_gate, *memory, *rotary])
    assert found == pytest.approx(attention_bytes(sizes), rel=0.01)
