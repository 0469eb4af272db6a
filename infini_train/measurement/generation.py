"""Streaming generation with caches of fixed size.

A cache holds the keys and values of the unfinished segment and the memory. Its size does not depend on the prompt length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from infini_train.config import RunConfig
from infini_train.model.gpt import DTYPES
from infini_train.model.layer_context import LayerContext
from infini_train.model.stage import StageModel
from infini_train.runtime import platform


class StreamingModel:
    """A model that reads token streams of any length, chunk by chunk.

    Args:
        module: the whole model (one pipeline stage) with its weights.
        batch_size: B, number of parallel streams.
    """

    def __init__(self, module: StageModel, run: RunConfig, batch_size: int = 1) -> None:
        self.module = module
        self.device = platform.device()
        dtype = DTYPES[run.training.precision]
        layers = {layer.layer_number: layer.self_attention.core_attention for layer in module.layers()}
        self.caches = {number: layer.new_cache(batch_size, dtype, self.device) for number, layer in layers.items()}
        self.position = 0
        """Tokens fed so far."""

    @torch.no_grad()
    def feed(self, tokens: Tensor, on_chunk: Callable[[int], None] | None = None) -> Iterator[Tensor]:
        """Feed tokens and yield their logits chunk by chunk. No chunk crosses the end of a segment.

        Args:
            tokens: [B, t] token ids.
            on_chunk: called after each chunk with the number of tokens fed so far.

        Yields:
            Logits [B, c, V] in float32 for a chunk of c tokens.
        """
        start = 0
        while start < tokens.shape[1]:
            room = next(iter(self.caches.values())).remaining
            chunk = tokens[:, start : start + room].to(self.device)
            context = LayerContext(caches=self.caches)
            logits = self.module(
                input_ids=chunk,
                position_ids=None,
                attention_mask=None,
                packed_seq_params=context,
                runtime_gather_output=True,
            )
            start += chunk.shape[1]
            self.position += chunk.shape[1]
            if on_chunk is not None:
                on_chunk(self.position)
            yield logits.float()


def sample_tokens(
    model: StreamingModel,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int,
    seed: int,
    stop_token: int,
    on_chunk: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """Yield the continuation of a prompt token by token, until `stop_token` or `max_new_tokens`.

    Args:
        prompt: token ids, at least one.
        temperature: 0 selects the most likely token.
        top_k: sample from the k most likely tokens; 0 samples from all tokens.
        seed: seed of the sampling.
        stop_token: generation ends before this token is yielded.
        on_chunk: called with the number of prompt tokens fed so far.
    """
    generator = torch.Generator().manual_seed(seed)
    last = torch.empty(0)
    for logits in model.feed(torch.tensor([prompt]), on_chunk):
        last = logits[0, -1].cpu()
    for _ in range(max_new_tokens):
        token = _choose(last, temperature, top_k, generator)
        if token == stop_token:
            return
        yield token
        for logits in model.feed(torch.tensor([[token]])):
            last = logits[0, -1].cpu()


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        smallest = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))
