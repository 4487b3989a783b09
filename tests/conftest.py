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
"""Files that take long. Those that mostly wait alternate with those that compute, since they run side by side."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, so that no worker still runs one when the others have finished."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_collection_finish() -> None:
    """Exclude the collected tests and modules, thousands of objects, from later garbage collections. Give torch one
    thread: the models are too small for two."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--warm", action="store_true", help="fork commands from an interpreter that has imported packages")


def pytest_configure(config: pytest.Config) -> None:
    """Set one thread for the tests' models, which are small: the threads of several workers would wait for each other.

    Restores the handler of SIGINT: a suite that was started in the background ignores it, and so would its children.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    running.is_warm = config.getoption("warm")
    sys.dont_write_bytecode = False  # otherwise each of the hundreds of interpreters would compile our modules again
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Undo changes of the environment by a test and the packages that it imports, which the processes of later tests
    would inherit."""
    before = dict(os.environ)
    result = yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)
    return result


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A running SLURM of two nodes that share this machine's network; skips with the reason if none can start."""
    if reason := missing():
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster
