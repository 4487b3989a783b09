"""A run -> its directory, with all that a rank needs."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launcher.config.values import to_dict
from launcher.prompts.prompts import write_prompts
from launcher.system.files import make_folder, write_json, write_text

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from launcher.run_dir.run import Run


def create_run_dir(run: Run, batch_search: dict[str, Any] | None = None) -> Path:
    """A new folder that no other run has, with everything a rank reads, and how its batch was found if it was."""
    run_dir = new_folder(run.config)
    try:
        write_text(run_dir / "config.yaml", yaml.safe_dump(to_dict(run.config), sort_keys=False))
        write_json(run_dir / "plan.json", run.plan.to_dict())
        write_prompts(run_dir / "prompts.jsonl", run.prompts)
        own = {"started_at": time.time(), "mark": uuid.uuid4().hex, "batch_search": batch_search}
        write_json(run_dir / "run.json", described(run) | own)
    except OSError:
        shutil.rmtree(run_dir, ignore_errors=True)  # half of one is of no use, and what is full has its room again
        raise
    return run_dir


def described(run: Run) -> dict[str, Any]:
    """What `run.json` says of a run, beside when it began and the mark of its processes."""
    return {
        "config": to_dict(run.config),
        "command": list(run.command),
        "folder": os.getcwd(),
        "model_folder": str(run.model_folder) if run.model_folder else None,
        "model_config": run.model_config,
        "processes": run.processes,
        "world_size": run.world_size,
        "on_cuda": run.on_cuda,
        "notes": list(run.notes),
    }


def new_folder(config: RunConfig, suffix: str = "") -> Path:
    """A folder in `output_dir` that no other run has; UserError where none can be made."""
    world_size = config.devices * config.num_nodes
    model = re.sub(r"[^A-Za-z0-9._-]", "_", config.model.name)[:100]
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{config.backend.name}_{model}_x{world_size}{suffix}"
    return make_folder(Path(config.output_dir), name)
