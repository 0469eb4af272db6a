"""The examples of docs/extending.md run with the code as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser, Namespace

from infini_train.attention import Attention
from infini_train.config import ModelConfig
from infini_train.runtime.errors import UserError
from infini_train.tasks.draws import Draws
from infini_train.tasks.stories import KEY_INTRODUCTION, Story

PAGE = Path(__file__).parents[3] / "docs" / "extending.md"


def example(defines: str) -> dict[str, Any]:
    """Run the example that defines a name, and return its namespace."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    (code,) = (block for block in blocks if re.search(rf"^(def|class) {defines}\b", block, flags=re.MULTILINE))
    namespace: dict[str, Any] = {
        **{"torch": torch, "Attention": Attention, "Draws": Draws, "Story": Story, "KEY_INTRODUCTION": KEY_INTRODUCTION},
        **{
            "Sequence": Sequence,
            "ArgumentParser": ArgumentParser,
            "Namespace": Namespace,
            "Path": Path,
            "UserError": UserError,
        },
    }
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace


def test_every_example_is_valid_python():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        compile(block, str(PAGE), "exec")


def test_the_attention_trains_and_streams():
    model = ModelConfig(segment_length=4, num_attention_heads=4, num_query_groups=2, head_dim=6)
    attention = example("MeanAttention")["MeanAttention"](model, 4, 2, 8)
    q, k, v = (torch.randn(1, 8, heads, 6) for heads in (4, 2, 2))
    whole = {"reset": torch.zeros(1, 2, dtype=torch.bool), "lengths": torch.full((1, 2), 4), "memory": None}
    out, memory = attention(q, k, v, **whole)
    assert memory is None and out.shape == (1, 8, 4, 6)
    for position in range(8):
        start = position - position % 4
        mean = v[:, start : position + 1].mean(dim=1).repeat_interleave(2, dim=1)
        torch.testing.assert_close(out[:, position], mean)
    cache, streamed = attention.new_cache(1, torch.float32, torch.device("cpu")), []
    for position in range(8):
        place = slice(position, position + 1)
        step, cache = attention.step(q[:, place], k[:, place], v[:, place], cache)
        streamed.append(step)
    torch.testing.assert_close(torch.cat(streamed, dim=1), out)


def test_the_story_asks_for_its_needle():
    story = example("reversed_key")["reversed_key"](Draws(3), 1, 5, ())
    assert len(story.answer) == 5 and story.answer[::-1] in story.needle


def test_the_command_prints_the_last_metrics(tmp_path, capsys):
    command = example("run_command")
    parser = ArgumentParser(exit_on_error=False)
    command["add_arguments"](parser)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        command["run_command"](parser.parse_args([str(tmp_path)]))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n', encoding="utf-8")
    assert command["run_command"](parser.parse_args([str(tmp_path)])) == 0
    assert capsys.readouterr().out == '{"step": 2}\n'
