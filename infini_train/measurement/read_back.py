"""Read-back accuracy: how well the memory of each layer retrieves stored values, by age, measured on held-out text."""

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

from infini_train.attention.read_back_cosine import read_back_cosine, strength_of_writes
from infini_train.config import ModelConfig, RunConfig
from infini_train.model.stage import StageModel
from infini_train.parallel.layout import Layout
from infini_train.runtime import platform

AGES = (0, 1, 2, 4, 8, 16, 32, 64)
"""Ages in segments since a token was written. 0 is the segment written last."""

MOST_ROWS, MOST_TOKENS = 8, 16
"""Largest number of sampled rows of the run (over all processes) and of sampled tokens of a segment, both evenly spaced.
Keys and values of all tokens of 65 segments of every layer would need more bytes than the model."""


def evenly_spaced(most: int, count: int) -> range:
    """Return at most `most` evenly spaced indices below `count`."""
    return range(0, count, -(-count // most))


class _Layer:
    """Sampled keys and values of the newest segments of one layer, and sums of their read-back cosines.

    Args:
        rows: indices of the sampled rows of this process.
    """

    def __init__(self, model: ModelConfig, rows: Sequence[int]) -> None:
        self.segment_length = model.segment_length
        self.rows = torch.tensor(rows, dtype=torch.int64)
        self.places = torch.tensor(evenly_spaced(MOST_TOKENS, model.segment_length))
        self.cosine = partial(
            read_back_cosine, eps=model.memory_eps, normaliser=model.normaliser, feature_map=model.feature_map
        )
        self.write_gate: Tensor | None = None
        self.segments: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=AGES[-1] + 1)
        self.in_document: Tensor | None = None
        # By age: sum of cosines with the own key and with the key of another token, then the counts of both.
        self.sums = torch.zeros(len(AGES), 4, dtype=torch.float64)
        # Sum and count of write strengths.
        self.strength = torch.zeros(2, dtype=torch.float64)

    @torch.no_grad()
    def observe(
        self, attention: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any], output: tuple[Tensor, Any]
    ) -> None:
        """Forward hook of the attention of this layer: store the new segments and measure the memory after them."""
        _, k, v = arguments
        reset, lengths = keywords["reset"].cpu(), keywords["lengths"].cpu()
        self._measure_strength(k, lengths)
        if self.in_document is None:
            self.in_document = torch.zeros(len(k), dtype=torch.int64)
        rows, places = self.rows.to(k.device), self.places.to(k.device)
        for segment in range(reset.shape[1]):
            # index_select copies. A view would keep the whole tensor of keys and values alive.
            few = (x.index_select(0, rows).index_select(1, segment * self.segment_length + places) for x in (k, v))
            self.segments.append((*few, lengths[self.rows, segment]))
            self.in_document = torch.where(reset[:, segment], 0, self.in_document) + (lengths[:, segment] > 0)
        for position, age in enumerate(AGES):
            if age < len(self.segments):
                self._measure(position, age, type(output[1])(*(tensor.index_select(0, rows) for tensor in output[1])))

    def _measure(self, position: int, age: int, memory: Any) -> None:
        k, v, lengths = self.segments[-1 - age]
        assert self.in_document is not None
        valid = self.places < torch.where(self.in_document[self.rows] > age, lengths, 0)[:, None]
        if not valid.any():
            return
        own = self.cosine(k, v, memory).cpu()[valid].double()
        # All values share a common direction, which any key retrieves. The baseline is therefore the key of an unrelated token,
        # half a segment away. Pairs with padding do not count.
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
    """Context manager that measures read-back accuracy in every layer of this process's stage. Entering is a collective.

    Disabled with context parallelism, because a process then holds only some of the segments.
    """

    def __init__(self, run: RunConfig, layout: Layout, module: StageModel) -> None:
        self.run, self.layout = run, layout
        self.enabled = run.model.attention == "infini" and layout.cp_size == 1
        self.attentions = {layer.layer_number: layer.self_attention.core_attention.attention for layer in module.layers()}
        own = layout.rows(run.training.rows)
        rows = [row - own.start for row in evenly_spaced(MOST_ROWS, run.training.rows) if row in own]
        self.layers = {number: _Layer(run.model, rows) for number in self.attentions}
        self.hooks: list[Any] = []

    def __enter__(self) -> ReadBack:
        if self.enabled:
            for number, attention in self.attentions.items():
                if (gate := attention.write_gate) is not None:
                    with deepspeed.zero.GatheredParameters(gate, enabled=self.run.layout.zero_stage == 3):
                        self.layers[number].write_gate = gate.detach().clone()
                self.hooks.append(attention.register_forward_hook(self.layers[number].observe, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def result(self) -> dict[str, Any] | None:
        """Combine the measurements of all processes. A collective.

        Returns:
            None if read-back cannot be measured, otherwise a dictionary:

            - ages: the ages in segments that occurred in the documents.
            - own_key, other_key: mean cosine by age and layer.
            - write_strength: mean over tokens and heads by layer; None if it is not learned.
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
