"""Runs as jobs of SLURM: one, or the points of a sweep as arrays of jobs that ask for the same.

Each point keeps its own run directory with what every rank left there, and its own script to submit it again.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.launch.resume import directory_of, refusal
from launcher.launch.slurm import jobs
from launcher.launch.slurm.script import SCRIPT, job_of, name_of, sbatch_text
from launcher.prepare.prepare import prepare
from launcher.report import tables as report
from launcher.report.progress_bars import Bars
from launcher.results.record import refused, unfinished
from launcher.system.files import make_folder, read_json, write_json, write_text, writing_in
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from launcher.config.schema import RunConfig

SWEEP = "sweep.json"
DETACHED = 130  # exit code of a command that Ctrl-C has ended, and whose jobs go on


class Detached(KeyboardInterrupt):
    """Ctrl-C while jobs were followed: they go on."""


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a sweep: its overrides, and its run directory, or the record that says why it has none."""

    overrides: tuple[str, ...]
    run_dir: Path | None
    record: dict[str, Any] | None = None

    @property
    def is_to_run(self) -> bool:
        """Whether it neither was refused nor is done already."""
        return self.run_dir is not None and self.record is None


def write_script(run_dir: Path) -> None:
    """`submit.sbatch` in the run directory."""
    run = read_json(run_dir / "run.json")
    write_text(run_dir / SCRIPT, sbatch_text(job_of(run), name_of(run)))


def submit_run(run_dir: Path) -> str:
    """Submit one run; the number of its job. UserError where it is in a job already."""
    if found := jobs.active([run_dir]):
        [(job, state)] = found.values()
        raise UserError(f"{run_dir} is in job {job}, which is {state}.", f"wait for its end, or scancel {job}")
    write_script(run_dir)
    job = jobs.submit(run_dir)
    jobs.write_job(run_dir, job)
    return job


def submit_points(folder: Path, points: Sequence[Point]) -> tuple[dict[str, Path], list[Point]]:
    """Submit the points that are to run, those with equal demands as one array; their jobs, and all points.

    A point that is in a job already stays in it. The scripts lie in `folder`, beside the run directories. What SLURM
    refuses has a record now.
    """
    active = jobs.active([point.run_dir for point in points if point.is_to_run and point.run_dir is not None])
    submitted = {job: run_dir for run_dir, (job, _) in active.items()}
    groups: dict[str, list[Point]] = {}
    for point in points:
        if point.is_to_run and point.run_dir is not None and point.run_dir not in active:
            write_script(point.run_dir)
            groups.setdefault(sbatch_text(job_of(read_json(point.run_dir / "run.json")), ""), []).append(point)
    turned_down: dict[Path | None, dict[str, Any]] = {}
    for number, group in enumerate(groups.values()):
        run_dirs = [point.run_dir for point in group if point.run_dir is not None]
        try:
            submitted |= _submit_array(folder, SCRIPT if number == 0 else f"submit-{number + 1}.sbatch", run_dirs)
        except UserError as error:
            configs = {path: read_json(path / "run.json")["config"] for path in run_dirs}
            turned_down |= {path: refused(config, error, time.time(), path) for path, config in configs.items()}
    points = [replace(point, record=turned_down.get(point.run_dir, point.record)) for point in points]
    write_json(folder / SWEEP, [described(point) for point in points])
    return submitted, points


def described(point: Point) -> dict[str, Any]:
    """A point as `sweep.json` keeps it."""
    place = point.run_dir.name if point.run_dir else None
    return {"overrides": list(point.overrides), "run_dir": place, "record": point.record}


def read_points(folder: Path) -> list[Point]:
    """The points of the sweep that was submitted from `folder`."""
    rows = read_json(folder / SWEEP)
    return [
        Point(tuple(row["overrides"]), folder.parent / row["run_dir"] if row["run_dir"] else None, row["record"])
        for row in rows
    ]


