"""The ranks of one machine as forks of one process."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from running import ROOT, run

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("torch")

# The ranks share one output, and an unbuffered print would write a line in pieces, so each line is a single write.
RANK = """
import os, sys, torch.distributed as dist
from datetime import timedelta
os.write(1, f"imported by {os.getpid()}\\n".encode())
def main(argument):
    rank = int(os.environ["RANK"])
    if argument == "fails" and rank == 1:
        os._exit(3)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timedelta(seconds=60))
    store.set(f"rank_{rank}", os.environ["LOCAL_RANK"])
    store.wait([f"rank_{other}" for other in range(int(os.environ["WORLD_SIZE"]))])
    if argument == "fails":
        store.wait(["never"])
    os.write(1, f"parent {os.getppid()}\\n".encode())
if __name__ == "__main__":
    main(sys.argv[1])
"""

OPEN_DRIVER = """
import os, sys
if "launcher.launch.forks" in sys.orig_argv:
    real = os.readlink
    os.readlink = lambda path: "/dev/nvidia-uvm" if str(path).endswith("/0") else real(path)
"""


@pytest.mark.slow
def test_forks_share_their_imports_and_meet(tmp_path: Path) -> None:
    (tmp_path / "a_rank.py").write_text(RANK)
    command = [sys.executable, "-m", "launcher.launch.forks", "3", "a_rank", "works"]
    ended = run(command, PYTHONPATH=f"{tmp_path}:{ROOT}")
    words = ended.out.split("\n")[:-1]
    assert (ended.code, ended.err) == (0, "")
    starter = words[0].removeprefix("imported by ")
    assert words == [f"imported by {starter}", *[f"parent {starter}"] * 3]


@pytest.mark.slow
def test_the_first_rank_that_fails_ends_the_others_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "a_rank.py").write_text(RANK)
    command = [sys.executable, "-m", "launcher.launch.forks", "3", "a_rank", "fails"]
    ended = run(command, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert ended.code == 1
    assert ended.err.splitlines()[-1] == "rank 1 ended with exit code 3"
    assert "parent" not in ended.out


@pytest.mark.slow
def test_a_fork_of_a_process_that_uses_cuda_begins_anew(tmp_path: Path) -> None:
    """If imports have opened the CUDA driver, which does not survive a fork, each rank is a new interpreter."""
    (tmp_path / "a_rank.py").write_text(RANK)
    (tmp_path / "sitecustomize.py").write_text(OPEN_DRIVER)
    command = [sys.executable, "-m", "launcher.launch.forks", "2", "a_rank", "works"]
    ended = run(command, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (ended.code, ended.err) == (0, "")
    pids = [line for line in ended.out.splitlines() if line.startswith("imported by")]
    assert len(set(pids)) == len(pids) == 3
