"""Ranks by world size, and a small prepared corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infini_train.config import RunConfig
from infini_train.data.preparation import prepare
from tests.support.corpus import small_run, write_corpus
from tests.support.distributed.processes import Ranks
from tests.support.warm.interpreter import warm_python


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    with warm_python():
        yield


@pytest.fixture(scope="session")
def pool() -> Callable[[int], Ranks]:
    """A function from world size to ranks."""
    return Ranks


@pytest.fixture(scope="session")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A tiny model on a small corpus whose documents end in the middle of windows."""
    folder: Path = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "text")
    run = small_run(folder)
    prepare(run)
    return run
