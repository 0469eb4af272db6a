"""Held-out loss with the memory of another row: definition, edge cases, and equality in every layout."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infini_kernels import MemoryState
from infini_train.attention import MemoryWithTail
from infini_train.data.preparation import prepare
from infini_train.measurement.perplexity import memory_of_other_rows
from tests.support.corpus import small_run, write_corpus
from tests.support.distributed.cases import Case

JOB = ("tests.support.distributed.jobs", "held_out_losses")


def test_rows_take_the_memory_of_the_next_row_that_has_one():
    filled = torch.tensor([1.0, 0.0, 2.0, 3.0])
    memory = {7: MemoryState(filled.view(4, 1, 1, 1).expand(4, 1, 2, 2), filled.view(4, 1, 1).expand(4, 1, 2))}
    shuffled, rows = memory_of_other_rows(memory, 4)
    assert shuffled[7].M[:, 0, 0, 0].tolist() == shuffled[7].z[:, 0, 0].tolist() == [2.0, 2.0, 3.0, 1.0]
    assert rows.tolist() == [True] * 4
    alone = {7: MemoryState(memory[7].M[:2], memory[7].z[:2])}
    shuffled, rows = memory_of_other_rows(alone, 2)
    assert shuffled[7].z[:, 0, 0].tolist() == [1.0, 1.0] and rows.tolist() == [False, True]
    shuffled, rows = memory_of_other_rows(memory, 4, torch.tensor([True, True, False, True]))
    assert shuffled[7].z[:, 0, 0].tolist() == [3.0, 3.0, 3.0, 1.0], "a row whose document has ended gives no memory"
    assert memory_of_other_rows({}, 2)[1].tolist() == [False, False]


def test_convolution_tails_stay_with_their_row():
    """A convolution tail holds the newest tokens of its row. An ended row has a tail of padding and no memory."""
    filled, tail = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([5.0, 6.0, 7.0]).view(3, 1, 1, 1, 1)
    memory = {1: MemoryWithTail(filled.view(3, 1, 1, 1), filled.view(3, 1, 1), tail)}
    shuffled, rows = memory_of_other_rows(memory, 3)
    assert shuffled[1].M.flatten().tolist() == shuffled[1].z.flatten().tolist() == [2.0, 1.0, 1.0]
    assert torch.equal(shuffled[1].tail, tail) and rows.tolist() == [True] * 3


def test_ended_rows_give_no_memory_with_any_attention(pool, run_config):
    """Key caches and memory tokens store the padding of an ended row. Without a row to read from, no token counts."""
    counted = {}
    for attention in ("infini", "linear", "transformer_xl", "recurrent_memory"):
        run = replace(run_config, model=replace(run_config.model, attention=attention))
        counted[attention] = pool(1).run(*JOB, run, 1)[0]["shuffled"].tokens
    for attention, tokens in counted.items():
        np.testing.assert_array_equal(tokens, counted["infini"], err_msg=attention)


def test_emptied_and_shuffled_memory_change_nothing_with_closed_gates(pool, run_config):
    """Closed gates hide the memory. The convolution context across segment borders must not count as memory."""
    model = replace(run_config.model, initial_gate=-60.0, short_convolution=3, short_convolution_reach="document")
    optimizer = replace(run_config.optimizer, gate_learning_rate=1e-12)
    rows = replace(run_config.training, rows=2)
    found = pool(1).run(*JOB, replace(run_config, model=model, optimizer=optimizer, training=rows), 1)[0]
    np.testing.assert_allclose(found["emptied"].loss_sum, found["kept"].loss_sum, rtol=1e-6)
    both = (found["shuffled"].tokens == found["kept"].tokens) & (found["kept"].tokens > 0)
    assert both.sum() > 3, "some segments have all their tokens measured with shuffled memory"
    np.testing.assert_allclose(found["shuffled"].loss_sum[both], found["kept"].loss_sum[both], rtol=1e-6)
    assert found["shuffled"].own_loss == pytest.approx(found["shuffled"].loss, rel=1e-6), "own_loss covers the same tokens"
    assert found["shuffled"].loss != pytest.approx(found["kept"].loss, rel=1e-6), "the kept loss covers other tokens"


@pytest.mark.parametrize(
    "case",
    [Case(pp=2, window=(4, 1)), Case(tp=2), Case(cp=2, rule="delta"), Case(pp=2, virtual=2, tp=2, sequence_parallel=True)],
    ids=lambda case: case.name,
)
def test_every_layout_measures_the_same(case, pool, run_config):
    """Micro-batches have one segment, except with cp=2, where each rank needs one."""
    one = replace(case.reference(), cp=1)
    expected = pool(1).run(*JOB, one.apply(run_config), case.cp)[0]
    for found in pool(case.processes).run(*JOB, case.apply(run_config), case.cp):
        for memory in ("kept", "emptied", "shuffled"):
            np.testing.assert_array_equal(found[memory].tokens, expected[memory].tokens)
            np.testing.assert_allclose(found[memory].loss_sum, expected[memory].loss_sum, rtol=1e-5, atol=1e-6)


def test_shuffling_changes_the_loss_unless_rows_read_equal_documents(pool, run_config, tmp_path):
    """The model is trained, so its memory matters. Then the held-out documents come in equal pairs, one in each row."""
    rows = replace(run_config, training=replace(run_config.training, rows=2))
    found = pool(1).run(*JOB, rows, 1)[0]
    kept, shuffled = found["kept"], found["shuffled"]
    assert abs(found["emptied"].loss_sum - kept.loss_sum)[1:].max() > 1e-3, "memory is read from the second segment on"
    assert shuffled.tokens[0] < kept.tokens[0] and 0 < shuffled.tokens[1:].sum() <= kept.tokens[1:].sum()
    both = shuffled.tokens == kept.tokens
    both[0] = False
    assert both.any() and not np.allclose(shuffled.loss_sum[both], kept.loss_sum[both], rtol=1e-4)
    np.testing.assert_allclose(shuffled.own_loss_sum[both], kept.loss_sum[both], rtol=1e-5)

    write_corpus(tmp_path / "text")
    for path in sorted((tmp_path / "text").iterdir()):
        shutil.copy(path, path.with_name(f"{path.stem} again.txt"))
    pairs = small_run(Path(tmp_path))
    prepare(pairs)
    found = pool(1).run(*JOB, replace(pairs, training=replace(pairs.training, rows=2)), 1)[0]
    kept, shuffled = found["kept"], found["shuffled"]
    later = slice(1, None)
    np.testing.assert_array_equal(shuffled.tokens[later], kept.tokens[later])
    np.testing.assert_allclose(shuffled.loss_sum[later], kept.loss_sum[later], rtol=1e-6)


def test_the_own_memory_of_a_row_is_carried_on_unread(pool, run_config):
    run = replace(run_config, training=replace(run_config.training, rows=2, segments_per_micro_batch=1))
    ((by_hand, found),) = pool(1).run("tests.support.distributed.jobs", "shuffled_by_hand", run)
    assert by_hand > 0 and found == pytest.approx(by_hand, rel=1e-6)
