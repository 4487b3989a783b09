"""A heartbeat while an engine loads in one long call that reports no progress."""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BEAT_S = 2.0
READING = 1 << 20  # bytes read between two beats that count as work
COMPUTING = 0.2  # busy cores between two beats that count as work
COMPUTING_S = 1800.0  # seconds of computing that count as work: compiling ends, waiting for a GPU may spin for ever


@dataclass(frozen=True, slots=True)
class Work:
    """The work of processes since they started: bytes read (by system calls and by mapped pages) and CPU seconds."""

    read_bytes: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.read_bytes + other.read_bytes, self.cpu_s + other.cpu_s)


class Activity:
    """Distinguishes working processes from idle ones by the work done since the last sample."""

    def __init__(self, now: float, done: dict[int, Work]) -> None:
        self.last_look = self.last_read = now
        self.before = done

    def look(self, now: float, done: dict[int, Work]) -> bool:
        """True if some process has worked since the last sample."""
        work = sum(done.values(), Work())
        known = sum((self.before[pid] for pid in done if pid in self.before), Work())
        elapsed, self.last_look, self.before = now - self.last_look, now, done
        if work.read_bytes - known.read_bytes >= READING:
            self.last_read = now
            return True
        return work.cpu_s - known.cpu_s >= COMPUTING * elapsed and now - self.last_read <= COMPUTING_S


@contextlib.contextmanager
def heartbeat(beat: Callable[[], object]) -> Iterator[None]:
    """Call `beat` regularly from another thread inside this context, as long as this process or a child of it works."""
    over = threading.Event()

    def beat_while_working() -> None:
        activity = Activity(time.monotonic(), work_of_tree())
        while not over.wait(BEAT_S):
            if activity.look(time.monotonic(), work_of_tree()):
                beat()

    thread = threading.Thread(target=beat_while_working, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def work_of_tree() -> dict[int, Work]:
    """The work of this process and its children by process id, without those that end meanwhile."""
    parent = psutil.Process()
    work = {}
    for process in (parent, *parent.children(recursive=True)):
        with contextlib.suppress(psutil.Error, OSError):
            times = process.cpu_times()
            # Bytes read by system calls, if they are visible, plus pages of mapped files that came from a disk.
            major_faults = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[9])
            read_bytes = float(major_faults * mmap.PAGESIZE)
            with contextlib.suppress(psutil.AccessDenied):
                read_bytes += process.io_counters().read_chars
            work[process.pid] = Work(read_bytes, times.user + times.system)
    return work
