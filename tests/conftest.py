"""Fixtures that several test files share."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from slurm_cluster import SlurmCluster, missing

if TYPE_CHECKING:
    from collections.abc import Iterator


TOGETHER = {
    "test_slurm.py": "slurm",  # one cluster serves both
    "test_slurm_cluster.py": "slurm",
    "test_backend_vllm.py": "vllm",  # under torchrun, its shared memory has a fixed name
    "test_contract.py": "vllm",
}


@pytest.hookimpl(tryfirst=True)  # before xdist takes note of the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers the tests of a file stay on one, and those that mostly wait for SLURM begin first."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(TOGETHER.get(item.path.name, item.path.name)))
    order = ["slurm", "vllm"]
    items.sort(key=lambda item: [*order, TOGETHER.get(item.path.name)].index(TOGETHER.get(item.path.name)))


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
