"""Fixtures that several test files share."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from slurm_cluster import SlurmCluster, missing

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_configure() -> None:
    """A suite that was started in the background ignores SIGINT, and so would all that it starts."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A running SLURM of two nodes that share this machine's network; skips with the reason where none can start."""
    if reason := missing():
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster
