"""One run from its configuration to its record: prepared here, started on this machine or by SLURM, watched to its end.

Its directory is made in `run_dir.create`, its processes are started in `launch.local` or `launch.slurm`, and its record
is written in `run_dir.finish`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from launcher.launch.batch_search import run_with_largest_batch
from launcher.launch.local import run_local
from launcher.launch.nodes import check_one_node
from launcher.launch.slurm.arrays import run_job
from launcher.prepare.prepare import prepare
from launcher.report.layout import console
from launcher.report.lengths import lengths_line
from launcher.report.progress_bars import Bars, Turn
from launcher.run_dir.create import create_run_dir, directory_of
from launcher.system.files import writing_in

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from launcher.results.record import Record
    from launcher.run_dir.run_dir import RunDir


def run(config: RunConfig, command: tuple[str, ...] = (), turn: Turn | None = None) -> Record:
    """Prepare, start and watch one run; its record, which may be there already with `resume=true`.

    `command` is what composes the same configuration, for the script that makes the run once more; `turn` says which
    point of a sweep it is. UserError for whatever keeps the run from starting.
    """
    prepared = prepare(config, command)
    check_one_node(prepared.config)
    with writing_in(Path(config.output_dir)):
        if config.measure.find_batch_size:
            return run_with_largest_batch(prepared, start)
        return start(directory_of(prepared), turn)


def run_again(run_dir: RunDir, output_dir: str, command: tuple[str, ...] = ()) -> Record:
    """Make a run once more from its directory alone, with the batch that it had, in a new directory of `output_dir`.

    UserError for a directory that has no run, and for whatever keeps the run from starting.
    """
    before = run_dir.read_run()
    config = before.run_config
    config.output_dir, config.run_dir, config.resume, config.measure.find_batch_size = output_dir, None, False, False
    beside = Path(before.folder) / config.model.path
    if beside.is_dir():  # as it was found from where the command was given
        config.model.path = str(beside)
    prepared = prepare(config, command, run_dir.read_prompts())
    check_one_node(prepared.config)
    with writing_in(Path(output_dir)):
        return start(create_run_dir(prepared))


def start(run_dir: RunDir, turn: Turn | None = None) -> Record:
    """Start the run in a directory, or go on with it, and watch it to its end; its record. A run that is done stays."""
    if run_dir.is_done() and (record := run_dir.read_record()):
        return record
    description = run_dir.read_run()
    config = description.run_config
    if config.launch.name == "slurm":
        return run_job(run_dir)
    check_one_node(config)
    if (err := console(stderr=True)).is_terminal:
        err.print(lengths_line(run_dir.read_prompts()))
    bars = Bars(description.label, err, turn, description.answering_ranks)
    with writing_in(run_dir.path), bars:
        return run_local(run_dir, bars.show)
