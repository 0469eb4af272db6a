"""Every layout computes the same run: loss, global gradient norm, all weights and all memory against one process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from infini_train.attention import ATTENTION_VARIANTS
from infini_train.config import LayoutConfig, RunConfig
from infini_train.data.dataset import TokenDataset
from infini_train.model.flops import linear_parameters
from infini_train.reference.plain_model import train_plainly
from tests.support.corpus import small_run
from tests.support.distributed.assemble import global_memory, global_weights
from tests.support.distributed.cases import Case, pairwise_cases

STEPS = 4
RELATIVE = 1e-5

# The layouts that the documents name, each with the default options.
NAMED = [
    Case(tp=2),
    Case(pp=2),
    Case(dp=2),
    Case(tp=2, pp=2),
    Case(pp=2, dp=2),
    Case(cp=2),
    Case(dp=2, zero=3),
    Case(tp=2, sequence_parallel=True),
    Case(recompute="layer", rule="delta"),
    Case(pp=2, cp=2, recompute="layer 1", rule="delta"),
    Case(pp=2, recompute="stage"),
    Case(pp=2, virtual=2),
    Case(pp=2, virtual=2, zero=2, window=(2, 4)),
    Case(cp=4, window=(4, 1), rule="delta"),
]
CASES = list(dict.fromkeys([*NAMED, *pairwise_cases(small_run(Path("unused")))]))


def with_layout(run: RunConfig, tp: int, pp: int, zero: int) -> RunConfig:
    return replace(run, layout=LayoutConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp, zero_stage=zero))


def assert_same_run(results: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    one = reference[0]
    for result in results:
        assert result["loss"] == pytest.approx(one["loss"], rel=RELATIVE)
        assert result["grad_norm"] == pytest.approx(one["grad_norm"], rel=RELATIVE)
    initial, expected_initial = global_weights(results, "initial"), global_weights(reference, "initial")
    weights, expected = global_weights(results), global_weights(reference)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(initial[name], expected_initial[name]), f"initial {name} depends on the layout"
        torch.testing.assert_close(weights[name], value, rtol=RELATIVE, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    memory, expected_memory = global_memory(results), global_memory(reference)
    assert memory.keys() == expected_memory.keys()
    for layer, states in expected_memory.items():
        for ours, theirs in zip(memory[layer], states, strict=True):
            # Entries of M are sums of terms of both signs, so the scale is the largest entry.
            difference = float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), 1e-30)
            assert difference < RELATIVE, f"memory of layer {layer} differs by {difference}"


@pytest.fixture(scope="module")
def reference(pool, run_config):
    """Return a cached function from a case to the results of one process (ZeRO-1, no recomputation)."""

    @cache
    def compute(case: Case) -> list[dict[str, Any]]:
        return pool(1).run("tests.support.distributed.jobs", "train", case.apply(run_config), STEPS)

    return compute


def test_clipping_and_resets_are_active(reference, run_config):
    """The comparisons below need clipped gradients and documents that end inside windows."""
    result = reference(Case().reference())[0]
    assert min(result["grad_norm"]) > run_config.optimizer.clip_grad_norm
    _, positions = result["positions"]
    assert positions[:, :2].sum() > 0, "no row has begun a second document"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layout_equals_one_process(case, pool, reference, run_config):
    results = pool(case.processes).run("tests.support.distributed.jobs", "train", case.apply(run_config), STEPS)
    assert_same_run(results, reference(case.reference()))


@pytest.mark.parametrize(
    "case,reach",
    [
        (Case(tp=2, sequence_parallel=True, dp=2, zero=2, rule="delta", ageing=40), "document"),
        (Case(cp=2, pp=2, recompute="layer", rule="delta"), "document"),
        (Case(cp=4, window=(4, 1), rule="delta"), "document"),
        (Case(cp=2, pp=2, recompute="layer", rule="delta"), "segment"),
        (Case(dp=2, zero=3, recompute="stage", rule="delta", ageing=40), "segment"),
        (Case(cp=2, zero=3, rule="delta"), "document"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_options_beyond_the_paper_in_every_kind_of_layout(case, reach, pool, run_config):
    beyond = replace(
        run_config.model,
        write_strength="learned",
        normaliser="corrected",
        feature_map="softmax",
        short_convolution=3,
        short_convolution_reach=reach,
    )
    run = replace(run_config, model=beyond)
    one = pool(1).run("tests.support.distributed.jobs", "train", case.reference().apply(run), STEPS)
    assert_same_run(pool(case.processes).run("tests.support.distributed.jobs", "train", case.apply(run), STEPS), one)
    gates = {name: value for name, value in global_weights(one).items() if name.endswith("write_gate")}
    assert len(gates) == run.model.num_layers and all(value.abs().max() > 1e-3 for value in gates.values())


RIVALS = sorted(set(ATTENTION_VARIANTS) - {"infini"})


@pytest.mark.parametrize("attention", RIVALS)
def test_rivals_train_in_the_same_pipeline(attention, pool, run_config):
    """One process equals plain torch; tensor and pipeline parallelism with recomputation equal one process."""
    training = replace(run_config.training, segments_per_micro_batch=2, micro_batches_per_window=2)
    # The bank is smaller than the documents.
    model = replace(run_config.model, attention=attention, bank_tokens=40, bank_top_k=5, memory_tokens=5, initial_gate=0.3)
    run = replace(run_config, model=model, training=training)
    one = pool(1).run("tests.support.distributed.jobs", "train", run, STEPS)
    plain = train_plainly(run, TokenDataset(Path(run.data.path), "train"), global_weights(one, "initial"), STEPS)
    assert one[0]["loss"] == pytest.approx(plain["loss"], rel=RELATIVE)
    assert one[0]["grad_norm"] == pytest.approx(plain["grad_norm"], rel=RELATIVE)
    weights = global_weights(one)
    for name, value in plain["weights"].items():
        torch.testing.assert_close(weights[name], value, rtol=RELATIVE, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    stages = 1 if attention in ("memorizing", "recurrent_memory") else 2
    recompute = "stage" if attention in ("feedback", "recurrent_memory") else "layer"
    many = with_layout(replace(run, training=replace(training, recompute=recompute)), 2, stages, 1)
    assert_same_run(pool(2 * stages).run("tests.support.distributed.jobs", "train", many, STEPS), one)


@pytest.mark.parametrize("stages,virtual,window", [(4, 2, (1, 4)), (2, 4, (1, 2)), (4, 2, (1, 3))])
def test_virtual_stages_of_a_deeper_model(stages, virtual, window, pool, run_config):
    """The cases cover middle stages, several rounds, and windows that are not a multiple of the number of stages."""
    run = replace(run_config, model=replace(run_config.model, num_layers=8))
    one = pool(1).run("tests.support.distributed.jobs", "train", Case(window=window).apply(run), STEPS)
    case = Case(pp=stages, virtual=virtual, window=window)
    assert_same_run(pool(stages).run("tests.support.distributed.jobs", "train", case.apply(run), STEPS), one)


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_window_of_micro_batches_equals_one_large_micro_batch(rule, pool, run_config):
    """Gradients through the memory between micro-batches are exact, so splitting a window does not change a step."""
    run = replace(run_config, model=replace(run_config.model, update_rule=rule))
    whole = replace(run.training, segments_per_micro_batch=4, micro_batches_per_window=1)
    split = pool(1).run("tests.support.distributed.jobs", "train", run, STEPS)
    together = pool(1).run("tests.support.distributed.jobs", "train", replace(run, training=whole), STEPS)
    assert_same_run(split, together)


def test_truncation_matters(pool, run_config):
    """Half the window gives different gradients, so the test above would detect a lost memory gradient."""
    shorter = replace(run_config.training, micro_batches_per_window=2, windows_per_step=4)
    one = pool(1).run("tests.support.distributed.jobs", "train", run_config, 1)[0]
    two = pool(1).run("tests.support.distributed.jobs", "train", replace(run_config, training=shorter), 1)[0]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert one["grad_norm"] != pytest.approx(two["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("layout", [(1, 1, 2), (2, 1, 1)], ids=lambda layout: "tp{}-pp{}-dp{}".format(*layout))
def test_tied_embeddings(layout, pool, run_config):
    tp, pp, dp = layout
    run = replace(run_config, model=replace(run_config.model, tie_embeddings=True))
    one = pool(1).run("tests.support.distributed.jobs", "train", run, STEPS)
    assert not any("output_layer" in name for name in one[0]["weights"])
    results = pool(tp * pp * dp).run("tests.support.distributed.jobs", "train", with_layout(run, tp, pp, 1), STEPS)
    assert_same_run(results, one)


BFLOAT16 = [
    Case(tp=2),
    Case(dp=2),
    Case(pp=2, dp=2),
    Case(cp=2, rule="delta"),
    Case(tp=2, sequence_parallel=True, recompute="layer"),
    Case(pp=2, virtual=2, recompute="stage"),
]


@pytest.mark.parametrize("case", BFLOAT16, ids=lambda case: case.name)
def test_bfloat16_stays_near_bfloat16_in_one_process(case, pool, run_config):
    """Gradients accumulate in float32, so only the rounding of activations differs.

    Adam amplifies these differences where gradients are small, so the tolerance is large. A gradient that is counted twice or
    not at all would still exceed it.
    """
    run = replace(run_config, training=replace(run_config.training, precision="bfloat16"))
    one = pool(1).run("tests.support.distributed.jobs", "train", case.reference().apply(run), STEPS)
    results = pool(case.processes).run("tests.support.distributed.jobs", "train", case.apply(run), STEPS)
    for result in results:
        assert result["loss"] == pytest.approx(one[0]["loss"], rel=1e-3)
        assert result["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-2)
    initial, weights = global_weights(one, "initial"), global_weights(results)
    for name, value in global_weights(one).items():
        apart, change = float((weights[name] - value).norm()), float((value - initial[name]).norm())
        assert apart <= 0.2 * change, f"{name} differs by {apart / change:.2g} of its change"
    memory = global_memory(results)
    for layer, states in global_memory(one).items():
        for ours, theirs in zip(memory[layer], states, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 0.02, f"memory of layer {layer}"


def test_bfloat16_stays_near_float32(pool, reference, run_config):
    """The bfloat16 path agrees with float32, and not only with itself in other layouts."""
    run = replace(run_config, training=replace(run_config.training, precision="bfloat16"))
    result = pool(1).run("tests.support.distributed.jobs", "train", run, STEPS)[0]
    assert result["loss"] == pytest.approx(reference(Case(window=(1, 4)))[0]["loss"], rel=5e-3)
    assert result["grad_norm"] == pytest.approx(reference(Case(window=(1, 4)))[0]["grad_norm"], rel=5e-2)
    for _, _, matrix, _ in result["memory"].values():
        assert matrix.dtype == torch.float32


def test_flop_formula_counts_the_models_own_matrices(pool, run_config):
    """The linear parameters of the MFU formula equal those of the built model."""
    weights = global_weights(pool(1).run("tests.support.distributed.jobs", "train", run_config, 1))
    matrices = {name: value.numel() for name, value in weights.items() if value.ndim == 2}
    embedding = matrices.pop("embedding.word_embeddings.weight")
    assert embedding == run_config.data.vocab_size * run_config.model.hidden_size
    assert linear_parameters(run_config) == sum(matrices.values())


def test_logits_never_exist_for_a_whole_micro_batch(pool, run_config):
    """The output layer processes at most loss_chunk_tokens positions of a row at a time, in forward and backward."""
    run = Case(tp=2, loss_chunk=13).apply(run_config)
    for positions in pool(2).run("tests.support.distributed.jobs", "output_layer_positions", run):
        assert set(positions) == {13, 32 - 2 * 13}
        assert len(positions) == 2 * 3 * run.micro_batches_per_step


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_offloaded_optimizer(zero, pool, reference, run_config):
    case = Case(dp=2, zero=zero)
    run = case.apply(run_config)
    run = replace(run, layout=replace(run.layout, offload_optimizer=True))
    assert_same_run(pool(2).run("tests.support.distributed.jobs", "train", run, STEPS), reference(case.reference()))
