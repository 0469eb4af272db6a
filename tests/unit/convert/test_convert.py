"""One-line errors of `convert`, and its mapping of matrices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from infini_train.checkpoint.weights_file import write_weights_file
from infini_train.cli.main import main
from infini_train.config import ModelConfig
from infini_train.convert.llama import LAYER_NAMES, QKV, llama_shapes, merge_weights, model_config, split_weight
from infini_train.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 300,
}

LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["the quick brown fox jumps over the lazy dog " * 40], path, 290)
    return path


@pytest.fixture
def source(tmp_path: Path, tokenizer: Path) -> Path:
    """Write a folder as transformers does and return its path."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    shapes = llama_shapes(model_config(CONFIG, ""), CONFIG["vocab_size"])
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **changes})) and None


def stored(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    "change,words",
    [
        (configured(model_type="qwen2"), "model_type is qwen2; only llama and mistral"),
        (configured(attention_bias=True), "attention_bias is True"),
        (configured(hidden_act="gelu"), "hidden_act is gelu"),
        (configured(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor of its rotary embedding is None"),
        (
            configured(rope_scaling={**LLAMA_3_1, "high_freq_factor": 2}),
            "high_freq_factor of its rotary embedding is 2; only",
        ),
        (configured(rope_scaling={**LLAMA_3_1, "factor": 0.5}), "factor of its rotary embedding is 0.5; it must be at least 1"),
        (configured(rope_scaling={**LLAMA_3_1, "factor": None}), "factor is None; it must be a positive number"),
        (configured(rope_parameters={"rope_type": "yarn"}), "rotary embedding is scaled (yarn); only that of Llama 3"),
        (configured(hidden_size=None), "hidden_size is None"),
        (configured(num_attention_heads="many"), "num_attention_heads is 'many'"),
        (configured(rope_scaling="linear"), "rope_scaling is 'linear'; it must be an object"),
        (configured(quantization_config={"bits": 4}), "the model is quantized"),
        (
            stored(lambda tensors: tensors.update({NORM: torch.ones(12, dtype=torch.int8)})),
            f"{NORM} is stored as I8; only F32, F16, BF16",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": null}'),
            "does not say which file holds which tensor",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": ["b"]}}'),
            "does not say which file holds which tensor",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not a JSON object"),
        (lambda folder: (folder / "config.json").unlink(), "is neither a folder of Hugging Face transformers"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "has no tokenizer.model and no tokenizer.json"),
        (configured(vocab_size=200), "has 290 tokens, but the model's vocab_size is 200"),
        (lambda folder: (folder / "model.safetensors").unlink(), "save_pretrained"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "cannot be read as safetensors"),
        (stored(lambda tensors: tensors.pop(NORM)), f"lacks {NORM}"),
        (stored(lambda tensors: tensors.update({NORM: torch.ones(5)})), f"{NORM} is [5], but config.json makes it [12]"),
        (stored(lambda tensors: tensors.update({"model.layers.0.bias": torch.ones(5)})), "which a Llama does not have"),
    ],
)
def test_unsupported_models_are_refused_and_write_nothing(change, words, source, capsys):
    change(source)
    output = source.parent / "out"
    assert main(["convert", "--source", str(source), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1, error
    assert sorted(path.name for path in source.parent.iterdir()) == ["hf"]


def test_an_existing_output_is_refused_and_unchanged(source, capsys):
    output = source.parent / "out"
    output.mkdir()
    assert main(["convert", "--source", str(source), "--output", str(output)]) == 2
    assert "exists; name another folder" in capsys.readouterr().err
    assert not list(output.iterdir())


def test_a_partial_folder_of_a_killed_process_is_replaced(source, capsys):
    partial = source.parent / "out.partial"
    partial.mkdir()
    (partial / "old").write_text("")
    # Buffers that old versions of transformers saved are ignored.
    stored(lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))(source)
    assert main(["convert", "--source", str(source), "--output", str(source.parent / "out")]) == 0
    written = source.parent / "out"
    assert sorted(path.name for path in written.iterdir()) == ["config.yaml", "tokenizer.model", "weights.safetensors"]
    assert not partial.exists()
    assert "290" in (written / "config.yaml").read_text()
    assert len(load_file(written / "weights.safetensors")["output_layer.weight"]) == 290


@pytest.mark.parametrize("heads,groups,width", [(4, 2, 6), (3, 3, 2), (5, 1, 4)])
def test_split_inverts_merge_and_each_head_keeps_its_group(heads, groups, width):
    model = replace(model_config(CONFIG, ""), num_attention_heads=heads, num_query_groups=groups, head_dim=width)
    shapes = llama_shapes(model, 300)
    for ours, theirs in LAYER_NAMES.items():
        tensors = [torch.randn(shapes[f"model.layers.0.{name}"]) for name in theirs]
        whole = merge_weights(ours, tensors, groups)
        assert all(torch.equal(*pair) for pair in zip(split_weight(ours, whole, model), tensors, strict=True))
    # Megatron-core's order: queries, key and value of each group.
    q, k, v = (torch.arange(count * width)[:, None] + start for count, start in ((heads, 0), (groups, 1000), (groups, 2000)))
    rows = merge_weights(QKV, [q, k, v], groups).flatten().unflatten(0, (groups, heads // groups + 2, width))
    assert torch.equal(rows[:, -2].flatten(), k.flatten()) and torch.equal(rows[:, -1].flatten(), v.flatten())
    assert torch.equal(rows[:, :-2].flatten(), q.flatten())


def test_missing_keys_of_config_json_have_the_defaults_of_transformers():
    few = {key: value for key, value in CONFIG.items() if key not in ("num_key_value_heads", "head_dim", "rope_theta")}
    model = model_config({**few, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "")
    assert isinstance(model, ModelConfig)
    assert (model.num_query_groups, model.head_dim, model.rotary_base, model.tie_embeddings) == (4, 3, 5e5, False)
    assert model.rotary_scaling == 1.0
    scaled = {**few, "rope_theta": 5e5, "rope_scaling": LLAMA_3_1}
    assert (model_config(scaled, "").rotary_scaling, model_config(scaled, "").rotary_base) == (8.0, 5e5)
    assert (model.segment_length, model_config({**few, "max_position_embeddings": 8192}, "").segment_length) == (32, 2048)


def test_transformers_finds_custom_begin_and_end_tokens(tmp_path):
    path = tmp_path / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 40),
        model_prefix=str(path.with_suffix("")),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        bos_piece="<|startoftext|>",
        eos_piece="<|endoftext|>",
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(path)
    (tmp_path / "theirs").mkdir()
    tokenizer.write_for_transformers(tmp_path / "theirs")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert theirs("fox").input_ids == [tokenizer.bos_id, *tokenizer.encode("fox")]
    assert theirs.eos_token_id == tokenizer.eos_id and len(theirs) == tokenizer.vocab_size


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"attention": "window"}, "model.attention window, which differs from a Llama in every segment"),
        ({"short_convolution": 3}, "model.short_convolution 3"),
        (
            {"hidden_size": 40, "num_attention_heads": 6, "num_query_groups": 2},
            "hidden_size 40, which its 6 heads do not divide",
        ),
    ],
)
def test_weights_without_an_equal_llama_are_refused(changes, words, tmp_path, capsys):
    model = {"num_layers": 1, "hidden_size": 40, "num_attention_heads": 4, **changes}
    facts = {"step": 1, "config": {"model": model, "training": {}, "data": {}}, "tokenizer_fingerprint": ""}
    write_weights_file(tmp_path / "weights.safetensors", {"a": torch.ones(1)}, facts)
    assert main(["convert", "--source", str(tmp_path / "weights.safetensors"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
