"""The progress of one rank in a small file that survives kill -9: for progress bars, the watchdog and post-mortems."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from launcher.system.typed import decode
from shards.errors import UserError
from shards.untrusted_files import parse_json, read_bytes

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 256  # one line of fixed size, rewritten in place by one system call, so that the file never shrinks


@dataclass(slots=True)
class Progress:
    """The current work of one rank: `done` of `total` steps or prompts in `stage`. `ticks` counts the updates."""

    pid: int = 0
    stage: str = "start"
    done: int = 0
    total: int = 0
    tokens: int = 0
    ticks: int = 0
    time: float = 0.0

    @property
    def measured(self) -> float:
        """The share of the repeats that is done, 0 to 1, from `done` and the numbers in `repeat 2/3 batch 1/4`."""
        if not self.stage.startswith("repeat"):
            return 0.0
        share = 0.0
        if self.total:
            share = min(self.done / self.total, 1.0)
        for number, of in reversed(re.findall(r"(\d+)/(\d+)", self.stage)):
            share = (int(number) - 1 + share) / max(int(of), 1)
        return share


NAMES = {field.name for field in fields(Progress)}


class ProgressWriter:
    """Keeps the file of one rank up to date; cheap enough for every decode step."""

    def __init__(self, path: Path) -> None:
        self.progress = Progress(pid=os.getpid())
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        self._write()

    def enter(self, stage: str, total: int = 0) -> None:
        """Begin a new stage, for example `load`, `warmup 1/1` or `repeat 1/3 batch 1/4`."""
        self.progress.stage, self.progress.done, self.progress.total = stage, 0, total
        self._write()

    def advance(self, done: int, total: int | None = None, tokens: int = 0) -> None:
        """Report that `done` of `total` are done; `tokens` are added to the number of tokens made."""
        self.progress.done = done
        if total is not None:
            self.progress.total = total
        self.progress.tokens += tokens
        self._write()

    def _write(self) -> None:
        self.progress.ticks += 1
        self.progress.time = time.time()
        os.pwrite(self._file, json.dumps(asdict(self.progress)).ljust(SIZE - 1).encode() + b"\n", 0)


def read_progress(path: Path) -> Progress | None:
    """The last progress of a rank; None if the rank has not begun, or its file cannot be read."""
    try:
        values = parse_json(read_bytes(path, SIZE), str(path), UserError, "")
        if values.keys() == NAMES:
            return decode(values, Progress)
        return None
    except (OSError, ValueError, AttributeError, UserError):
        # missing, a stale NFS handle, incomplete, or from another version
        return None
