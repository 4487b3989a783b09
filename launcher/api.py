"""The Python API: `from launcher import compose, make_plan, run, sweep, load_record`; the commands use it, too.

Mistakes that the user can fix raise `UserError`, with one line that has the fact and a hint. A failed run raises no
exception: the status of its record says how it ended.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.composition.compose import compose_run
from launcher.config.engines import NO_PLAN, planned_engines
from launcher.launch.run import run
from launcher.launch.sweep import points_of, run_points
from launcher.prepare.prepare import prepare
from launcher.run_dir.run_dir import RECORD, RunDir
from shards.errors import PlanError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from launcher.config.schema import RunConfig
    from launcher.results.record import Record
    from shards.plan.plan import Plan

__all__ = ["UserError", "compose", "load_record", "make_plan", "run", "sweep"]


def compose(*overrides: str, config_dirs: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of one run, from command-line overrides such as `backend=fsdp` and `devices=2`."""
    return compose_run(list(overrides), tuple(config_dirs))


def make_plan(config: RunConfig) -> Plan:
    """Plan a run: the memory of each device and the speed limit. Starts nothing, and needs neither weights nor GPUs.

    PlanError, a UserError, if the model cannot be split like this, does not fit, or the engine has no planner.
    """
    plan = prepare(replace(config, dry_run=True), ()).plan
    if plan is None:
        raise PlanError(f"backend={config.backend.name} has {NO_PLAN}.", f"backend={planned_engines()[0]}")
    return plan


def sweep(*overrides: str, config_dirs: Sequence[str] = ()) -> list[Record]:
    """Run every point of a sweep such as `backend=fsdp,vllm`, the last key varying fastest; returns their records."""
    return run_points(points_of(overrides, config_dirs))


def load_record(path: str | PathLike[str]) -> Record:
    """The record in a run directory, of this or an older schema version; UserError if there is none."""
    record = RunDir(Path(path)).read_record()
    if record is None:
        raise UserError(f"{path} has no {RECORD}.", "the folder of a run that has ended")
    return record
