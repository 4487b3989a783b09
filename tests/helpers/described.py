"""Descriptions of runs that were never started, for tests of code that takes a description."""

from __future__ import annotations

from typing import Any

from launcher.run_dir.run import RunDescription

NAMES: dict[str, Any] = {
    "backend": {"name": "dummy"},
    "model": {"name": "m", "path": "m"},
    "prompts": {"name": "seed"},
}


def described(config: dict[str, Any] | None = None, **changes: Any) -> RunDescription:
    """The description of a run of the dummy engine by one rank, with these changes."""
    values: dict[str, Any] = {
        "config": NAMES | (config or {}),
        "command": ("python", "-m", "launcher"),
        "folder": "/",
        "model_folder": None,
        "model_config": {},
        "world_size": 1,
        "num_devices": 1,
        "on_cuda": False,
    }
    return RunDescription(**values | changes)
