"""Show the progress of a run: a bar on a terminal, otherwise a line every half minute.

The watching process draws it from the progress files of the ranks. A sweep has one bar over all points.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from launcher.report.units import rate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from rich.console import Console

    from launcher.run_dir.progress import Progress as RankProgress

LINE_S = 30.0
RATE_S = 2.0
"""The live tokens/s are averaged over about this time."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The position of a run among the points of a sweep, from 1, and the time when the sweep began."""

    number: int
    total: int
    began: float


@dataclass(slots=True)
class _Rate:
    """Tokens/s over the last RATE_S seconds."""

    since: float
    tokens: int = 0
    value: float | None = None

    def look(self, tokens: int, now: float) -> None:
        if now - self.since >= RATE_S:
            self.value = max(tokens - self.tokens, 0) / (now - self.since)
            self.tokens, self.since = tokens, now


class Bars:
    """One bar with point, stage, share, tokens/s and the remaining time."""

    def __init__(
        self, title: str, console: Console, turn: Turn | None = None, answering: Sequence[int] | None = None
    ) -> None:
        """`answering` are the ranks whose tokens are counted, one of several that answer together; None for all."""
        columns = (
            TextColumn("[bold]{task.fields[title]}[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        now = time.monotonic()
        self.turn, self.answering = turn or Turn(1, 1, now), answering
        self.title = title
        if self.turn.total > 1:
            self.title = f"point {self.turn.number}/{self.turn.total} · {title}"
        self._console = console
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, expand=True)
        self._task = self._bar.add_task("start", total=1.0, title=self.title, speed="", left="")
        self._rate = _Rate(since=now)
        self._began = self._said = now
        self._measuring: float | None = None

    def __enter__(self) -> Bars:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, ranks: Sequence[RankProgress | None]) -> None:
        """Draw the current state."""
        begun = next((rank for rank in ranks if rank is not None), None)
        if begun is None:
            return
        now = time.monotonic()
        if self.answering is None:
            counted = ranks
        else:
            counted = [ranks[rank] for rank in self.answering]
        self._rate.look(sum(rank.tokens for rank in counted if rank is not None), now)
        share = begun.measured
        if share and self._measuring is None:
            self._measuring = now
        speed = ""
        if self._rate.value:
            speed = f"{rate(self._rate.value)} tokens/s"
        left = _left(self.seconds_left(share, now))
        overall = (self.turn.number - 1 + share) / self.turn.total
        self._bar.update(self._task, description=begun.stage, completed=overall, speed=speed, left=left)
        if self._bar.disable and now - self._said >= LINE_S:
            self._said = now
            parts = (self.title, begun.stage, f"{overall:.0%}", speed, left)
            self._console.print(" · ".join(filter(None, parts)), markup=False, soft_wrap=True)

    def seconds_left(self, share: float, now: float) -> float | None:
        """The estimated remaining time, from the pace of this point and of finished ones; None if not known yet."""
        if not share or self._measuring is None or now == self._measuring:
            return None
        here = (now - self._measuring) * (1 - share) / share
        done = self.turn.number - 1
        if done:
            each = (self._began - self.turn.began) / done
        else:
            each = now - self._began + here
        return here + each * (self.turn.total - self.turn.number)


def _left(seconds: float | None) -> str:
    """The remaining time as text; empty for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s left"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min left"
    return f"{minutes / 60:.1f} h left"
