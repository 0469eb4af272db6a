from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.slurm.cluster import PROGRAMS, SlurmCluster
from tests.support.slurm.requirement import require_programs


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[SlurmCluster]:
    require_programs(*PROGRAMS)
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def cluster(shared_cluster: SlurmCluster) -> SlurmCluster:
    return shared_cluster


@pytest.fixture(autouse=True)
def _healed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Repair the cluster and end its jobs after every test."""
    yield
    if "shared_cluster" in request.fixturenames:
        request.getfixturevalue("shared_cluster").heal()
