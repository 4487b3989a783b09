"""The lock of a run directory, held by the process that launches the run."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context that locks a run directory; UserError if another process holds the lock. The lock also ends with the
    process. On file systems without locks it has no effect."""
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is running: another process has launched it.", "wait for its end") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)
