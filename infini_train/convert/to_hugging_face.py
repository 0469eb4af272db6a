"""Conversion of trained weights to a folder that transformers loads as a Llama without a memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infini_train.checkpoint import folder as checkpoint_folder
from infini_train.checkpoint.inspection import read_model
from infini_train.checkpoint.weights_file import SUFFIX, read_weights_facts
from infini_train.config import ModelConfig
from infini_train.convert.llama import GLOBAL_NAMES, LAYER_NAMES, llama_config, split_weight
from infini_train.runtime.errors import UserError
from infini_train.tokenizers.tokenizer import Tokenizer, tokenizer_file
from infini_train.tokenizers.tokenizer_file import read_tokenizer

GATE = "self_attention.core_attention.attention.gate"


def convert_to(source: Path, folder: Path, final: Path) -> list[str]:
    """Write config.json, model.safetensors and, if it is found, the tokenizer.

    In the first segment of a document the memory is empty, so there the model is equal to a Llama. With
    `first_segment: paper`, the local attention output of each head is scaled by 1 - sigmoid(β). The written output projection
    includes this factor.

    Args:
        source: a checkpoint folder or a weights file.
        folder: folder to write to.
        final: final path of that folder, for messages.

    Returns:
        Lines to print for the user.

    Raises:
        UserError: the model differs from a Llama also in the first segment, or the source is damaged.
    """
    facts, weights = _read(source)
    saved = facts["config"]
    model = ModelConfig(**{name: value for name, value in saved["model"].items() if name in ModelConfig.__dataclass_fields__})
    _refuse_unsupported(model, source)
    training = saved["training"]
    context = model.segment_length * (training["segments_per_micro_batch"] if model.attention == "full" else 1)
    dtype = training["precision"]
    theirs = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in _theirs(weights, model)}
    tokenizer = _tokenizer(facts)
    config = llama_config(model, len(weights["embedding.word_embeddings.weight"]), context, dtype)
    if tokenizer is not None:
        config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        tokenizer.write_for_transformers(folder)
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors creates the file readable for its owner only
    _write_json(folder / "config.json", config)
    lines = [f"{final}: {sum(tensor.numel() for tensor in theirs.values()):,} parameters of step {facts['step']}, {dtype}"]
    if model.attention != "full":
        lines.append(f"in transformers it has no memory: it agrees with this model in the first {context} tokens of a document")
    if tokenizer is None:
        lines.append(
            f"data.path {saved['data']['path']} has no tokenizer of these weights; copy the tokenizer to {final} yourself"
        )
    return lines


def _refuse_unsupported(model: ModelConfig, source: Path) -> None:
    if model.attention not in ("infini", "local", "full"):
        raise UserError(
            f"--source {source} was trained with model.attention {model.attention}, which differs from a Llama in every "
            "segment; infini, local and full can be converted"
        )
    if model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"--source {source} has model.hidden_size {model.hidden_size}, which its {model.num_attention_heads} heads do not "
            "divide; transformers refuses such a Llama"
        )
    if model.short_convolution:
        raise UserError(
            f"--source {source} was trained with model.short_convolution {model.short_convolution}, which a Llama does not have"
        )


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if source.suffix == SUFFIX:
        return read_weights_facts(source, "--source"), load_file(source)
    return checkpoint_folder.read_state_file(source), read_model(source, by="convert")


def _theirs(weights: Mapping[str, Tensor], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs in GLOBAL_NAMES.items():
        if ours in weights:
            yield theirs, weights[ours]
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}."
        for ours, several in LAYER_NAMES.items():
            whole = weights[prefix + ours]
            if ours == "self_attention.linear_proj.weight" and model.attention == "infini" and model.first_segment == "paper":
                local = 1 - torch.sigmoid(weights[prefix + GATE].double())  # [H]
                whole = (whole.double() * local.repeat_interleave(model.head_dim)).float()  # [h, H D]
            for name, tensor in zip(several, split_weight(ours, whole, model), strict=True):
                yield f"model.layers.{layer}.{name}", tensor


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tokenizer(facts: Mapping[str, Any]) -> Tokenizer | None:
    path = tokenizer_file(Path(facts["config"]["data"]["path"]))
    tokenizer = read_tokenizer(path) if path.is_file() else None
    return tokenizer if tokenizer is not None and tokenizer.fingerprint == facts["tokenizer_fingerprint"] else None
