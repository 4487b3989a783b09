"""Which directory a run belongs in: a new one, or that of the same run which was begun before."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launcher.config.schema import HOW_IT_IS_RUN, ConfigError
from launcher.config.values import to_dict
from launcher.prompts.prompts import read_prompts
from launcher.results.record import refused
from launcher.run_dir.create import create_run_dir, described, new_folder
from launcher.system.files import read_json, write_json, write_text
from shards.errors import UserError

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from launcher.run_dir.run import Run


def directory_of(run: Run) -> tuple[Path, bool]:
    """The run directory, and whether the run in it is done: a new one, unless `resume=true` finds one to go on with.

    It is the same run where model, prompts and all of the resolved configuration that says what is run are the same;
    of several the one that is done, else the latest.
    """
    found = [path for path in _begun(Path(run.config.output_dir)) if _is_same(path, run)] if run.config.resume else []
    if not found:
        return create_run_dir(run), False
    chosen = max(found, key=lambda path: (is_done(path), _started_at(path)))
    if not is_done(chosen):
        now = described(run)  # the limits of time may be others than before
        write_json(chosen / "run.json", read_json(chosen / "run.json") | now)
    return chosen, is_done(chosen)


def refusal(config: RunConfig, error: UserError) -> dict[str, Any]:
    """The record of a point that is refused, in a directory of its own: with `resume=true` the one it had before."""
    plain = to_dict(config)
    try:
        found = [path for path in _refused(Path(config.output_dir)) if _of(path) == what_is_run(plain)]
        run_dir = found[0] if found and config.resume else new_folder(config)
        write_text(run_dir / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
        record = refused(plain, error, time.time(), run_dir)
        write_json(run_dir / "record.json", record)
    except (UserError, OSError):
        return refused(plain, error, time.time())  # nothing can be written there, which may be why it is refused
    return record


def is_done(run_dir: Path) -> bool:
    """Whether the run has ended well."""
    record = _read(run_dir / "record.json")
    return record is not None and record.get("status") == "ok"


def checked(run_dir: Path) -> Path:
    """`run_dir` if it is a run directory; ConfigError if not."""
    if _read(run_dir / "run.json") is None:
        raise ConfigError(f"{run_dir} has no run.json: no run was begun there.", "run_dir= a folder in output_dir")
    return run_dir.resolve()


def what_is_run(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration by which two runs are the same point."""
    return {name: value for name, value in config.items() if name not in HOW_IT_IS_RUN}


def _begun(output_dir: Path) -> list[Path]:
    """The folders of runs that have all that a rank reads."""
    return [path.parent.resolve() for path in output_dir.glob("*/run.json")]


def _refused(output_dir: Path) -> list[Path]:
    """The folders of points that were refused before they had more than a record."""
    return [
        path.parent.resolve() for path in output_dir.glob("*/record.json") if not (path.parent / "run.json").exists()
    ]


def _of(run_dir: Path) -> dict[str, Any] | None:
    """What was to be run in a folder, by its record."""
    record = _read(run_dir / "record.json")
    return what_is_run(record["config"]) if record else None


def _started_at(run_dir: Path) -> float:
    return float((_read(run_dir / "run.json") or {"started_at": 0.0})["started_at"])


def _is_same(run_dir: Path, run: Run) -> bool:
    before = _read(run_dir / "run.json")
    if before is None or what_is_run(before["config"]) != what_is_run(to_dict(run.config)):
        return False
    if before["model_config"] != run.model_config or before["world_size"] != run.world_size:
        return False
    return read_prompts(run_dir / "prompts.jsonl") == list(run.prompts)


def _read(path: Path) -> dict[str, Any] | None:
    """What is in a file of a run that may have been killed at any moment."""
    try:
        found: dict[str, Any] | None = read_json(path)
    except (OSError, ValueError):
        return None
    return found
