"""A thread in each rank that handles signals, hangs and the end of the launching process, even while the main thread is
blocked."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import psutil

from launcher.results.verdict import Outcome
from shards.machine.orphans import signal_when_orphaned

if TYPE_CHECKING:
    from collections.abc import Callable

ON_TERM = "LAUNCHER_ON_TERM"  # "interrupt": SIGTERM is an early notice, such as a pre-emption by a scheduler
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODES = {"cancelled": 143, "interrupted": 75}  # 128 + SIGTERM, as in a shell; EX_TEMPFAIL: can be resumed
INTERRUPT_S = 20.0  # seconds from SIGUSR1 to the end of the rank, at most
TERM_S = 3.0  # seconds from SIGTERM to the end of the rank, at most: a SIGKILL usually follows soon
PARENT_S = 1.0  # seconds between two checks of the launching process if there is no pidfd
GONE = Outcome("failed", "the launching process is gone")


@dataclass(frozen=True, slots=True)
class Watched:
    """Callbacks of a rank's guard; all run in the guard's thread.

    `interrupt(reason)` asks the main thread to end after saving its current work, and returns True if that is worth
    waiting for. `end(outcome, parent_is_gone)` writes the rank's result. `look()`, called every `look_s` seconds,
    returns an outcome if the rank must end now.
    """

    interrupt: Callable[[str], bool]
    end: Callable[[Outcome, bool], None]
    look: Callable[[], Outcome | None] | None = None
    look_s: float = 1.0


def start(watched_pid: int | None, watched: Watched, term_interrupts: bool = False) -> None:
    """Start the guard thread.

    SIGTERM, SIGINT and the end of process `watched_pid` then end the process tree at once; SIGUSR1 (and with
    `term_interrupts` SIGTERM) ends it as soon as the main thread has saved its batch, after INTERRUPT_S at the latest.

    A Python signal handler would have to wait for the main thread, which may be blocked in a collective forever. If the
    guard itself fails, the rank ends as failed, since it could not react to anything any more. A forked child of the
    rank has no guard: signals have their default effect there.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in SIGNALS:
        signal.signal(number, _pass)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget_guard)
    signal_when_orphaned(signal.SIGCONT)  # wake a stopped rank, so that its guard notices the parent's end
    guard = _Guard(read_end, watched, term_interrupts)
    threading.Thread(target=guard.run, args=(watched_pid,), daemon=True, name="guard").start()


def _pass(number: int, frame: object) -> None:
    """A handler that does nothing: its presence makes the interpreter write signal numbers to the guard's pipe."""


def _forget_guard() -> None:
    """Detach a forked child from the guard: its signals must not reach the inherited pipe, which would end the rank."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _pass:
            signal.signal(number, signal.SIG_DFL)


class _Guard:
    def __init__(self, signals: int, watched: Watched, term_interrupts: bool) -> None:
        self.signals, self.watched, self.term_interrupts = signals, watched, term_interrupts
        self.deadline: float | None = None
        self.reason = ""
        self.parent: int | None = None  # the process id of the watched process
        self.parent_fd: int | None = None  # pidfd, readable once that process has ended

    def run(self, watched_pid: int | None) -> None:
        try:
            if watched_pid is not None:
                self.parent = watched_pid
                with contextlib.suppress(
                    OSError, AttributeError
                ):  # already ended, Linux before 5.3, not permitted, or a Python without pidfd_open
                    self.parent_fd = os.pidfd_open(watched_pid)
            sources, looks = [self.signals], []
            if self.parent_fd is not None:
                sources.append(self.parent_fd)
            elif self.parent is not None:
                looks.append(PARENT_S)
            if self.watched.look:
                looks.append(self.watched.look_s)
            while True:
                if self._parent_is_gone():
                    self._end(GONE)
                patience = min(looks, default=None)  # None: wait for signals only
                if self.deadline is not None:
                    patience = min([*looks, max(self.deadline - time.monotonic(), 0.0)])
                ready, _, _ = select.select(sources, [], [], patience)
                if self.signals in ready:
                    for number in os.read(self.signals, 64):
                        self._on_signal(number)
                if self.deadline is not None and time.monotonic() >= self.deadline:
                    self._end(Outcome("interrupted", self.reason))
                if self.watched.look and (outcome := self.watched.look()):
                    self._end(outcome)
        except BaseException as error:
            traceback.print_exc()
            self._end(Outcome("failed", f"the guard of the rank failed: {type(error).__name__}: {error}"))

    def _parent_is_gone(self) -> bool:
        if self.parent_fd is not None:
            return bool(select.select([self.parent_fd], [], [], 0)[0])
        if self.parent is None:
            return False
        try:
            os.kill(self.parent, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it exists, but belongs to another user
            return False
        with contextlib.suppress(psutil.Error):
            return bool(psutil.Process(self.parent).status() == psutil.STATUS_ZOMBIE)
        return False

    def _on_signal(self, number: int) -> None:
        if number not in SIGNALS:
            return
        is_notice = number == signal.SIGUSR1 or (number == signal.SIGTERM and self.term_interrupts)
        reason = f"received {signal.Signals(number).name}"
        if self.deadline is None and not is_notice:
            self._end(Outcome("cancelled", reason))
        if self.deadline is None:
            self.reason = reason
            self.deadline = time.monotonic()
            if self.watched.interrupt(reason):
                self.deadline = time.monotonic() + INTERRUPT_S
        if number != signal.SIGUSR1:
            self.deadline = min(self.deadline, time.monotonic() + TERM_S)

    def _end(self, outcome: Outcome) -> NoReturn:
        # Even if a signal ends this rank, the parent may be gone too; then no other process would write the record.
        try:
            if self._parent_is_gone():
                self.watched.end(GONE, True)
            else:
                self.watched.end(outcome, False)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        child.kill()
            os._exit(EXIT_CODES.get(outcome.status, 1))
