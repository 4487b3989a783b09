"""State of runs: `python -m launcher.status [--follow] [--json] DIR...`.

DIR is a run directory, the folder of a sweep, or one with many of them, as `runs` is: its history. One row a run: its
state in SLURM's words while its job exists and is not over, else the status of its record. Where stdout is no terminal
its last line is one JSON object, and with --json it is the only one. Exit code: 0 all are ok or under way, 1 some are
not, 2 something to mend first.
"""

from __future__ import annotations

from launcher.system.interrupts import end_quietly_when_interrupted

if __name__ == "__main__":  # first, because the imports below take seconds
    end_quietly_when_interrupted()

import contextlib
import fcntl
import sys
import time
from argparse import SUPPRESS
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.config.schema import ConfigError
from launcher.launch.slurm import arrays, jobs
from launcher.launch.slurm.arrays import Point
from launcher.report import layout
from launcher.report.run.speculation import COLUMN, cell, has_guesses
from launcher.report.run.tables import error_line
from launcher.report.sweep_table import show_sweep, sweep_line, varied
from launcher.report.units import rate
from launcher.results.record import Record, RunError
from launcher.results.verdict import STATUSES
from launcher.run_dir.lifecycle import unfinished
from launcher.run_dir.run_dir import RunDir, run_dirs_in
from launcher.run_dir.verify import references_in, verdict_of
from launcher.system.files import absolute
from launcher.system.terminal import Parser, run_command
from shards.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console
    from rich.table import Table

POLL_S = 2.0  # used if there are no runs with a `launch.poll_s`
UNREADABLE_RUN = "unreadable"


