"""A thread in each rank that acts when its main thread cannot: on SIGTERM, or when the watching process is gone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

EXIT_CODE = 143  # as a shell reports SIGTERM


def start(watched_pid: int | None, on_end: Callable[[str, bool], None]) -> None:
    """From now on SIGTERM, SIGINT or the end of `watched_pid` calls `on_end(reason, watched_is_gone)` and ends this process tree.

    The signal's own handler would have to wait for the main thread, which may be blocked in a collective for ever.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read_end, watched_pid, on_end), daemon=True, name="guard").start()


def _watch(signals: int, watched_pid: int | None, on_end: Callable[[str, bool], None]) -> None:
    sources = [signals]
    if watched_pid is not None:
        try:
            sources.append(os.pidfd_open(watched_pid))
        except ProcessLookupError:
            _end("the launching process is gone", True, on_end)
    while True:
        ready, _, _ = select.select(sources, [], [])
        if ready[0] != signals:
            _end("the launching process is gone", True, on_end)
        for number in os.read(signals, 64):
            if number in (signal.SIGTERM, signal.SIGINT):
                _end(f"received {signal.Signals(number).name}", False, on_end)


def _end(reason: str, gone: bool, on_end: Callable[[str, bool], None]) -> None:
    try:
        on_end(reason, gone)
    finally:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
        os._exit(EXIT_CODE)
