"""Submit runs as SLURM jobs: a single job, or the points of a sweep as job arrays, one for each set of resources.

Each point has its own run directory with the output of its ranks, and its own script to submit it again.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.launch.slurm import jobs
from launcher.launch.slurm.script import job_of, name_of, sbatch_text
from launcher.prepare.prepare import prepare
from launcher.report.layout import console
from launcher.report.progress_bars import Bars
from launcher.report.sweep_table import show_point, varied
from launcher.results.record import Record, read_record
from launcher.run_dir.lifecycle import directory_of, refusal, refused, unfinished
from launcher.run_dir.run_dir import SLURM_SCRIPT, RunDir
from launcher.run_dir.typed_files import read_typed, write_typed
from launcher.system.files import make_folder, write_text, writing_in
from launcher.system.typed import to_plain
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from launcher.config.schema import RunConfig

POINTS = "points.json"
DETACHED = 130  # exit code of a command that was ended by Ctrl-C while its jobs continue


class Detached(KeyboardInterrupt):
    """Ctrl-C while following jobs, which continue."""


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a sweep: its overrides and its run directory; a record if it is finished or refused."""

    overrides: tuple[str, ...]
    run_dir: RunDir | None = None
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class _PointOnDisk:
    """A point as stored in the folder of its sweep: the name of the run directory, and a record of any version."""

    overrides: tuple[str, ...]
    run_dir: str | None = None
    record: dict[str, Any] | None = None


def submit_run(run_dir: RunDir) -> str:
    """Submit one run; returns its job number. UserError if it already is in a job."""
    if active := jobs.active([run_dir]):
        [(job, state)] = active.values()
        raise UserError(f"{run_dir} is in job {job}, which is {state}.", f"wait for its end, or scancel {job}")
    _write_script(run_dir)
    job = jobs.submit(run_dir.path)
    run_dir.write_job(job)
    return job


def _write_script(run_dir: RunDir) -> None:
    run = run_dir.read_run()
    run_dir.write_slurm_script(sbatch_text(job_of(run), name_of(run)))


def submit_points(folder: Path, points: Sequence[Point]) -> tuple[dict[str, RunDir], list[Point]]:
    """Submit the unfinished points, those with equal resources as one array; returns job -> run directory, and all
    points.

    A point that already is in a job is not submitted again. The scripts are in `folder`, next to the run directories.
    Points that SLURM refuses get a record.
    """
    to_run = [point.run_dir for point in points if point.run_dir is not None and point.record is None]
    active = jobs.active(to_run)
    submitted = {job: run_dir for run_dir, (job, _) in active.items()}
    groups: dict[str, list[RunDir]] = {}
    for run_dir in to_run:
        if run_dir not in active:
            _write_script(run_dir)
            groups.setdefault(sbatch_text(job_of(run_dir.read_run()), ""), []).append(run_dir)
    refusals: dict[RunDir | None, Record] = {}
    script = SLURM_SCRIPT
    for number, run_dirs in enumerate(groups.values(), 2):
        try:
            run, names = run_dirs[0].read_run(), [run_dir.path.name for run_dir in run_dirs]
            write_text(folder / script, sbatch_text(job_of(run), name_of(run), names))
            array = jobs.submit(folder, script)
            for task, run_dir in enumerate(run_dirs):
                submitted[f"{array}_{task}"] = run_dir
                run_dir.write_job(f"{array}_{task}")
        except UserError as error:
            for run_dir in run_dirs:
                refusals[run_dir] = refused(run_dir.read_run().run_config, error, time.time(), run_dir)
        script = f"submit-{number}.sbatch"  # for the next group
    points = [replace(point, record=refusals.get(point.run_dir, point.record)) for point in points]
    write_points(folder, points)
    return submitted, points


def write_points(folder: Path, points: Sequence[Point]) -> None:
    """Store the points of a sweep in its folder, next to the run directories."""
    rows = []
    for point in points:
        row = _PointOnDisk(point.overrides)
        if point.run_dir is not None:
            row = replace(row, run_dir=point.run_dir.path.name)
        if point.record is not None:
            row = replace(row, record=to_plain(point.record))
        rows.append(row)
    write_typed(folder / POINTS, rows)


