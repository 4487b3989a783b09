"""The processes of a run: found by a mark in their environment, ended with all that they left in shared memory."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

MARK = "LAUNCHER_RUN"  # environment variable that every process of a run inherits
SHARED_MEMORY = Path("/dev/shm")
GRACE_S = 3.0


def of_run(mark: str) -> list[psutil.Process]:
    """The living processes of a run, this one excepted."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark and _alive(process):
                found.append(process)
    return found


def _alive(process: psutil.Process) -> bool:
    return bool(process.status() != psutil.STATUS_ZOMBIE)


def end_run(mark: str) -> int:
    """End every process of a run: SIGTERM, after a grace SIGKILL, until none is left. Returns how many there were."""
    ended = set()
    deadline = time.monotonic() + GRACE_S
    while living := of_run(mark):
        for process in living:
            with contextlib.suppress(psutil.Error):
                if time.monotonic() > deadline:
                    process.kill()
                elif process.pid not in ended:
                    process.terminate()
            ended.add(process.pid)
        psutil.wait_procs(living, timeout=0.2)
    return len(ended)


def shared_memory_files() -> set[Path]:
    """All files in shared memory now."""
    return set(SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else set()


def shared_memory_of(pids: list[int]) -> set[Path]:
    """The files in shared memory that these processes have mapped or open."""
    found: set[Path] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                if f" {SHARED_MEMORY}/" in line:
                    found.add(Path(line.partition("/")[1] + line.partition("/")[2].removesuffix(" (deleted)")))
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = link.readlink()
                    if target.parent == SHARED_MEMORY:
                        found.add(target)
    return found


class SharedMemoryWatch:
    """Notes the files in shared memory that a run creates, so that they can be removed when its processes are gone.

    A file counts as the run's own where one of its processes has it mapped or open, and it was not there before.
    """

    def __init__(self) -> None:
        self._before = shared_memory_files()
        self._own: set[Path] = set()

    def look(self, pids: list[int]) -> None:
        """Note what these processes hold now."""
        self._own |= shared_memory_of(pids) - self._before

    def remove(self) -> list[Path]:
        """Remove what the run left behind; only after its processes have ended."""
        removed = []
        for path in self._own:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                path.unlink()
                removed.append(path)
        return removed
