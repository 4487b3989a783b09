"""The kernel tells a process of its parent's end (Linux): also one that is stopped, or that has not begun to listen."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PR_SET_PDEATHSIG = 1

MARKS = (
    "TORCHELASTIC_RUN_ID", "CROSS_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID",
)  # fmt: skip
"""Variables that a launcher sets for its ranks, and does not have itself."""


def signal_when_orphaned(number: int) -> None:
    """Have this process sent a signal as soon as its parent ends."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def before_exec(number: int) -> Callable[[], None]:
    """For `preexec_fn` of a child of this process: it is sent the signal when this process ends, however it does.

    A child of which this process has ended before that ends too.
    """
    parent = os.getpid()

    def prepare() -> None:
        signal_when_orphaned(number)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def starter_of(environ: Mapping[str, str]) -> int | None:
    """The process that started this rank and others here: torchrun's agent, say; None where nobody is known to have.

    Not a shell between them: it would outlive who started it.
    """
    marks = {name: environ[name] for name in MARKS if name in environ}
    if not marks:
        return None
    pid = os.getppid()
    with contextlib.suppress(psutil.Error):
        while marks.items() <= psutil.Process(pid).environ().items():
            pid = psutil.Process(pid).ppid()
    return pid
