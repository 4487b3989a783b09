"""The progress of a run and a sweep: the finished share, the remaining time, and lines if bars cannot be shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from launcher.report import progress_bars
from launcher.report.progress_bars import Bars, Turn
from launcher.run_dir.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The current time of the progress bars, as a list of one value."""
    now = [0.0]
    monkeypatch.setattr(progress_bars.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("stage", "done", "total", "share"),
    [
        ("load", 3, 4, 0.0),
        ("warmup 1/1", 3, 4, 0.0),
        ("repeat 1/2", 0, 0, 0.0),
        ("repeat 1/2 batch 1/4", 8, 32, 1 / 32),
        ("repeat 2/2 batch 3/4", 16, 32, 0.5 + 0.625 / 2),
        ("repeat 2/2 batch 4/4", 99, 32, 1.0),
    ],
)
def test_the_share_of_the_repeats_that_is_done(stage: str, done: int, total: int, share: float) -> None:
    assert Progress(stage=stage, done=done, total=total).measured == pytest.approx(share)


def test_the_time_left_is_that_of_this_point_and_of_those_that_follow(clock: list[float]) -> None:
    turn = Turn(number=2, total=4, began=-20.0)
    bars = Bars("dummy tiny", Console(file=io.StringIO()), turn)
    clock[0] = 5.0
    bars.show([Progress(stage="load", done=1, total=2)])
    assert bars.seconds_left(0.0, clock[0]) is None
    bars.show([Progress(stage="repeat 1/4 batch 1/1", done=1, total=4)])
    clock[0] = 8.0
    # A quarter of this point took 3 s, so 9 s are left; the other two points take 20 s each, like the first one.
    assert bars.seconds_left(0.25, clock[0]) == pytest.approx(9 + 2 * 20)


def test_a_line_every_half_minute_where_there_is_no_terminal(clock: list[float]) -> None:
    out = Console(file=io.StringIO(), width=200)
    bars = Bars("dummy tiny", out, Turn(number=2, total=6, began=0.0), answering=range(1))
    with bars:
        for now in range(0, 91, 10):
            clock[0] = float(now)
            bars.show([Progress(stage="repeat 1/2 batch 1/1", done=now, total=100, tokens=now * 5), Progress(tokens=9)])
    assert isinstance(out.file, io.StringIO)
    lines = out.file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("point 2/6 · dummy tiny · repeat 1/2 batch 1/1 · 19% · 5.000 tokens/s · ")
    assert lines[0].endswith(" left")


def test_nothing_is_said_before_a_rank_has_begun(clock: list[float]) -> None:
    out = Console(file=io.StringIO())
    bars = Bars("dummy tiny", out)
    clock[0] = 100.0
    bars.show([None, None])
    assert isinstance(out.file, io.StringIO)
    assert out.file.getvalue() == ""
