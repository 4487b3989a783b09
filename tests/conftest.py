"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest
import running
from slurm_cluster import SlurmCluster, missing

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


FIRST = (
    "test_slurm.py", "test_contract.py", "test_endpoint.py", "test_watchdog.py", "test_network.py",
    "test_backend_vllm.py", "test_faults.py", "test_planned_measured.py", "test_resume.py", "test_check_gpu.py",
    "test_growth.py", "test_quantize.py", "test_fuzz.py", "test_any_model.py",
)  # fmt: skip
"""Files that take long, those that wait beside those that compute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_collection_finish() -> None:
    """Leave what was collected, thousands of tests and their modules, out of all later searches for garbage; give torch
    one thread, for models that are too small for two, which would wait for each other."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--warm", action="store_true", help="fork commands from an interpreter that has imported packages")


def pytest_configure(config: pytest.Config) -> None:
    """One thread for the tests' own models, which are small: the threads of two workers would wait for each other's.

    A suite that was started in the background ignores SIGINT, and so would all that it starts.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    running.is_warm = config.getoption("warm")
    sys.dont_write_bytecode = False  # the tests start hundreds of interpreters, which would all compile our modules
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Take back what a test and the packages that it imports have set in the environment: other tests' processes would
    inherit it."""
    before = dict(os.environ)
    result = yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)
    return result


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A running SLURM of two nodes that share this machine's network; skips with the reason where none can start."""
    if reason := missing():
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster
