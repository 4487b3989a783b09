"""One run from its configuration to its record: prepare it, start it on this machine or by SLURM, and watch it.

`run_dir.lifecycle` creates the run directory, `launch.ranks` or `launch.slurm` starts the processes, and
`run_dir.gathering` makes the record.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.launch.batch_search import run_with_largest_batch
from launcher.launch.nodes import check_one_node
from launcher.launch.ranks import Terminated, handled_signals, living, rank_command, started_ranks
from launcher.launch.slurm.arrays import run_job
from launcher.prepare.prepare import prepare
from launcher.rank.watchdog import Watchdog, blame, write_stacks
from launcher.report.layout import console
from launcher.report.progress_bars import Bars, Turn
from launcher.report.run.lengths import lengths_line
from launcher.results.verdict import Outcome
from launcher.run_dir.attempts import ATTEMPT, begin
from launcher.run_dir.gathering import finish
from launcher.run_dir.lifecycle import create_run_dir, directory_of
from launcher.system import processes
from launcher.system.files import writing_in
from launcher.system.gpu_users import neighbours

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.config.schema import RunConfig
    from launcher.launch.ranks import StartedRanks
    from launcher.results.record import Record
    from launcher.run_dir.progress import Progress
    from launcher.run_dir.run import RunDescription
    from launcher.run_dir.run_dir import RunDir

    Show = Callable[[Sequence[Progress | None]], None]

POLL_S = 0.1
LOOK_EVERY = 10  # polls between looks at shared memory


def run(config: RunConfig, command: tuple[str, ...] = (), turn: Turn | None = None) -> Record:
    """Prepare, start and watch one run; returns its record, with `resume=true` the existing one of a finished run.

    `command` composes the same configuration; it is written to the script that repeats the run. `turn` is the position
    in a sweep. UserError if the run cannot start.
    """
    prepared = prepare(config, command)
    check_one_node(prepared.config)
    with writing_in(Path(config.output_dir)):
        if config.measure.find_batch_size:
            return run_with_largest_batch(prepared, start)
        return start(directory_of(prepared), turn)


def run_again(run_dir: RunDir, output_dir: str, command: tuple[str, ...] = ()) -> Record:
    """Repeat a run from the files in its directory, with the same batch size, in a new directory in `output_dir`.

    UserError if the directory contains no run, or if the run cannot start.
    """
    before = run_dir.read_run()
    config = before.run_config
    config.output_dir, config.run_dir, config.resume, config.measure.find_batch_size = output_dir, None, False, False
    beside = Path(before.folder) / config.model.path
    if beside.is_dir():  # a relative path refers to the original working directory
        config.model.path = str(beside)
    prepared = prepare(config, command, run_dir.read_prompts())
    check_one_node(prepared.config)
    with writing_in(Path(output_dir)):
        return start(create_run_dir(prepared))


def start(run_dir: RunDir, turn: Turn | None = None) -> Record:
    """Start or continue the run in a directory, and watch it to its end; returns its record.

    A finished run is not repeated.
    """
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


def run_local(run_dir: RunDir, show: Show) -> Record:
    """Make the next attempt at the run in `run_dir`: start its ranks, watch them to their end, and clean up.

    Returns the record. SIGUSR1 to this process is forwarded to the ranks: they save their work, and the run can be
    resumed. The first SIGINT or SIGTERM ends the run at once; further ones are ignored until the record is written.
    UserError if another process runs the same directory.
    """
    with run_dir.lock():
        run = replace(run_dir.read_run(), mark=run_dir.mark)
        processes.end_run(run.mark)  # left over if the launching process of an earlier attempt was killed
        attempt = begin(run_dir)
        config = run.run_config
        if run.on_cuda and (notes := neighbours(os.environ, config.devices)):
            run_dir.write_notes(notes)
        command = rank_command(run_dir, run)
        run_dir.write_attempt(attempt, command)
        if run.script is not None:
            run_dir.write_script(run.script)
        outcome: Outcome | None = None
        with handled_signals(run_dir, run) as signals:
            try:
                with started_ranks(run_dir, run, command, {ATTEMPT: str(attempt)}, signals) as ranks:
                    outcome = _watch(ranks, run_dir, run, show)
                    signals.is_ending = True
            except KeyboardInterrupt as error:
                outcome = Outcome("cancelled", "interrupted from the keyboard")
                if isinstance(error, Terminated):
                    outcome = Outcome("cancelled", "received SIGTERM")
            return finish(run_dir, outcome)


def _watch(started: StartedRanks, run_dir: RunDir, run: RunDescription, show: Show) -> Outcome | None:
    """Poll until the started process ends, or the watchdog decides that it must end; returns the outcome, None for a
    success."""
    watchdog = Watchdog(run.run_config)
    polls = 0
    while started.process.poll() is None:
        ranks = run_dir.read_progress(run.world_size)
        if polls % LOOK_EVERY == 0:
            started.look_at_memory()
        show(ranks)
        if outcome := watchdog.look(ranks):
            return blame(outcome, ranks, write_stacks(run_dir, living(ranks, run.mark)), run.on_cuda)
        polls += 1
        time.sleep(POLL_S)
    if started.process.returncode == 0:
        return None
    return Outcome("failed", f"the process that starts the ranks ended with exit code {started.process.returncode}")
