"""The directory of a run: a new one with all that a rank needs, or that of the same run which was begun before."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launcher.config.schema import HOW_IT_IS_RUN
from launcher.config.values import to_dict
from launcher.run_dir.finish import refused
from launcher.run_dir.run import describe
from launcher.run_dir.run_dir import RunDir, run_dirs_in
from launcher.system.files import make_folder
from shards.errors import UserError

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from launcher.results.record import BatchSearch, Record
    from launcher.run_dir.run import Run, RunDescription


def directory_of(run: Run) -> RunDir:
    """The run directory: a new one, unless `resume=true` and the same run was begun before.

    It is the same run where model, prompts and all of the resolved configuration that says what is run are the same;
    of several the one that is done, else the latest.
    """
    before = _begun(run) if run.config.resume else []
    if not before:
        return create_run_dir(run)
    chosen, description = max(before, key=lambda item: (item[0].is_done(), item[1].started_at))
    if not chosen.is_done():  # the limits of time may be others than before
        chosen.write_run(describe(run, description.started_at, description.mark, description.batch_search))
    return chosen


def create_run_dir(run: Run, batch_search: BatchSearch | None = None) -> RunDir:
    """A new directory that no other run has, with everything a rank reads, and how its batch was searched if it was."""
    run_dir = RunDir(new_folder(run.config))
    description = describe(run, time.time(), uuid.uuid4().hex, batch_search)
    try:
        run_dir.write_config(yaml.safe_dump(description.config, sort_keys=False))
        run_dir.write_plan(run.plan)
        run_dir.write_prompts(run.prompts)
        run_dir.write_run(description)
    except OSError:
        shutil.rmtree(run_dir.path, ignore_errors=True)  # half of one is of no use, and a full disk has its room again
        raise
    return run_dir


def new_folder(config: RunConfig, suffix: str = "") -> Path:
    """A folder in `output_dir` that no other run has; UserError where none can be made."""
    model = re.sub(r"[^A-Za-z0-9._-]", "_", config.model.name)[:100]
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.backend.name}_{model}_x{config.num_devices}{suffix}"
    return make_folder(Path(config.output_dir), name)


def refusal(config: RunConfig, error: UserError) -> Record:
    """The record of a point that is refused, in a directory of its own: with `resume=true` the one it had before."""
    try:
        before = _refused(config) if config.resume else []
        run_dir = before[0] if before else RunDir(new_folder(config))
        run_dir.write_config(yaml.safe_dump(to_dict(config), sort_keys=False))
        record = refused(config, error, time.time(), run_dir)
        return run_dir.write_record(record)
    except (UserError, OSError):
        return refused(config, error, time.time())  # nothing can be written there, which may be why it is refused


def what_is_run(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration by which two runs are the same point."""
    return {name: value for name, value in config.items() if name not in HOW_IT_IS_RUN}


def _begun(run: Run) -> list[tuple[RunDir, RunDescription]]:
    """The directories of the same run that have all that a rank reads; those that cannot be read are passed over."""
    same = []
    asked = what_is_run(to_dict(run.config))
    for run_dir in run_dirs_in(Path(run.config.output_dir)):
        with contextlib.suppress(UserError):
            before = run_dir.read_run()
            if (
                what_is_run(before.config) == asked
                and before.model_config == run.model_config
                and before.num_devices == run.num_devices
                and run_dir.read_prompts() == list(run.prompts)
            ):
                same.append((run_dir, before))
    return same


def _refused(config: RunConfig) -> list[RunDir]:
    """The directories in which the same point was refused before, with a record and nothing more."""
    same = []
    asked = what_is_run(to_dict(config))
    for run_dir in run_dirs_in(Path(config.output_dir)):
        with contextlib.suppress(UserError):
            record = None if run_dir.has_run() else run_dir.read_record()
            if record is not None and what_is_run(record.config) == asked:
                same.append(run_dir)
    return same
