"""Create or find the directory of a run, with everything that a rank reads.

Also makes the records of runs without results: refused, never begun, or unfinished.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from launcher.config.schema import HOW_IT_IS_RUN
from launcher.config.values import to_dict
from launcher.results.record import Record, RunError
from launcher.run_dir.run import describe
from launcher.run_dir.run_dir import RunDir, run_dirs_in
from launcher.system.files import make_folder
from shards.errors import UserError

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from launcher.results.record import BatchSearch
    from launcher.run_dir.run import Run, RunDescription
    from shards.untrusted_files import JsonObject


def directory_of(run: Run) -> RunDir:
    """The run directory: a new one, unless `resume=true` and the same run was begun before.

    Runs are the same if the model, the number of devices, the prompts and the relevant part of the configuration are
    equal. Of several such directories a finished one is preferred, then the latest.
    """
    begun = _begun(run)
    if not begun:
        return create_run_dir(run)
    chosen, description = max(begun, key=lambda item: (item[0].is_done(), item[1].started_at))
    if not chosen.is_done():  # settings that do not define the run, such as timeouts, may have changed
        chosen.write_run(describe(run, description.started_at, description.mark, description.batch_search))
    return chosen


def create_run_dir(run: Run, batch_search: BatchSearch | None = None) -> RunDir:
    """Create a new run directory with everything that a rank reads, and with the result of a batch search."""
    run_dir = RunDir(new_folder(run.config))
    description = describe(run, time.time(), uuid.uuid4().hex, batch_search)
    try:
        run_dir.write_config(yaml.safe_dump(description.config, sort_keys=False))
        run_dir.write_plan(run.plan)
        run_dir.write_prompts(run.prompts)
        run_dir.write_run(description)
    except OSError:
        shutil.rmtree(run_dir.path, ignore_errors=True)  # an incomplete directory is useless; free its disk space
        raise
    return run_dir


def new_folder(config: RunConfig, suffix: str = "") -> Path:
    """Create a new folder in `output_dir`; UserError if that is not possible."""
    model = re.sub(r"[^A-Za-z0-9._-]", "_", config.model.name)[:100]
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.backend.name}_{model}_x{config.num_devices}{suffix}"
    return make_folder(Path(config.output_dir), name)


def what_is_run(config: JsonObject) -> JsonObject:
    """The part of a resolved configuration that is compared to decide whether two runs are the same point."""
    return {name: value for name, value in config.items() if name not in HOW_IT_IS_RUN}


def _begun(run: Run) -> list[tuple[RunDir, RunDescription]]:
    """The directories of earlier starts of the same run; none without `resume=true`. Unreadable ones are skipped."""
    if not run.config.resume:
        return []
    same = []
    point = what_is_run(to_dict(run.config))
    for run_dir in run_dirs_in(Path(run.config.output_dir)):
        with contextlib.suppress(UserError):
            before = run_dir.read_run()
            if (
                what_is_run(before.config) == point
                and before.model_config == run.model_config
                and before.num_devices == run.num_devices
                and run_dir.read_prompts() == list(run.prompts)
            ):
                same.append((run_dir, before))
    return same


def refused(config: RunConfig, error: UserError, moment: float, run_dir: RunDir | None = None) -> Record:
    """The record of a run that could not start."""
    why = RunError(None, "plan", type(error).__name__, error.fact, error.hint)
    record = replace(blank(config, "refused"), error=why, started_at=moment, ended_at=moment)
    if run_dir is None:
        return record
    return replace(record, run_dir=str(run_dir))


def refusal(config: RunConfig, error: UserError) -> Record:
    """The record of a refused point, written to a new directory; with `resume=true` to that of its first refusal."""
    try:
        run_dir = _refused(config) or RunDir(new_folder(config))
        run_dir.write_config(yaml.safe_dump(to_dict(config), sort_keys=False))
        record = refused(config, error, time.time(), run_dir)
        return run_dir.write_record(record)
    except (UserError, OSError):
        return refused(config, error, time.time())  # output_dir is not writable


def _refused(config: RunConfig) -> RunDir | None:
    """The first directory that contains only the record of a refusal of the same point; None without `resume=true`."""
    if not config.resume:
        return None
    point = what_is_run(to_dict(config))
    for run_dir in run_dirs_in(Path(config.output_dir)):
        with contextlib.suppress(UserError):
            if run_dir.has_run():
                continue
            record = run_dir.read_record()
            if record is not None and what_is_run(record.config) == point:
                return run_dir
    return None


def never_begun(config: RunConfig, message: str, moment: float) -> Record:
    """The record of a point that was never started."""
    why = RunError(None, "start", "Ended", message, "resume=true")
    return replace(blank(config, "cancelled"), error=why, started_at=moment, ended_at=moment)


def unfinished(run_dir: RunDir, status: str) -> Record:
    """The record of a run that has not ended, from its description."""
    run = run_dir.read_run()
    return replace(
        blank(run.run_config, status),
        world_size=run.world_size,
        num_devices=run.num_devices,
        config=run.config,
        run_dir=str(run_dir),
        started_at=run.started_at,
        batch_search=run.batch_search,
        notes=run.notes,
        command=run.command,
    )


def blank(config: RunConfig, status: str) -> Record:
    """A record that contains only the configuration of a run."""
    batch_size = None  # the engine forms its own batches
    if not config.backend.continuous_batching:
        batch_size = config.measure.batch_size
    return Record(
        status=status,
        backend=config.backend.name,
        model=config.model.name,
        precision=config.precision.name,
        world_size=config.world_size,
        num_devices=config.num_devices,
        num_nodes=config.num_nodes,
        batch_size=batch_size,
        config=to_dict(config),
    )
