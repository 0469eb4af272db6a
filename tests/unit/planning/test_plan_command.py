"""Output of `infini-train plan`: refusals with suggested changes, ranked layouts, and the head comments of configs/."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from infini_train.cli.configuration import run_config
from infini_train.cli.main import main
from infini_train.cli.parser import parse
from infini_train.config.validation import validate
from infini_train.planning.layout_plan import plan
from infini_train.planning.plan_text import headline, layout_text
from infini_train.planning.search import layout_options, layouts, remedies, search
from tests.unit.planning.test_planning import large, with_layout, with_training

CONFIGS = Path(__file__).parents[3] / "configs"
PLANNED = re.compile(
    r"# Planned, not measured \(infini-train plan --config configs/(\S+) --gpus (\d+) --gpu (\S+)\):\n#   (.+)\n"
)


def load(path: Path, gpus: int, gpu: str, *options: str):
    return run_config(parse(["plan", "--config", str(path), "--gpus", str(gpus), "--gpu", gpu, *options]).plan)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_fits_and_its_head_quotes_the_plan(path):
    text = path.read_text(encoding="utf-8")
    found = PLANNED.search(text)
    if re.search(r"^# Hardware: .*no GPU", text, flags=re.MULTILINE):  # for CPU processes; fits on every GPU
        assert found is None
        assert plan(load(path, 2, "a100-40gb"), 2, "a100-40gb").fits
        return
    assert found is not None, "the head must quote the output of `plan`"
    assert found[1] == path.name
    gpus, gpu = int(found[2]), found[3]
    each = plan(load(path, gpus, gpu), gpus, gpu)
    assert each.fits
    assert found[4] == headline(each)
    assert f"# Hardware: {gpus} × {gpu}. Layout: {layout_text(each)}.\n" in text


def test_attention_without_planning_formulas_is_refused(capsys):
    command = ["plan", "--config", str(CONFIGS / "1b.yaml"), "--gpus", "8", "--gpu", "h100-80gb"]
    assert main([*command, "--model.attention", "transformer_xl"]) == 2
    assert "model.attention is transformer_xl, whose memory and time cannot be planned" in capsys.readouterr().err


def test_8b_has_the_geometry_of_llama_3_8b():
    model = load(CONFIGS / "8b.yaml", 64, "h100-80gb").model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (32, 4096, 32)
    assert (model.num_query_groups, model.head_dim, model.ffn_hidden_size) == (8, 128, 14336)


def test_streams_of_a_million_tokens_are_one_window():
    run = load(CONFIGS / "8b-1m.yaml", 64, "h100-80gb")
    assert run.training.micro_batches_per_window * run.micro_batch_tokens == 1_048_576
    assert run.model.segment_length == 2048


def test_paper_config_is_table_2_of_the_paper():
    run = load(CONFIGS / "paper.yaml", 8, "a100-80gb")
    model = run.model
    assert (model.num_layers, model.num_attention_heads, model.head_dim, model.ffn_hidden_size) == (12, 8, 128, 4096)
    assert (model.segment_length, run.training.rows) == (2048, 64)
    assert run.micro_batches_per_step * run.micro_batch_tokens == 32768


def test_the_output_has_every_category(capsys):
    assert main(["plan", "--config", str(CONFIGS / "8b-1m.yaml"), "--gpus", "64", "--gpu", "h100-80gb"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "planned, not measured (GB are 10^9 bytes)",
        "parameters            8,028,165,120",
        *("weights", "gradients", "optimizer", "activations", "memory states", "buffers", "32 in flight"),
        *("context   all_gather", "pipeline  send", "data      all_reduce", "NVLink", "network"),
        "the host launches it in",
        *("pipeline bubble", "MFU", "days", "assumed: "),
    ):
        assert words in printed, words


def test_output_says_when_the_host_limits_the_gpu(capsys):
    command = ["plan", "--config", str(CONFIGS / "1b.yaml"), "--gpus", "8", "--gpu", "h100-80gb"]
    assert main([*command, "--training.segments_per_micro_batch", "1", "--training.micro_batches_per_window", "16"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "computation" in line)
    assert re.search(r"held up by the host, the GPU alone would take \d\.\d{3}; larger micro-batches help", line)


def test_the_planning_page_shows_the_output(capsys):
    text = (CONFIGS.parent / "docs" / "planning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n\$ infini-train (plan [^\n]+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for command, shown in blocks:
        main(command.replace("configs/", f"{CONFIGS}/").split())
        captured = capsys.readouterr()
        assert captured.out + captured.err == shown


def refused(capsys, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_run_that_does_not_fit_is_refused_with_changes_that_make_it_fit(capsys):
    job = ["--config", str(CONFIGS / "8b.yaml"), "--gpu", "a100-40gb", "--training.recompute", "none"]
    line = refused(capsys, *job, "--gpus", "64")
    assert "has 36.0 GB to plan with (activations take" in line
    changes = line.split("it fits with ")[1].strip().split(", or ")
    assert changes
    for change in changes:
        # `--gpus 128` overrides --gpus 64; other changes add an option.
        assert main(["plan", *job, "--gpus", "64", *shlex.split(change)]) == 0, change
        capsys.readouterr()


def test_if_no_single_change_helps_a_whole_layout_is_suggested(capsys):
    job = ["--config", str(CONFIGS / "8b-1m.yaml"), "--gpu", "a100-40gb", "--training.recompute", "none"]
    job += ["--layout.context_parallel_size", "1", "--layout.pipeline_parallel_size", "1", "--gpus", "4"]
    change = refused(capsys, *job).split("it fits with ")[1].strip()
    assert change.startswith("--gpus 8 --layout.")
    assert main(["plan", *job, *shlex.split(change)]) == 0


def test_another_layout_on_the_same_gpus_is_suggested_before_more_gpus(capsys):
    job = ["--config", str(CONFIGS / "8b.yaml"), "--gpu", "h100-80gb", "--gpus", "16", "--training.recompute", "none"]
    layout, *_ = refused(capsys, *job).split("it fits with ")[1].strip().split(", or ")
    assert "--layout." in layout
    assert "--gpus" not in layout
    assert main(["plan", *job, *shlex.split(layout)]) == 0


def test_a_model_that_fits_on_no_gpu_is_refused(capsys):
    line = refused(capsys, "--gpu", "a100-40gb", "--gpus", "1", "--model.hidden_size", "4000000", "--model.num_layers", "1")
    assert "make the model smaller" in line


def test_unknown_gpu_and_invalid_counts_are_one_line_errors(capsys):
    assert "known are a100-40gb, a100-80gb, h100-80gb, h200-141gb" in refused(capsys, "--gpus", "8", "--gpu", "v100")
    assert "--gpus is 0" in refused(capsys, "--gpus", "0", "--gpu", "h100-80gb")
    assert "--rank is 8" in refused(capsys, "--gpus", "8", "--gpu", "h100-80gb", "--dry_run", "--rank", "8")


@pytest.mark.parametrize(
    ("option", "words"), [("zero_stage=3", "zero_stage is 3"), ("offload_optimizer=true", "offload_optimizer is true")]
)
def test_options_that_a_dry_run_does_not_support_are_refused(option, words, capsys):
    line = refused(capsys, "--gpus", "8", "--gpu", "h100-80gb", f"--layout.{option}", "--dry_run")
    assert f"layout.{words}" in line and "without --dry_run" in line


def test_search_returns_valid_layouts_that_fit_best_first():
    found = search(large(), 16, "a100-80gb", count=30)
    assert len(found) == 30
    for each in found:
        validate(each.sizes.run, 16)
        assert each.fits
        assert each.sizes.run.tokens_per_step == large().tokens_per_step
    best = found[0].time.total
    ranks = [int((each.time.total / best - 1) / 0.01) for each in found]
    assert ranks == sorted(ranks)


def test_search_leaves_out_invalid_layouts():
    """One row cannot be split, so only layouts with data-parallel size 1 are valid."""
    run = large(rows=1)
    assert {each.sizes.dp for each in search(run, 16, "a100-80gb", count=100)} == {1}
    tried = list(layouts(run, 16, 8))
    assert any(16 // each.layout.model_processes > 1 for each in tried)


@pytest.mark.parametrize(
    "options",
    [
        # Segments per micro-batch that are not a power of two, or more than 16.
        "--training.segments_per_micro_batch 3 --training.micro_batches_per_window 3",
        "--training.segments_per_micro_batch 9 --training.micro_batches_per_window 1 --training.rows 8",
        "--training.segments_per_micro_batch 32 --training.micro_batches_per_window 1 --training.rows 1 "
        "--layout.context_parallel_size 8",
    ],
)
def test_search_is_not_slower_than_the_own_layout_of_the_run(options: str) -> None:
    run = load(CONFIGS / "1b.yaml", 8, "h100-80gb", "--training.recompute", "none", *options.split())
    own, first = plan(run, 8, "h100-80gb"), search(run, 8, "h100-80gb", count=1)[0]
    assert own.fits
    assert first.time.total < own.time.total * 1.01


def test_search_tries_each_layout_once():
    run = large(segments_per_micro_batch=3, micro_batches_per_window=4, recompute="layer", recompute_layers=2)
    for each in (
        run,
        with_layout(run, tensor_parallel_size=2),
        with_layout(run, tensor_parallel_size=2, sequence_parallel=True),
    ):
        tried = [str(other) for other in layouts(each, 8, 8)]
        assert len(tried) == len(set(tried))
        assert str(with_training(each, recompute_layers=0)) in tried
        assert {other.training.segments_per_micro_batch for other in layouts(each, 8, 8)} == {1, 2, 3, 4, 6, 12}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--gpus 96", "training.rows is 64, which a data-parallel size of 3, 6, 12, 24, 48 or 96 does not divide;"),
        ("--gpus 7", "training.rows is 64, which a data-parallel size of 7 does not divide;"),
        ("--gpus 36 --gpu a100-40gb --model.num_layers 36", "36.0 GB may be planned; in others training.rows is 64, which"),
        ("--gpus 4", "of 249 valid ones the smallest needs 164.0 GB, and 72.0 GB may be planned;"),
    ],
)
def test_a_search_without_result_says_why_and_suggests_changes(options: str, words: str, capsys: pytest.CaptureFixture[str]):
    job = ["--config", str(CONFIGS / "8b.yaml"), "--gpu", "h100-80gb", "--search", *options.split()]
    line = refused(capsys, *job)
    assert words in line
    changes = line.split("layouts fit with ")[1].strip().split(", or ")
    assert changes
    for change in changes:
        assert main(["plan", *job, *shlex.split(change)]) == 0, change
        capsys.readouterr()


def test_a_search_without_valid_layout_repeats_the_validation_error(capsys: pytest.CaptureFixture[str]):
    line = refused(
        capsys,
        "--gpus",
        "3",
        "--gpu",
        "h100-80gb",
        "--search",
        "--layout.offload_optimizer",
        "true",
        "--training.precision",
        "bfloat16",
    )
    assert "no layout of this run works on 3 GPUs; of the simplest: layout.offload_optimizer is true with" in line


def test_a_search_for_a_model_that_fits_on_no_gpu(capsys: pytest.CaptureFixture[str]):
    line = refused(
        capsys, "--gpu", "a100-40gb", "--gpus", "1", "--search", "--model.hidden_size", "4000000", "--model.num_layers", "1"
    )
    assert line.endswith("; make the model smaller\n")


@pytest.mark.parametrize(("config", "gpus"), [("1b", 8), ("8b", 64)])
def test_search_prints_options_that_give_the_first_layout(config: str, gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    """This also holds if the best layout has another tensor-parallel size than the configuration."""
    path = CONFIGS / f"{config}.yaml"
    job = ["plan", "--config", str(path), "--gpus", str(gpus), "--gpu", "h100-80gb"]
    assert main([*job, "--search", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    options = lines[-1].removeprefix("the first: ").split()
    first = search(load(path, gpus, "h100-80gb"), gpus, "h100-80gb", count=1)[0]
    again = plan(load(path, gpus, "h100-80gb", *options), gpus, "h100-80gb")
    assert again.sizes.run.layout == first.sizes.run.layout
    assert again.time.total == first.time.total


def test_search_recomputes_as_few_layers_as_fit() -> None:
    found = [each for each in search(large(rows=8), 8, "a100-40gb", count=1000) if each.sizes.run.training.recompute == "layer"]
    some = [each for each in found if each.sizes.recomputed_chunk_layers < each.sizes.chunk_layers]
    assert some and len(some) < len(found)
    for each in found:
        assert each.fits
        layers = each.sizes.recomputed_chunk_layers
        fewer = with_training(each.sizes.run, recompute_layers=layers - 1)
        if layers > 1:
            assert not plan(fewer, 8, "a100-40gb").fits
        everywhere = plan(with_training(each.sizes.run, recompute_layers=0), 8, "a100-40gb")
        assert (each.time.total < everywhere.time.total) is (layers < each.sizes.chunk_layers)


def test_too_few_recomputed_layers_are_refused_with_the_smallest_number_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--config", str(CONFIGS / "1b.yaml"), "--gpu", "h100-80gb", "--gpus", "4"]
    changes = refused(capsys, *job, "--training.recompute_layers", "1").split("it fits with ")[1].strip().split(", or ")
    assert changes[0].startswith("--training.recompute_layers ")
    for change in changes:
        assert main(["plan", *job, "--training.recompute_layers", "1", *shlex.split(change)]) == 0, change
        capsys.readouterr()
    fewer = int(changes[0].split()[1]) - 1
    refused(capsys, *job, "--training.recompute_layers", str(fewer))


def test_recompute_is_suggested_also_if_the_run_has_too_few_recompute_layers(capsys: pytest.CaptureFixture[str]) -> None:
    """configs/8b.yaml recomputes 27 layers, which does not fit on 32 GPUs."""
    job = ["--config", str(CONFIGS / "8b.yaml"), "--gpu", "h100-80gb", "--gpus", "32", "--training.recompute", "none"]
    for change in refused(capsys, *job).split("it fits with ")[1].strip().split(", or "):
        assert main(["plan", *job, *shlex.split(change)]) == 0, change
        capsys.readouterr()


def test_zero_stage_is_suggested_in_float32():
    run = large(rows=8, precision="float32", recompute="stage")
    run = with_layout(replace(run, model=replace(run.model, num_layers=32)), zero_stage=0)
    each = plan(run, 8, "a100-40gb")
    assert not each.fits
    assert "--layout.zero_stage 1" in remedies(each)


def test_options_leave_out_unchanged_keys():
    run = large()
    changed = with_training(with_layout(run, tensor_parallel_size=2, sequence_parallel=True), recompute="stage")
    each = plan(changed, 8, "h100-80gb")
    assert layout_options(each, changed) == []
    assert layout_options(each, run) == [
        "--layout.tensor_parallel_size 2",
        "--layout.sequence_parallel true",
        "--training.recompute stage",
    ]
    back = ["--layout.tensor_parallel_size 1", "--layout.sequence_parallel false", "--training.recompute none"]
    assert layout_options(plan(run, 8, "h100-80gb"), changed) == back
