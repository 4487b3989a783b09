"""The processes of a run: found by a mark in their environment, ended with all that they left in shared memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

import psutil

MARK = "LAUNCHER_RUN"  # environment variable that every process of a run inherits
MARK_FORM = re.compile(r"[0-9a-f]{32}(-[0-9a-f]+-[0-9a-f]+)?")
SHARED_MEMORY = Path("/dev/shm")
GRACE_S = 3.0


def of_run(mark: str, variable: str = MARK) -> list[psutil.Process]:
    """The living processes of a run of this user, this one excepted; ValueError for what is no mark.

    Another `variable` marks something else in the same way.
    """
    if not isinstance(mark, str) or not MARK_FORM.fullmatch(mark):
        raise ValueError(f"{mark!r} is no mark of a run")
    user, found = os.getuid(), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_own = process.pid != os.getpid() and process.uids().real == user
            if is_own and process.environ().get(variable) == mark and _alive(process):
                found.append(process)
    return found


def _alive(process: psutil.Process) -> bool:
    return bool(process.status() != psutil.STATUS_ZOMBIE)


def end_run(mark: str, variable: str = MARK, grace_s: float = GRACE_S) -> int:
    """End every process of a run: SIGTERM, after a grace SIGKILL, until none is left. Returns how many there were."""
    ended = set()
    deadline = time.monotonic() + grace_s
    while living := of_run(mark, variable):
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
    """The files in shared memory that these processes have mapped or open.

    Told by inode: who creates a semaphore has it mapped under its first, deleted name.
    """
    files: dict[int, Path] = {}
    for path in shared_memory_files():
        with contextlib.suppress(FileNotFoundError):
            files[path.stat().st_ino] = path
    held: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            held |= _mapped(pid) | _open(pid)
    return {path for inode, path in files.items() if inode in held}


def _mapped(pid: int) -> set[int]:
    lines = (line.split(None, 5) for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines())
    return {int(line[4]) for line in lines if len(line) == 6 and line[5].startswith(f"{SHARED_MEMORY}/")}


def _open(pid: int) -> set[int]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if link.readlink().parent == SHARED_MEMORY:
                found.add(link.stat().st_ino)
    return found


def scratch_prefix(mark: str) -> str:
    """How the scratch folders of a run in the temporary directory begin."""
    return f"launcher_{hashlib.sha256(mark.encode()).hexdigest()[:12]}_"


def remove_scratch(mark: str) -> None:
    """Remove the scratch folders that engines of a run have named after it in the temporary directory."""
    for folder in Path(tempfile.gettempdir()).glob(f"{scratch_prefix(mark)}*"):
        shutil.rmtree(folder, ignore_errors=True)


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
