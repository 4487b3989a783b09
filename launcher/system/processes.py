"""Find the processes of a run by a mark in their environment, and end them."""

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
GRACE_S = 3.0


def of_run(mark: str, variable: str = MARK) -> list[psutil.Process]:
    """The running processes of a run, of this user and without this process; ValueError for an invalid mark.

    Another environment `variable` finds processes that are marked by that one.
    """
    if not isinstance(mark, str) or not MARK_FORM.fullmatch(mark):
        raise ValueError(f"{mark!r} is no mark of a run")
    user, living = os.getuid(), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.uids().real != user:
                continue
            if process.environ().get(variable) == mark and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def end_run(mark: str, variable: str = MARK, grace_s: float = GRACE_S) -> int:
    """End every process of a run: SIGTERM, then SIGKILL after a grace period, until none is left; returns their
    number."""
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


def scratch_prefix(mark: str) -> str:
    """The prefix of a run's scratch folders in the temporary directory."""
    return f"launcher_{hashlib.sha256(mark.encode()).hexdigest()[:12]}_"


def remove_scratch(mark: str) -> None:
    """Remove the scratch folders of a run's engines from the temporary directory."""
    for folder in Path(tempfile.gettempdir()).glob(f"{scratch_prefix(mark)}*"):
        shutil.rmtree(folder, ignore_errors=True)
