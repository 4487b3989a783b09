"""A thread in each rank that acts where the main thread cannot: on signals, hangs, the end of the launching process."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import psutil

from launcher.verdict import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

ON_TERM = "LAUNCHER_ON_TERM"  # "interrupt": SIGTERM is a notice to stop, as from a scheduler that takes the node back
EXIT_CODES = {"cancelled": 143, "interrupted": 75}  # as a shell reports SIGTERM; EX_TEMPFAIL: go on later
INTERRUPT_S = 20.0  # from SIGUSR1 to the end of the rank, at the latest
TERM_S = 3.0  # the same from SIGTERM: who sends it kills soon after
GONE = Outcome("failed", "the launching process is gone")


@dataclass(frozen=True, slots=True)
class Watched:
    """What the guard of a rank calls. None of these runs in the main thread.

    `interrupt(reason)` asks the main thread to end once what it does is saved, and says whether that can be soon;
    `end(outcome, parent_is_gone)` leaves the rank's last word; `look()` is how the rank should end now, if it should.
    """

    interrupt: Callable[[str], bool]
    end: Callable[[Outcome, bool], None]
    look: Callable[[], Outcome | None] | None = None
    look_s: float = 1.0


def start(watched_pid: int | None, watched: Watched, term_interrupts: bool = False) -> None:
    """From now on these end the process tree, in this order of patience:

    SIGTERM, SIGINT and the end of `watched_pid` at once; SIGUSR1 (and with `term_interrupts` SIGTERM) as soon as the
    main thread has saved its batch, but after a few seconds at the latest.

    The signal's own handler would have to wait for the main thread, which may be blocked in a collective for ever.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    guard = _Guard(read_end, watched, term_interrupts)
    threading.Thread(target=guard.run, args=(watched_pid,), daemon=True, name="guard").start()


class _Guard:
    def __init__(self, signals: int, watched: Watched, term_interrupts: bool) -> None:
        self.signals, self.watched, self.term_interrupts = signals, watched, term_interrupts
        self.deadline: float | None = None
        self.reason = ""
        self.parent: int | None = None  # a file descriptor that can be read once the watched process has ended

    def run(self, watched_pid: int | None) -> None:
        if watched_pid is not None:
            try:
                self.parent = os.pidfd_open(watched_pid)
            except ProcessLookupError:
                self._end(GONE)
        sources = [self.signals] if self.parent is None else [self.signals, self.parent]
        while True:
            ready, _, _ = select.select(sources, [], [], self._patience())
            if self.parent in ready:
                self._end(GONE)
            for number in os.read(self.signals, 64) if ready else b"":
                self._on_signal(number)
            if self.deadline is not None and time.monotonic() >= self.deadline:
                self._end(Outcome("interrupted", self.reason))
            if self.watched.look and (outcome := self.watched.look()):
                self._end(outcome)

    def _patience(self) -> float | None:
        """Seconds until there is something to see to; None: nothing but signals."""
        looks = [self.watched.look_s] if self.watched.look else []
        left = [max(self.deadline - time.monotonic(), 0.0)] if self.deadline is not None else []
        return min(looks + left, default=None)

    def _on_signal(self, number: int) -> None:
        if number not in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            return
        is_notice = number == signal.SIGUSR1 or (number == signal.SIGTERM and self.term_interrupts)
        reason = f"received {signal.Signals(number).name}"
        if self.deadline is None and not is_notice:
            self._end(Outcome("cancelled", reason))
        if self.deadline is None:
            self.reason = reason
            soon = self.watched.interrupt(reason)
            self.deadline = time.monotonic() + (INTERRUPT_S if soon else 0.0)
        if number != signal.SIGUSR1:
            self.deadline = min(self.deadline, time.monotonic() + TERM_S)

    def _end(self, outcome: Outcome) -> NoReturn:
        # Whoever started us may be gone though it is another's signal that ends us: then nobody else writes the record.
        gone = outcome is GONE or (self.parent is not None and bool(select.select([self.parent], [], [], 0)[0]))
        try:
            self.watched.end(GONE if gone else outcome, gone)
        finally:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        child.kill()
            os._exit(EXIT_CODES.get(outcome.status, 1))
