"""How well each layer's memory keeps what was written into it, by age: measured while held-out text is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from infini_train import platform
from infini_train.attention.read_back import read_back_cosine, strength_of_writes
from infini_train.config import ModelConfig, RunConfig
from infini_train.model.stage import StageModel
from infini_train.parallel.layout import Layout

AGES = (0, 1, 2, 4, 8, 16, 32, 64)
"""Segments since a token was written; 0 is the segment that was written last."""


MOST_ROWS, MOST_TOKENS = 8, 16
"""What is looked at: so many of the run's rows, whatever process has them, and so many tokens of a segment, evenly spread. All
tokens of 65 segments of every layer would take more memory than the model."""


def spread(most: int, count: int) -> range:
    """At most so many of `count` numbers, evenly spread."""
    return range(0, count, -(-count // most))


class _Layer:
    """The newest segments of one layer, and what its memory gives back of them.

    Args:
        rows: of this process, those that are looked at.
    """

    def __init__(self, model: ModelConfig, rows: Sequence[int]) -> None:
        self.segment_length = model.segment_length
        self.rows = torch.tensor(rows, dtype=torch.int64)
        self.places = torch.tensor(spread(MOST_TOKENS, model.segment_length))
        self.cosine = partial(
            read_back_cosine, eps=model.memory_eps, normaliser=model.normaliser, feature_map=model.feature_map
        )
        self.write_gate: Tensor | None = None
        self.segments: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=AGES[-1] + 1)
        self.in_document: Tensor | None = None
        # Own key, key of another token, how many of either.
        self.sums = torch.zeros(len(AGES), 4, dtype=torch.float64)
        # Strength, how many.
        self.strength = torch.zeros(2, dtype=torch.float64)

    @torch.no_grad()
    def look(
        self, attention: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any], output: tuple[Tensor, Any]
    ) -> None:
        """After a forward of the layer's attention."""
        _, k, v = arguments
        reset, lengths = keywords["reset"].cpu(), keywords["lengths"].cpu()
        self._measure_strength(k, lengths)
        if self.in_document is None:
            self.in_document = torch.zeros(len(k), dtype=torch.int64)
        rows, places = self.rows.to(k.device), self.places.to(k.device)
        for segment in range(reset.shape[1]):
            # Copies: a view would keep what it is a part of.
            few = (x.index_select(0, rows).index_select(1, segment * self.segment_length + places) for x in (k, v))
            self.segments.append((*few, lengths[self.rows, segment]))
            self.in_document = torch.where(reset[:, segment], 0, self.in_document) + (lengths[:, segment] > 0)
        for position, age in enumerate(AGES):
            if age < len(self.segments):
                self._measure(position, age, type(output[1])(*(part.index_select(0, rows) for part in output[1])))

    def _measure(self, position: int, age: int, memory: Any) -> None:
        k, v, lengths = self.segments[-1 - age]
        assert self.in_document is not None
        valid = self.places < torch.where(self.in_document[self.rows] > age, lengths, 0)[:, None]
        if not valid.any():
            return
        own = self.cosine(k, v, memory).cpu()[valid].double()
        # Values have a direction in common, which any key reads; half a segment away stands a token of no relation, or padding.
        half = k.shape[1] // 2
        both = valid & valid.roll(half, dims=1)
        other = self.cosine(k.roll(half, dims=1), v, memory).cpu()[both].double()
        found = [own.sum(), other.sum(), own.numel(), other.numel()]
        self.sums[position] += torch.tensor(found, dtype=torch.float64)

    def _measure_strength(self, k: Tensor, lengths: Tensor) -> None:
        if self.write_gate is None:
            return
        valid = (torch.arange(self.segment_length) < lengths.unsqueeze(-1)).flatten(1)  # [B, T]
        written = strength_of_writes(k, self.write_gate).cpu()[valid].double()
        self.strength += torch.tensor([written.sum(), written.numel()], dtype=torch.float64)


class ReadBack(AbstractContextManager["ReadBack"]):
    """While entered, watches every layer of this process's stage. Entering is a collective.

    Not with context parallelism, where a process has a part of the segments only.
    """

    def __init__(self, run: RunConfig, layout: Layout, module: StageModel) -> None:
        self.run, self.layout = run, layout
        self.enabled = run.model.attention == "infini" and layout.cp_size == 1
        self.attentions = {layer.layer_number: layer.self_attention.core_attention.attention for layer in module.layers()}
        own = layout.rows(run.training.rows)
        rows = [row - own.start for row in spread(MOST_ROWS, run.training.rows) if row in own]
        self.layers = {number: _Layer(run.model, rows) for number in self.attentions}
        self.hooks: list[Any] = []

    def __enter__(self) -> ReadBack:
        if self.enabled:
            for number, attention in self.attentions.items():
                if (gate := attention.write_gate) is not None:
                    with deepspeed.zero.GatheredParameters(gate, enabled=self.run.layout.zero_stage == 3):
                        self.layers[number].write_gate = gate.detach().clone()
                self.hooks.append(attention.register_forward_hook(self.layers[number].look, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def result(self) -> dict[str, Any] | None:
        """A collective over all processes.

        Returns:
            ages (segments); own_key and other_key: mean cosine by age and layer, None where no document was so long;
            write_strength: mean by layer over tokens and heads, None where it is not learned. None for the whole where it
            cannot be measured.
        """
        if not self.enabled:
            return None
        model = self.run.model
        table = torch.zeros(model.num_layers, len(AGES), 4, dtype=torch.float64)
        strength = torch.zeros(model.num_layers, 2, dtype=torch.float64)
        for number, layer in self.layers.items():
            table[number - 1], strength[number - 1] = layer.sums, layer.strength
        table, strength = table.to(platform.device()), strength.to(platform.device())
        dist.all_reduce(table)
        dist.all_reduce(strength)
        counts = table[..., 2:]
        ages = [position for position in range(len(AGES)) if bool((counts[:, position] > 0).all())]
        means = (table[..., :2] / counts.clamp(min=1.0)).cpu()
        return {
            "ages": [AGES[position] for position in ages],
            "own_key": [means[:, position, 0].tolist() for position in ages],
            "other_key": [means[:, position, 1].tolist() for position in ages],
            "write_strength": (strength[:, 0] / strength[:, 1]).tolist() if model.write_strength == "learned" else None,
        }
