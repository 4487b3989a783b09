"""Run the points of a sweep; each runs in new processes, so that a failure of one does not affect the next."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.composition.compose import command_of, compose_run
from launcher.composition.sweeps import expand_sweep
from launcher.config.parts.speculative import without_others
from launcher.launch.run import run
from launcher.launch.slurm.arrays import run_points as run_slurm_points
from launcher.report.layout import console
from launcher.report.progress_bars import Turn
from launcher.report.sweep_table import show_point, varied
from launcher.run_dir.lifecycle import never_begun, refusal
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.config.schema import RunConfig
    from launcher.results.record import Record


ONE_FOR_ALL_ENGINES = ("measure.batch_size",)
"""Keys that a sweep over engines may set although some engines do not use them: those engines only print a note."""

NOT_BEGUN = "the sweep was cancelled before this point"


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a sweep: its overrides, its configuration, and the command that composes that configuration."""

    overrides: tuple[str, ...]
    config: RunConfig
    command: tuple[str, ...]


def points_of(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> list[Point]:
    """The composed points of a sweep such as `a=1,2 b=x,y`; the last key varies fastest."""
    expanded = expand_sweep(list(overrides), config_dirs)
    if len({item for point in expanded for item in point if item.startswith("speculative=")}) > 1:
        expanded = [without_others(point) for point in expanded]
    asked = {item for point in expanded for item in point if item.startswith("backend=")}
    for_others: tuple[str, ...] = ()
    if len(asked) > 1:
        for_others = ONE_FOR_ALL_ENGINES
    return [
        Point(tuple(point), compose_run(point, tuple(config_dirs), for_others), command_of(point, config_dirs))
        for point in expanded
    ]


def run_points(points: Sequence[Point]) -> list[Record]:
    """Run every point; returns their records in the order of `points`.

    Points on this machine run first, those on a cluster follow as jobs. A line on stderr reports each result. Ctrl-C
    ends the whole sweep.
    """
    local = [number for number, point in enumerate(points) if point.config.launch.name != "slurm"]
    queued = [number for number in range(len(points)) if number not in local]
    records: dict[int, Record] = {}
    swept, began = varied([point.overrides for point in points]), time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C between two points, or before ranks were started
        for turn, number in enumerate(local, 1):
            point = points[number]
            try:
                records[number] = run(point.config, point.command, Turn(turn, len(local), began))
            except UserError as error:
                records[number] = refusal(point.config, error)
            show_point(swept[number], records[number], console(stderr=True))
            if records[number].status == "cancelled":
                break
    is_cancelled = any(number not in records or records[number].status == "cancelled" for number in local)
    if queued and not is_cancelled:
        jobs = [(points[number].config, points[number].command) for number in queued]
        records |= dict(zip(queued, run_slurm_points(jobs), strict=True))
    for number, point in enumerate(points):
        if number not in records:
            records[number] = never_begun(point.config, NOT_BEGUN, time.time())
    return [records[number] for number in range(len(points))]