def main(argv: Sequence[str] | None = None) -> int:
    """Show the runs; returns the exit code."""
    try:
        arguments = parse(argv)
        folders: list[Path] = arguments.folders
        shown: list[Point] = []
        for folder in folders:
            try:
                shown += points_in(folder)
            except UserError as error:
                if len(folders) == 1:
                    raise
                shown.append(Point((folder.name,), record=_unreadable(folder, error.fact)))
        points = list({point.run_dir or number: point for number, point in enumerate(shown)}.values())
        if arguments.follow:
            runs = _jobs(points)
            arrays.follow(runs, folders[0], f"{len(runs)} jobs", _poll_s(runs.values()))
        runs, states = _jobs(points), {}
        if runs:
            sure = [job for job, run in runs.items() if run.has_record()]
            states = jobs.settled(list(runs), sure) or {}
        by_run = {run: states[job] for job, run in runs.items() if job in states}
        records = []
        for point in points:
            try:
                records.append(_record(point, by_run))
            except UserError as error:  # one unreadable run must not hide the others
                assert point.run_dir is not None, "a record that was read is one"
                records.append(_unreadable(point.run_dir.path, error.fact))
        if not arguments.json:
            _show_tables(points, records, layout.console())
        layout.print_json(sweep_line(records, more=("started_at",)), arguments.json)
        bad = {UNREADABLE_RUN, *STATUSES} - {"ok"}
        if any(record.status in bad for record in records):
            return 1
        return 0
    except arrays.Detached:
        return arrays.DETACHED
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def parse(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line; ConfigError for mistakes."""
    parser = Parser(
        prog="python -m launcher.status",
        description=__doc__,
        usage=SUPPRESS,
    )
    parser.add_argument("folders", type=Path, metavar="DIR", nargs="+", help="a run directory, or a folder of runs")
    parser.add_argument("--follow", action="store_true", help="follow the jobs of SLURM to their end")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    return parser.parse_intermixed_args(argv)


def points_in(path: Path) -> list[Point]:
    """The points of the sweep submitted from a folder, the run in it, or the runs in its folders, by name.

    ConfigError if there are none.
    """
    folder = absolute(path)
    if points := arrays.read_points(folder):
        return points
    alone = RunDir(folder)
    runs = [alone]
    if not alone.has_run() and not alone.has_record():
        runs = run_dirs_in(folder)
    if not runs:
        raise ConfigError(f"{folder} is not a run directory, and has none.", "python -m launcher.status RUN_DIR")
    return [Point((run.path.name,), run) for run in runs]


def _jobs(points: Sequence[Point]) -> dict[str, RunDir]:
    jobs_of = {}
    for point in points:
        with contextlib.suppress(UserError):  # reported by `_record`
            if point.run_dir is not None and (job := point.run_dir.read_job()) is not None:
                jobs_of[job] = point.run_dir
    return jobs_of


def _poll_s(runs: Iterable[RunDir]) -> float:
    """The shortest `launch.poll_s` of the runs."""
    told = []
    for run in runs:
        with contextlib.suppress(UserError):
            told.append(run.read_run().run_config.launch.poll_s)
    return min(told, default=POLL_S)


def _show_tables(points: Sequence[Point], records: Sequence[Record], out: Console) -> None:
    """Print the table of a sweep, or the history of runs that do not belong to one."""
    names = [" ".join(point.overrides) for point in points]
    is_of_a_sweep = any(point.run_dir and point.run_dir.path.name not in point.overrides for point in points)
    if len(points) > 1 and not is_of_a_sweep:
        parents = {point.run_dir.path.parent for point in points if point.run_dir}
        references = [run for parent in sorted(parents) for run in references_in(parent)]
        badges = []
        for point in points:
            badge = ""
            if point.run_dir is not None:
                badge = verdict_of(point.run_dir, references)
            badges.append(badge)
        out.print(history(names, records, badges, out))
    else:
        show_sweep(records, varied([point.overrides for point in points]), out)
    for name, record in zip(names, records, strict=True):
        if record.error:
            text = error_line(record)
            if record.status == UNREADABLE_RUN:
                text = record.error.message
            out.print(f"{name}: {text}", markup=False, soft_wrap=True)
            if record.run_dir and (log := RunDir(Path(record.run_dir)).slurm_log).exists():
                out.print(f"  the output of its job is in {log}", markup=False, soft_wrap=True)


def history(names: Sequence[str], records: Sequence[Record], badges: Sequence[str], out: Console) -> Table:
    """A table of runs: the start, the configuration, the status, and whether the figures are valid."""
    columns = ["run", "started", "model", "backend", "devices", "batch size", "status", "verified", "new tokens/s"]
    if guesses := has_guesses(records):
        columns.append(COLUMN)
    rows = []
    for name, record, badge in zip(names, records, badges, strict=True):
        started = "-"
        with contextlib.suppress(OverflowError, OSError):  # a timestamp out of range
            if record.started_at:
                started = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.started_at))
        devices, batch = str(record.num_devices or "-"), str(record.batch_size or "-")
        speed, engine = rate(record.new_tokens_per_s), (escape(record.model), record.backend, devices, batch)
        rows.append([escape(name), started, *engine, record.status, badge or "-", speed])
        if guesses:
            rows[-1].append(cell(record))
    optional = ("devices", "batch size", "model", "started")
    return layout.fitted(out, columns, rows, texts=("run", "model"), optional=optional)


def _unreadable(folder: Path, why: str) -> Record:
    """A placeholder record for a run that cannot be read."""
    return Record(
        status=UNREADABLE_RUN,
        backend="-",
        model="-",
        precision="-",
        world_size=0,
        num_devices=0,
        num_nodes=0,
        batch_size=0,
        config={},
        error=RunError(None, "read", "ConfigError", why),
        run_dir=str(folder),
    )


def _record(point: Point, states: Mapping[RunDir, jobs.State]) -> Record:
    """The record of a run; an unfinished one with its current state if the run is not over."""
    if point.run_dir is None:
        assert point.record is not None
        return point.record
    point.run_dir.read_job()  # raises UserError if the file does not contain a job number
    state = states.get(point.run_dir)
    if state is not None:
        if state.is_end:
            return jobs.close(point.run_dir, state)
        return unfinished(point.run_dir, str(state))
    if (record := point.run_dir.read_record()) is not None:
        return record
    with contextlib.suppress(OSError), (point.run_dir.path / "lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return unfinished(point.run_dir, "running")
    if point.run_dir.read_attempt():
        return unfinished(point.run_dir, "not finished")
    return unfinished(point.run_dir, "never started")


if __name__ == "__main__":
    sys.exit(run_command(main))
