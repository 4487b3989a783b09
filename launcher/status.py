"""What became of runs: `python -m launcher.status [--follow] [--json] DIR...`.

DIR is a run directory, the folder of a sweep, or one with many of them, as `runs` is: its history. One row a run: its
state in SLURM's words while its job exists and is not over, else the status of its record. The last line of stdout is
one JSON object, and with --json it is the only one. Exit code: 0 all are ok or under way, 1 some are not, 2 something
to mend first.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Column, Table

from launcher.config.schema import ConfigError
from launcher.launch.slurm import arrays, jobs
from launcher.launch.slurm.arrays import Point
from launcher.launch.slurm.script import LOG
from launcher.report import tables as report
from launcher.results.record import SCHEMA, blank, unfinished
from launcher.results.verdict import STATUSES, said
from launcher.system.files import read_json
from launcher.system.terminal import run_command
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

POLL_S = 2.0
FLAGS = ("--follow", "--json")
UNREADABLE = (OSError, ValueError, KeyError, TypeError)
UNREADABLE_RUN = "unreadable"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        print((__doc__ or "").strip())
        return 0 if arguments else 2
    try:
        if unknown := [word for word in arguments if word.startswith("-") and word not in FLAGS]:
            raise ConfigError(f"{unknown[0]} is not an option.", "python -m launcher.status --help")
        places = [Path(name) for name in arguments if name not in FLAGS]
        points = [point for place in places for point in _points_or_why(place, alone=len(places) == 1)]
        if "--follow" in arguments and places:
            _follow(points, places[0])
        return _show(points, "--json" in arguments)
    except arrays.Detached:
        return arrays.DETACHED
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _points_or_why(place: Path, alone: bool) -> list[Point]:
    """`points_in`; of several places one that has none is a point that says why."""
    try:
        return points_in(place)
    except UserError as error:
        if alone:
            raise
        return [Point((place.name,), None, _unreadable(place, error.fact))]


def points_in(place: Path) -> list[Point]:
    """The points of the sweep submitted from a folder, the run in it, or the runs in its folders, by name.

    ConfigError where there is none of them.
    """
    folder = place.resolve()
    try:
        if (folder / arrays.SWEEP).is_file():
            return arrays.read_points(folder)
        runs = [folder] if _has_run(folder) else sorted(filter(_has_run, folder.iterdir()))
    except UNREADABLE as error:
        raise ConfigError(f"{folder} cannot be read: {error}.", "python -m launcher.status RUN_DIR") from None
    if not runs:
        raise ConfigError(f"{folder} is not a run directory, and has none.", "python -m launcher.status RUN_DIR")
    return [Point((run.name,), run) for run in runs]


def _has_run(folder: Path) -> bool:
    """Whether a run was begun in a folder, or refused."""
    return (folder / "run.json").is_file() or (folder / "record.json").is_file()


def _follow(points: Sequence[Point], place: Path) -> None:
    runs = _jobs(points)
    arrays.follow(runs, place, f"{len(runs)} jobs", POLL_S)


def _jobs(points: Sequence[Point]) -> dict[str, Path]:
    found = ((jobs.read_job(point.run_dir), point.run_dir) for point in points if point.run_dir is not None)
    return {job: run_dir for job, run_dir in found if job is not None}


def _show(points: Sequence[Point], only_json: bool) -> int:
    runs = _jobs(points)
    sure = [job for job, run_dir in runs.items() if (run_dir / "record.json").exists()]
    states = (jobs.settled(list(runs), sure) if runs else {}) or {}
    by_run = {run_dir: states[job] for job, run_dir in runs.items() if job in states}
    records = [_record_or_why(point, by_run) for point in points]
    if not only_json:
        _show_tables(points, records, report.console())
    print(report.sweep_line(records, more=("started_at",)), flush=True)
    bad = {UNREADABLE_RUN, *STATUSES} - {"ok"}
    return 1 if any(record["status"] in bad for record in records) else 0


def _show_tables(points: Sequence[Point], records: Sequence[dict[str, Any]], out: Console) -> None:
    """Runs that were not submitted together are a history."""
    names = [" ".join(point.overrides) for point in points]
    is_of_a_sweep = any(point.run_dir and point.run_dir.name not in point.overrides for point in points)
    if len(points) > 1 and not is_of_a_sweep:
        out.print(history(names, records))
    else:
        report.show_sweep(records, [point.overrides for point in points], out)
    for name, record in zip(names, records, strict=True):
        if record["error"]:
            why = record["error"]["message"] if record["status"] == UNREADABLE_RUN else report.error_line(record)
            out.print(f"{name}: {why}", markup=False, soft_wrap=True)
            if record["run_dir"] and (Path(record["run_dir"]) / LOG).exists():
                out.print(f"  its job's words are in {record['run_dir']}/{LOG}", markup=False, soft_wrap=True)


def history(names: Sequence[str], records: Sequence[dict[str, Any]]) -> Table:
    """A row a run: when it was, of what, and what became of it."""
    table = Table(Column("run", overflow="fold"), "started", "model", "backend", "devices", "status", "new tokens/s")
    for name, record in zip(names, records, strict=True):
        moment = record["started_at"]
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(moment)) if moment else "-"
        model, devices = escape(record["model"]), str(record["world_size"] or "-")
        speed = report.rate(record["new_tokens_per_s"])
        table.add_row(escape(name), started, model, record["backend"], devices, record["status"], speed)
    return table


def _unreadable(folder: Path, why: str) -> dict[str, Any]:
    """What stands for the record of a folder that says nothing."""
    nothing = {"backend": {"name": "-"}, "model": {"name": "-"}, "precision": "-", "devices": 0, "num_nodes": 0}
    error = said(None, "read", "ConfigError", why)
    return blank(nothing, UNREADABLE_RUN, error) | {"run_dir": str(folder)}


def _record_or_why(point: Point, states: dict[Path, jobs.State]) -> dict[str, Any]:
    """`_record`; what cannot be read of one run must not keep the others from being shown."""
    try:
        record = _record(point, states)
        if record["schema"] == SCHEMA:
            return record
        why = f"{point.run_dir} has a record of schema {record['schema']}, not {SCHEMA}."
    except UNREADABLE as error:
        why = f"{point.run_dir} cannot be read: {type(error).__name__}: {error}."
    return _unreadable(point.run_dir or Path(), why)


def _record(point: Point, states: dict[Path, jobs.State]) -> dict[str, Any]:
    """The record of a run that is over, and what stands for it while it is not."""
    if point.run_dir is None:
        assert point.record is not None
        return point.record
    state = states.get(point.run_dir)
    if state is not None and not state.is_end:
        return unfinished(point.run_dir, str(state))
    if state is not None:
        return jobs.close(point.run_dir, state)
    record: dict[str, Any] | None = read_json(point.run_dir / "record.json")
    return record or unfinished(point.run_dir, "no record, and no job of SLURM")


if __name__ == "__main__":
    sys.exit(run_command(main))
