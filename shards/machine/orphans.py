"""The kernel tells a process of its parent's end (Linux): also one that is stopped, or that has not begun to listen."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PR_SET_PDEATHSIG = 1


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
