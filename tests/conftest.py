"""Fixtures that several test files share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from slurm_cluster import SlurmCluster, missing

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A running SLURM of two nodes that share this machine's network; skips with the reason where none can start."""
    if reason := missing():
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster
