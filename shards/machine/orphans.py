"""A signal from the kernel to a process when its parent ends (Linux), even if the process is stopped or does not listen
yet."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def signal_when_orphaned(number: int) -> None:
    """Have the kernel send this process a signal as soon as its parent ends."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def before_exec(number: int) -> Callable[[], None]:
    """A `preexec_fn` for children of this process: the kernel sends them the signal when this process ends, for
    whatever reason.

    If this process ends before the child has asked for the signal, the child exits.
    """
    parent = os.getpid()

    def prepare() -> None:
        signal_when_orphaned(number)
        if os.getppid() != parent:
            os._exit(1)

    return prepare
