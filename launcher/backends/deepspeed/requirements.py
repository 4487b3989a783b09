"""Requirements of DeepSpeed's shared-memory all-reduce: a compiler (once) and space in /dev/shm. No torch."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from shards.machine.shared_memory import missing_room

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig

OPERATION = "deepspeed_shm_comm"
SEGMENT_BYTES = 69_206_024
"""Allocated by each rank of the all-reduce. Source: allreduce_workspace in csrc/cpu/comm/shm.cpp."""


def slow_all_reduce(config: RunConfig, on_cuda: bool) -> list[str]:
    """One note if the ranks of one node cannot reduce through shared memory; otherwise none."""
    if on_cuda or config.devices == 1 or config.num_nodes > 1:
        return []
    reason = None
    if config.backend.python is None and not (extensions_folder() / OPERATION / f"{OPERATION}.so").is_file():
        reason = missing_compiler()
    reason = reason or missing_shared_memory(config.devices)
    if reason is None:
        return []
    return [f"DeepSpeed's ranks reduce over gloo, two to three times slower: {reason}"]


def extensions_folder() -> Path:
    """The folder in which the all-reduce is compiled: in this virtual environment, else in the user's cache.

    It is named by version, since code that was compiled for one torch crashes under another, and not shared with other
    environments: their ninja would rebuild it, and their locks would outlive them.
    """
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    root = Path.home() / ".cache"
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        root = Path(sys.prefix)
    return root / "torch_extensions" / f"torch-{version('torch')}_deepspeed-{version('deepspeed')}"


def missing_compiler() -> str | None:
    """The tool that is missing to compile the all-reduce; None if nothing is."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler):
        return None
    return f"no {compiler} here to compile its shared-memory all-reduce with (apt install g++)"


def missing_shared_memory(ranks: int) -> str | None:
    """The space that /dev/shm lacks for the ranks of this node; None if it has enough."""
    return missing_room(ranks, SEGMENT_BYTES)
