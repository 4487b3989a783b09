"""A run -> its directory, with all that a rank needs."""

from __future__ import annotations

import re
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from launcher.run_dir.run import describe
from launcher.run_dir.run_dir import RunDir
from launcher.system.files import make_folder

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from launcher.results.record import BatchSearch
    from launcher.run_dir.run import Run


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