def _submit_array(folder: Path, script: str, run_dirs: Sequence[Path]) -> dict[str, Path]:
    run = read_json(run_dirs[0] / "run.json")
    write_text(folder / script, sbatch_text(job_of(run), name_of(run), [path.name for path in run_dirs]))
    array = jobs.submit(folder, script)
    submitted = {f"{array}_{number}": path for number, path in enumerate(run_dirs)}
    for job, path in submitted.items():
        jobs.write_job(path, job)
    return submitted


def follow(
    runs: Mapping[str, Path],
    place: Path,
    title: str,
    poll_s: float,
    ended: Callable[[Path, dict[str, Any]], None] = lambda *_: None,
) -> dict[Path, dict[str, Any]]:
    """Follow jobs to their end, with a word on stderr for each change: run directory -> record.

    Ctrl-C stops the following, not the jobs: Detached, after a line that says how to see them again or end them.
    """
    out = report.console(stderr=True)
    records = {}
    try:
        with Bars(title, out) as bars:
            said = jobs.Follower(runs, lambda job, text: out.print(f"job {job}: {text}", markup=False), bars.show)
            for job, record in said.follow(poll_s):
                records[runs[job]] = record
                ended(runs[job], record)
    except KeyboardInterrupt:
        print(f"\n{how_to_go_on(runs, place)}", file=sys.stderr)
        raise Detached from None
    return records


def how_to_go_on(runs: Mapping[str, Path], place: Path) -> str:
    """How to see what becomes of the jobs in `place` that run on, and how to end them."""
    arrays = " ".join(dict.fromkeys(job.partition("_")[0] for job in runs))
    see = f"python -m launcher.status --follow {shlex.quote(str(place))}"
    return f"job {arrays} goes on. See it: {see}   End it: scancel {arrays}"


def run_job(run_dir: Path) -> dict[str, Any]:
    """Submit the run and follow it: its record; with `launch.wait=false` what stands for it until there is one."""
    run = read_json(run_dir / "run.json")
    launch = run["config"]["launch"]
    job = submit_run(run_dir)
    if not launch["wait"]:
        print(how_to_go_on({job: run_dir}, run_dir), file=sys.stderr)
        return unfinished(run_dir, "submitted")
    title = f"{run['config']['backend']['name']} {run['config']['model']['name']}"
    return follow({job: run_dir}, run_dir, title, launch["poll_s"])[run_dir]


def run_points(configs: Sequence[RunConfig], commands: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Run the points of a sweep as jobs; their records in order, with `launch.wait=false` what stands for them."""
    points = [_prepared(config, command) for config, command in zip(configs, commands, strict=True)]
    output_dir = Path(configs[0].output_dir)
    folder = make_folder(output_dir, f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_sweep_of_{len(points)}")
    with writing_in(output_dir):
        runs, points = submit_points(folder, points)
    launch, out = configs[0].launch, report.console(stderr=True)
    names = {point.run_dir: point.overrides for point in points}
    records: dict[Path, dict[str, Any]] = {}
    if runs and launch.wait:
        title = f"{len(runs)} jobs"
        records = follow(runs, folder, title, launch.poll_s, lambda at, made: report.show_point(names[at], made, out))
    elif runs:
        print(how_to_go_on(runs, folder), file=sys.stderr)
    return [point.record or _record(point, records) for point in points]


def _record(point: Point, records: Mapping[Path, dict[str, Any]]) -> dict[str, Any]:
    assert point.run_dir is not None, "a point that was not refused has one"
    return records.get(point.run_dir) or unfinished(point.run_dir, "submitted")


def _prepared(config: RunConfig, command: tuple[str, ...]) -> Point:
    try:
        run = prepare(config, command)
        with writing_in(Path(config.output_dir)):
            run_dir, done = directory_of(run)
    except UserError as error:
        return Point(command[3:], None, refusal(config, error))
    return Point(command[3:], run_dir, read_json(run_dir / "record.json") if done else None)
