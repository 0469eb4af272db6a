"""Comparison with two public implementations of recurrent long context: one forward and backward pass over 8 segments.

All models have the same widths and train on every token. None has optimizer states. The recurrent memory transformer has no
compressive memory: its state consists of memory tokens that each segment passes to the next. It has as many memory tokens as
in its own example.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.one_process import OneDocument, current_megabytes, in_own_process, peak_megabytes, single_stream_run
from infini_train.config import ModelConfig, TrainingConfig

SEGMENT, SEGMENTS = 512, 8
VOCABULARY, LAYERS, WIDTH, HEADS, HEAD_WIDTH = 256, 4, 512, 8, 64
FEED_FORWARD = int(4 * WIDTH * 2 / 3)  # both packages derive this from their default multiplier 4
MEMORY_TOKENS = 128
PACKAGES = ("infini_transformer_pytorch", "recurrent_memory_transformer_pytorch")

# One residual stream, fused attention and no XL memory. This is closest to the computation of the other models. It is also
# faster and needs less memory than the package's defaults.
PLAIN = {"num_residual_streams": 1, "use_flash_attn": True, "use_xl_memories": False}
# Name -> implementation and its settings.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours none": ("ours", {"recompute": "none"}),
    "ours layer": ("ours", {"recompute": "layer"}),
    "ours stage": ("ours", {"recompute": "stage"}),
    "infini-transformer": ("infini_transformer", {}),
    "rmt": ("recurrent_memory", PLAIN),
    "rmt replay": ("recurrent_memory", {**PLAIN, "replay": True}),
}
OURS = [name for name, (kind, _) in CONTENDERS.items() if kind == "ours"]
PEERS = ("infini-transformer", "rmt")
ROUNDS = 3
# Name -> whether freed memory returns to the system, as in the other benchmarks, or stays in the C library, its default.
ALLOCATORS = {"returned": True, "kept": False}


def ours(recompute: str) -> tuple[nn.Module, Callable[[], float], int]:
    """Build the model of this package.

    Returns:
        The module, a function that runs forward and backward and returns the mean loss, and the number of state elements
        that pass from one segment to the next.
    """
    from infini_train.runtime import platform

    platform.install()
    from infini_train.training.training_run import build_training_run

    model = ModelConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=HEADS,
        head_dim=HEAD_WIDTH,
        ffn_hidden_size=FEED_FORWARD,
        segment_length=SEGMENT,
        update_rule="delta",
    )
    training = TrainingConfig(
        steps=1,
        rows=1,
        micro_batches_per_window=SEGMENTS,
        recompute=recompute,  # type: ignore[arg-type]
    )
    run = single_stream_run(model, training)
    trained = build_training_run(run, OneDocument(VOCABULARY, SEGMENT * SEGMENTS))
    trained.engine.adamw.state.clear()  # no optimizer step is run, and the other models have no moments
    batches = [trained.state.reader.next(1) for _ in range(SEGMENTS)]

    def forward_backward() -> float:
        loss_sum, _ = trained.pipeline.forward_backward(batches, {}, 1 / (SEGMENT * SEGMENTS))  # type: ignore[arg-type]
        return float(loss_sum) / (SEGMENT * SEGMENTS)

    return trained.engine.module, forward_backward, LAYERS * HEADS * HEAD_WIDTH * (HEAD_WIDTH + 1)


def infini_transformer() -> tuple[nn.Module, Callable[[], float], int]:
    """Build infini-transformer-pytorch with the delta rule. Its memory is never detached in the sequence. Returns as `ours`."""
    from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

    model = InfiniTransformer(
        num_tokens=VOCABULARY, dim=WIDTH, depth=LAYERS, dim_head=HEAD_WIDTH, heads=HEADS, use_mem_delta_rule=True
    )
    wrapper = InfiniTransformerWrapper(model, segment_length=SEGMENT, detach_mems_every_num_segments=SEGMENTS + 1)
    tokens = torch.randint(0, VOCABULARY, (1, SEGMENT * SEGMENTS + 1))
    return wrapper, lambda: float(wrapper(tokens, backward=True)), LAYERS * HEADS * HEAD_WIDTH * (HEAD_WIDTH + 1)


def recurrent_memory(replay: bool = False, **settings: Any) -> tuple[nn.Module, Callable[[], float], int]:
    """Build recurrent-memory-transformer-pytorch. Returns as `ours`.

    Args:
        replay: recompute segments in the backward pass, as the package does.
    """
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

    model = RecurrentMemoryTransformer(
        num_tokens=VOCABULARY,
        dim=WIDTH,
        depth=LAYERS,
        dim_head=HEAD_WIDTH,
        heads=HEADS,
        seq_len=SEGMENT,
        num_memory_tokens=MEMORY_TOKENS,
        abs_pos_emb=False,
        rotary_pos_emb=True,
        **settings,
    )
    wrapper = RecurrentMemoryTransformerWrapper(model)
    tokens = torch.randint(0, VOCABULARY, (1, SEGMENT * SEGMENTS + 1))

    def forward_backward() -> float:
        if replay:
            return float(wrapper(tokens, memory_replay_backprop=True))
        loss, _ = wrapper(tokens, return_loss=True)
        loss.backward()
        return float(loss)

    return wrapper, forward_backward, MEMORY_TOKENS * WIDTH


def one(contender: str) -> dict[str, Any]:
    """Measure one pass, after a first pass that allocates memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, settings = CONTENDERS[contender]
    builders: dict[str, Callable[..., tuple[nn.Module, Callable[[], float], int]]] = {
        "ours": ours,
        "infini_transformer": infini_transformer,
        "recurrent_memory": recurrent_memory,
    }
    module, forward_backward, state = builders[kind](**settings)
    before = current_megabytes()
    loss = forward_backward()
    module.zero_grad()
    started = time.process_time()
    forward_backward()
    return {
        "seconds": time.process_time() - started,
        "peak_mb": peak_megabytes(),
        "above_mb": peak_megabytes() - before,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "state": state,
        "loss": loss,
    }


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """Return medians over the rounds. Each round measures every model, each in its own process.

    Raises:
        SystemExit: the packages to compare with are not installed.
    """
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} not found; install the extra: pip install -c constraints.txt -e '.[bench]'")
    pairs = [(allocator, name) for allocator in ALLOCATORS for name in CONTENDERS]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in pairs}
    for _ in range(ROUNDS):
        for allocator, name in pairs:
            result = in_own_process("benchmarks.peers", returns_memory=ALLOCATORS[allocator], contender=name)
            found[allocator, name].append(result)
    rows = [
        {
            "freed memory": allocator,
            "contender": name,
            "seconds": median(result["seconds"] for result in results),
            "slowest / fastest": max(result["seconds"] for result in results) / min(result["seconds"] for result in results),
            "peak MB": median(result["peak_mb"] for result in results),
            "above start MB": median(result["above_mb"] for result in results),
            "parameters": results[0]["parameters"],
            "state": results[0]["state"],
            "first loss": results[0]["loss"],
        }
        for (allocator, name), results in found.items()
    ]
    return rows, conclusions(rows)


def conclusions(rows: list[dict[str, Any]]) -> list[str]:
    """Return time and memory of each variant of this package as fractions of each peer's values."""
    by_name = {(row["freed memory"], row["contender"]): row for row in rows}
    lines = []
    for allocator in ALLOCATORS:
        for peer in PEERS:
            for name in OURS:
                mine, other = by_name[allocator, name], by_name[allocator, peer]
                shares = {key: mine[key] / other[key] for key in ("seconds", "peak MB", "above start MB")}
                lines.append(
                    f"freed memory {allocator}: {name} takes {shares['seconds']:.2f} of {peer}'s time, {shares['peak MB']:.2f} "
                    f"of its peak memory, {shares['above start MB']:.2f} of its increase in memory during a pass"
                )
    return lines
