"""Process pools by world size, and a small prepared corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infini_train.config import RunConfig
from infini_train.data.prepare import prepare
from tests.corpus import small_run, write_corpus
from tests.distributed.processes import ProcessPool


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], ProcessPool]]:
    """A function from world size to its pool; a pool that died is started anew."""
    pools: dict[int, ProcessPool] = {}

    def get(world_size: int) -> ProcessPool:
        if world_size not in pools or not pools[world_size].alive:
            pools[world_size] = ProcessPool(world_size)
        return pools[world_size]

    yield get
    for each in pools.values():
        each.close()


@pytest.fixture(scope="session")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A tiny model on a small corpus whose documents end in the middle of windows."""
    folder: Path = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "text")
    run = small_run(folder)
    prepare(run)
    return run
