"""The points of a run: one, or a sweep. Each is a fresh set of processes; what one breaks the next does not feel."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.values import from_dict, to_dict
from launcher.launch import resume
from launcher.launch.batch_search import run_with_largest_batch
from launcher.launch.local import run_local
from launcher.launch.nodes import check_one_node
from launcher.launch.slurm import arrays
from launcher.prepare.prepare import prepare
from launcher.report import comparison_table
from launcher.report import tables as report
from launcher.report.progress_bars import Bars
from launcher.results.comparison import alike, read_run
from launcher.results.record import never_begun
from launcher.system.files import read_json, writing_in
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.config.schema import RunConfig


def run_point(config: RunConfig, command: tuple[str, ...]) -> dict[str, Any]:
    """Prepare, start and watch one run on this machine; its record, which may be there already with `resume=true`."""
    run = prepare(config, command)
    check_one_node(run.config)
    with writing_in(Path(config.output_dir)):
        if config.measure.find_batch_size:
            return run_with_largest_batch(run, finish_run)
        run_dir, _ = resume.directory_of(run)
        return finish_run(run_dir)


def finish_run(run_dir: Path) -> dict[str, Any]:
    """The record of the run in `run_dir`, which is started, or goes on, unless it is done."""
    if resume.is_done(run_dir):
        return dict(read_json(run_dir / "record.json"))
    config = read_json(run_dir / "run.json")["config"]
    if config["launch"]["name"] == "slurm":
        return arrays.run_job(run_dir)
    check_one_node(from_dict(config))
    title = f"{config['backend']['name']} {config['model']['name']}"
    with writing_in(run_dir), Bars(title, report.console(stderr=True)) as bars:
        return run_local(run_dir, bars.show)


def sweep(points: Sequence[Sequence[str]], configs: Sequence[RunConfig], commands: Sequence[tuple[str, ...]]) -> int:
    """Run every point, which is composed already, and print one table of them all; the exit code."""
    local = [place for place, config in enumerate(configs) if config.launch.name != "slurm"]
    others = [place for place in range(len(points)) if place not in local]
    made: dict[int, dict[str, Any]] = {}
    with contextlib.suppress(KeyboardInterrupt):  # between two points, or before the ranks of one have begun
        for place in local:
            made[place] = _run_here(configs[place], commands[place])
            if made[place]["status"] == "cancelled":
                break
    is_ended = any(place not in made or made[place]["status"] == "cancelled" for place in local)
    for place in range(len(points)) if is_ended else ():
        made.setdefault(place, _left_out(configs[place]))
    if others and not is_ended:
        queued = arrays.run_points([configs[place] for place in others], [commands[place] for place in others])
        made |= dict(zip(others, queued, strict=True))
    records = [made[place] for place in range(len(points))]
    report.show_sweep(records, [_varied(point, points) for point in points], report.console())
    show_parity(records)
    print(report.sweep_line(records), flush=True)
    return exit_code(records)


def _run_here(config: RunConfig, command: tuple[str, ...]) -> dict[str, Any]:
    """The record of one point of a sweep, whatever becomes of it."""
    try:
        record = run_point(config, command)
    except UserError as error:
        record = resume.refusal(config, error)
    report.show_point(command[3:], record, report.console(stderr=True))
    return record


def _left_out(config: RunConfig) -> dict[str, Any]:
    """The record of a point behind one that somebody ended: the sweep was meant."""
    return never_begun(to_dict(config), "the sweep was ended before its turn", time.time())


def show_parity(records: Sequence[dict[str, Any]]) -> None:
    """Print the points that answered the same prompts with the same model against the first of them."""
    ended = [read_run(Path(record["run_dir"])) for record in records if record["status"] == "ok"]
    for group in alike(ended):
        comparison_table.show(group, report.console())


def _varied(point: Sequence[str], points: Sequence[Sequence[str]]) -> list[str]:
    """What of a point differs from the other points."""
    return [item for item in point if not all(item in other for other in points)] or list(point)


def exit_code(records: Sequence[dict[str, Any]]) -> int:
    """0 all ok or left to a cluster; 2 where the only run was refused; 1 otherwise."""
    statuses = [record["status"] for record in records]
    if all(status in ("ok", "submitted") for status in statuses):
        return 0
    return 2 if statuses == ["refused"] else 1
