"""What became of runs: `python -m launcher.status [--follow] DIR...`, a run directory or the folder of a sweep.

One row a run: its state in SLURM's words while its job exists and is not over, else the status of its record. The last
line of stdout is one JSON object. Exit code: 0 all are ok or under way, 1 some are not, 2 something to mend first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import report
from launcher.config import ConfigError
from launcher.files import read_json
from launcher.record import unfinished
from launcher.slurm import arrays, jobs
from launcher.slurm.arrays import Point
from launcher.slurm.script import LOG
from launcher.terminal import run_command
from launcher.verdict import STATUSES
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

POLL_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        print((__doc__ or "").strip())
        return 0 if arguments else 2
    try:
        places = [Path(name) for name in arguments if name != "--follow"]
        points = [point for place in places for point in points_in(place)]
        if "--follow" in arguments and places:
            _follow(points, places[0])
        return _show(points)
    except arrays.Detached:
        return arrays.DETACHED
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def points_in(folder: Path) -> list[Point]:
    """The run in `folder`, or the points of the sweep submitted from it; ConfigError where there is neither."""
    folder = folder.resolve()
    if (folder / arrays.SWEEP).is_file():
        return arrays.read_points(folder)
    if not (folder / "run.json").is_file():
        raise ConfigError(f"{folder} is not a run directory.", "python -m launcher.status RUN_DIR")
    return [Point((folder.name,), folder)]


def _follow(points: Sequence[Point], place: Path) -> None:
    runs = _jobs(points)
    arrays.follow(runs, place, f"{len(runs)} jobs", POLL_S)


def _jobs(points: Sequence[Point]) -> dict[str, Path]:
    found = ((jobs.read_job(point.run_dir), point.run_dir) for point in points if point.run_dir is not None)
    return {job: run_dir for job, run_dir in found if job is not None}


def _show(points: Sequence[Point]) -> int:
    runs = _jobs(points)
    sure = [job for job, run_dir in runs.items() if (run_dir / "record.json").exists()]
    states = (jobs.settled(list(runs), sure) if runs else {}) or {}
    by_run = {run_dir: states[job] for job, run_dir in runs.items() if job in states}
    records = [_record(point, by_run) for point in points]
    out = report.console()
    report.show_sweep(records, [point.overrides for point in points], out)
    for record in records:
        if record["error"]:
            out.print(report.error_line(record), markup=False, soft_wrap=True)
            if record["run_dir"] and (Path(record["run_dir"]) / LOG).exists():
                out.print(f"  its job's words are in {record['run_dir']}/{LOG}", markup=False, soft_wrap=True)
    print(report.sweep_line(records), flush=True)
    return 1 if any(record["status"] in STATUSES and record["status"] != "ok" for record in records) else 0


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
