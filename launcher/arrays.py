"""Runs as jobs of SLURM: one, or the points of a sweep as arrays of jobs that ask for the same.

Each point keeps its own run directory with what every rank left there, and its own script to submit it again.
"""

from __future__ import annotations

import contextlib
import itertools
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import jobs, report
from launcher.bars import Bars
from launcher.files import read_json, write_json, write_text
from launcher.slurm import SCRIPT, job_of, name_of, sbatch_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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


def write_script(run_dir: Path) -> None:
    """`submit.sbatch` in the run directory."""
    run = read_json(run_dir / "run.json")
    write_text(run_dir / SCRIPT, sbatch_text(job_of(run), name_of(run)))


def submit_run(run_dir: Path) -> str:
    """Submit one run; the number of its job."""
    write_script(run_dir)
    job = jobs.submit(run_dir)
    jobs.write_job(run_dir, job)
    return job


def submit_points(folder: Path, points: Sequence[Point]) -> dict[str, Path]:
    """Submit the points that have a run directory, those with equal demands as one array: job -> run directory.

    The scripts lie in `folder`, beside the run directories.
    """
    write_json(folder / SWEEP, [described(point) for point in points])
    groups: dict[str, list[Path]] = {}
    for run_dir in (point.run_dir for point in points if point.run_dir is not None):
        write_script(run_dir)
        groups.setdefault(sbatch_text(job_of(read_json(run_dir / "run.json")), ""), []).append(run_dir)
    submitted: dict[str, Path] = {}
    for number, run_dirs in enumerate(groups.values()):
        submitted |= _submit_array(folder, SCRIPT if number == 0 else f"submit-{number + 1}.sbatch", run_dirs)
    return submitted


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
    runs: Mapping[str, Path], title: str, poll_s: float, ended: Callable[[Path, dict[str, Any]], None]
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
        print(f"\n{how_to_go_on(runs)}", file=sys.stderr)
        raise Detached from None
    return records


def how_to_go_on(runs: Mapping[str, Path]) -> str:
    """How to see what becomes of jobs that run on, and how to end them."""
    arrays = " ".join(dict.fromkeys(job.partition("_")[0] for job in runs))
    places = " ".join(shlex.quote(str(path)) for path in runs.values())
    return f"job {arrays} goes on. See it: python -m launcher.status --follow {places}   End it: scancel {arrays}"


def run_job(run_dir: Path) -> dict[str, Any]:
    """Submit the run and follow it: its record; with `launch.wait=false` what stands for it until there is one."""
    run = read_json(run_dir / "run.json")
    launch = run["config"]["launch"]
    job = submit_run(run_dir)
    if not launch["wait"]:
        print(how_to_go_on({job: run_dir}), file=sys.stderr)
        return unfinished(run_dir, "submitted")
    title = f"{run['config']['backend']['name']} {run['config']['model']['name']}"
    return follow({job: run_dir}, title, launch["poll_s"], lambda *_: None)[run_dir]


def unfinished(run_dir: Path, status: str) -> dict[str, Any]:
    """What stands for the record of a run that has none yet."""
    run = read_json(run_dir / "run.json")
    empty = dict.fromkeys((*report.HEADLINE, "error", "metrics", "ended_at"))
    return empty | {
        "status": status,
        "backend": run["config"]["backend"]["name"],
        "model": run["config"]["model"]["name"],
        "precision": run["config"]["precision"],
        "world_size": run["world_size"],
        "run_dir": str(run_dir),
        "devices": [],
        "job": jobs.read_job(run_dir),
        "config": run["config"],
    }


def new_sweep_folder(output_dir: Path, points: int) -> Path:
    """A new folder in `output_dir`, which is where the run directories are."""
    output_dir.mkdir(parents=True, exist_ok=True)
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_sweep_of_{points}"
    for number in itertools.count(1):
        folder = output_dir / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder.resolve()
    raise AssertionError("unreachable")
