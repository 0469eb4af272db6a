"""Conversion of a folder written by transformers' `save_pretrained` to weights, a tokenizer and a configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from infini_train.checkpoint.compatibility import FIXED_MODEL_KEYS
from infini_train.checkpoint.weights_file import write_weights_file
from infini_train.config import DataConfig, ModelConfig, RunConfig, dump_keys
from infini_train.convert.llama import GLOBAL_NAMES, LAYER_NAMES, llama_shapes, merge_weights, model_config, read_positive_int
from infini_train.runtime.errors import UserError
from infini_train.tokenizers.tokenizer import TOKENIZER_FILES, Tokenizer, tokenizer_file
from infini_train.tokenizers.tokenizer_file import read_tokenizer

WEIGHTS_FILE = "weights.safetensors"
CONFIG_FILE = "config.yaml"
INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
FLOATING = ("F32", "F16", "BF16")
"""Supported weight types, named as in safetensors. Other types are quantized."""
BUFFERS = ("rotary_emb.inv_freq",)
"""Names of buffers that older versions of transformers saved with the weights. They are ignored."""


class PretrainedFolder:
    """Configuration and tensors of a transformers folder.

    Args:
        path: the folder.
        files: closes the opened safetensors files.

    Raises:
        UserError: a file is missing or cannot be read.
    """

    def __init__(self, path: Path, files: ExitStack) -> None:
        self.path = path
        self.config = _read_json(path / "config.json")
        self._file_of: dict[str, Any] = {}
        for name in self._file_names():
            try:
                file = files.enter_context(safe_open(path / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path / name} cannot be read as safetensors ({error}); get the file again") from error
            self._file_of |= dict.fromkeys(file.keys(), file)

    def _file_names(self) -> list[str]:
        if (self.path / INDEX).is_file():
            named = _read_json(self.path / INDEX).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(each, str) for each in named.values()):
                raise UserError(f"{self.path / INDEX} does not say which file holds which tensor; get the file again")
            return sorted(set(named.values()))
        if (self.path / ONE_FILE).is_file():
            return [ONE_FILE]
        raise UserError(
            f"--source {self.path} holds neither {ONE_FILE} nor {INDEX}; load the model with transformers and save it with "
            "save_pretrained, which writes them"
        )

    def check(self, model: ModelConfig, vocab_size: int) -> None:
        """Compare the folder's tensors with those of a Llama of this configuration.

        Raises:
            UserError: a tensor is unknown, missing, quantized or has another shape.
        """
        expected = llama_shapes(model, vocab_size)
        # A tied output matrix may also be stored.
        optional = {"lm_head.weight"} if model.tie_embeddings else set()
        for name in sorted(self._file_of.keys() - expected.keys() - optional):
            if not name.endswith(BUFFERS):
                raise UserError(f"--source {self.path} holds {name}, which a Llama does not have; it cannot be converted")
        for name, shape in expected.items():
            if name not in self._file_of:
                raise UserError(f"--source {self.path} lacks {name}; get its files again")
            if (found := tuple(self._file_of[name].get_slice(name).get_shape())) != shape:
                raise UserError(f"--source {self.path}: {name} is {list(found)}, but config.json makes it {list(shape)}")
            if (kind := self._file_of[name].get_slice(name).get_dtype()) not in FLOATING:
                raise UserError(
                    f"--source {self.path}: {name} is stored as {kind}; only {', '.join(FLOATING)} can be converted"
                )

    def tensor(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)


def convert_from(source: Path, folder: Path, final: Path) -> list[str]:
    """Write weights, tokenizer and configuration.

    Args:
        source: folder with config.json, safetensors files, and tokenizer.model or tokenizer.json.
        folder: folder to write to.
        final: final path of that folder, which the written configuration refers to.

    Returns:
        Lines to print for the user.

    Raises:
        UserError: the model is not supported, or a file is missing or cannot be read.
    """
    with ExitStack() as files:
        pretrained = PretrainedFolder(source, files)
        model = model_config(pretrained.config, str(source / "config.json"))
        tokenizer = _tokenizer(source)
        rows = read_positive_int(pretrained.config, "vocab_size", str(source / "config.json"))
        if rows < tokenizer.vocab_size:
            raise UserError(
                f"{tokenizer.path} has {tokenizer.vocab_size} tokens, but the model's vocab_size is {rows}; it is "
                "not the tokenizer of this model"
            )
        pretrained.check(model, rows)
        weights = dict(_weights(pretrained, model, tokenizer.vocab_size))
        # The weights were trained without a memory, so record local attention. A run with a memory initializes its gates.
        trained = RunConfig(model=replace(model, attention="local"), data=DataConfig(vocab_size=tokenizer.vocab_size))
        facts = {"step": 0, "config": asdict(trained), "tokenizer_fingerprint": tokenizer.fingerprint}
        write_weights_file(folder / WEIGHTS_FILE, weights, facts)
    written = tokenizer.copy_to(folder)
    (folder / CONFIG_FILE).write_text(
        _configuration(source, final, model, written.name, tokenizer.vocab_size), encoding="utf-8"
    )
    lines = [f"{final}: {sum(tensor.numel() for tensor in weights.values()):,} parameters of {source}"]
    if unused := rows - tokenizer.vocab_size:
        lines.append(f"left out: the last {unused} rows of the embedding and the output matrix, which have no tokens")
    return [*lines, f"next: infini-train prepare --config {final / CONFIG_FILE} --data.source YOUR_TEXT"]


def _tokenizer(source: Path) -> Tokenizer:
    path = tokenizer_file(source)
    if not path.is_file():
        raise UserError(f"--source {source} has no {' and no '.join(TOKENIZER_FILES)}; get its files again")
    return read_tokenizer(path)


def _weights(pretrained: PretrainedFolder, model: ModelConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs in GLOBAL_NAMES.items():
        if ours == "output_layer.weight" and model.tie_embeddings:
            continue
        tensor = pretrained.tensor(theirs)
        yield ours, tensor if ours == "decoder.final_layernorm.weight" else tensor[:vocab_size].contiguous()
    for layer in range(model.num_layers):
        for ours, several in LAYER_NAMES.items():
            tensors = [pretrained.tensor(f"model.layers.{layer}.{name}") for name in several]
            yield f"decoder.layers.{layer}.{ours}", merge_weights(ours, tensors, model.num_query_groups)


def _configuration(source: Path, final: Path, model: ModelConfig, tokenizer: str, vocab_size: int) -> str:
    run_dir = Path("runs") / final.name
    keys = {
        "run_dir": str(run_dir),
        # Write all keys, also defaults, because this file may override another configuration.
        "model": {
            name: getattr(model, name) for name in (*FIXED_MODEL_KEYS, "segment_length", "first_segment", "initial_gate")
        },
        "data": {
            "path": str(run_dir / "data"),
            "tokenizer": str(final.absolute() / tokenizer),
            "vocab_size": vocab_size,
        },
        "training": {"initial_weights": str(final.absolute() / WEIGHTS_FILE)},
    }
    return (
        f"# Continues training of {source.name} with a memory. Choose layout, batch, steps and learning rate yourself.\n"
        + dump_keys(keys)
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content