def read_points(folder: Path) -> list[Point]:
    """The points of the sweep in a folder; none if it is not the folder of a sweep."""
    points = []
    for row in read_typed(folder / POINTS, list[_PointOnDisk]) or []:
        point = Point(row.overrides)
        if row.run_dir is not None:
            point = replace(point, run_dir=RunDir(folder.parent / row.run_dir))
        if row.record is not None:
            point = replace(point, record=read_record(row.record))
        points.append(point)
    return points


def follow(
    runs: Mapping[str, RunDir],
    folder: Path,
    title: str,
    poll_s: float,
    ended: Callable[[RunDir, Record], None] = lambda *_: None,
) -> dict[RunDir, Record]:
    """Follow jobs to their end, with a line on stderr for each change; returns run directory -> record.

    Ctrl-C stops following but not the jobs: it prints how to follow or cancel them, and raises Detached.
    """
    out = console(stderr=True)
    records = {}
    try:
        with Bars(title, out) as bars:
            follower = jobs.Follower(runs, lambda job, text: out.print(f"job {job}: {text}", markup=False), bars.show)
            for job, record in follower.follow(poll_s):
                records[runs[job]] = record
                ended(runs[job], record)
    except KeyboardInterrupt:
        print(f"\n{how_to_go_on(runs, folder)}", file=sys.stderr)
        raise Detached from None
    return records


def how_to_go_on(runs: Mapping[str, RunDir], folder: Path) -> str:
    """A line with the commands that follow and cancel the jobs of a folder."""
    arrays = " ".join(dict.fromkeys(job.partition("_")[0] for job in runs))
    see = f"python -m launcher.status --follow {shlex.quote(str(folder))}"
    return f"job {arrays} goes on. See it: {see}   End it: scancel {arrays}"


def run_job(run_dir: RunDir) -> Record:
    """Submit the run and follow it; returns its record, with `launch.wait=false` an unfinished one."""
    run = run_dir.read_run()
    launch = run.run_config.launch
    job = submit_run(run_dir)
    if not launch.wait:
        print(how_to_go_on({job: run_dir}, run_dir.path), file=sys.stderr)
        return unfinished(run_dir, "submitted")
    return follow({job: run_dir}, run_dir.path, run.label, launch.poll_s)[run_dir]


def run_points(asked: Sequence[tuple[RunConfig, tuple[str, ...]]]) -> list[Record]:
    """Run configurations, each with its command, as jobs; returns their records in order.

    With `launch.wait=false` the records are unfinished.
    """
    points = []
    for config, command in asked:
        try:
            run = prepare(config, command)
            with writing_in(Path(config.output_dir)):
                run_dir = directory_of(run)
        except UserError as error:
            points.append(Point(command[3:], record=refusal(config, error)))
            continue
        point = Point(command[3:], run_dir)
        if run_dir.is_done():
            point = replace(point, record=run_dir.read_record())
        points.append(point)
    config = asked[0][0]
    output_dir = Path(config.output_dir)
    folder = make_folder(output_dir, f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_sweep_of_{len(points)}")
    with writing_in(output_dir):
        runs, points = submit_points(folder, points)
    swept = varied([point.overrides for point in points])
    names = {point.run_dir: values for point, values in zip(points, swept, strict=True)}
    records: dict[RunDir, Record] = {}
    if runs and config.launch.wait:
        out = console(stderr=True)
        records = follow(
            runs,
            folder,
            f"{len(runs)} jobs",
            config.launch.poll_s,
            lambda run_dir, record: show_point(names[run_dir], record, out),
        )
    elif runs:
        print(how_to_go_on(runs, folder), file=sys.stderr)
    ended = []
    for point in points:
        record = point.record
        if record is None:
            assert point.run_dir is not None, "a point that was not refused has one"
            record = records.get(point.run_dir) or unfinished(point.run_dir, "submitted")
        ended.append(record)
    return ended
