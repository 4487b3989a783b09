"""A prepared run, and the description of a run in its directory."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.config.bounds import check
from launcher.config.engines import load_engine
from launcher.config.values import from_dict, to_dict
from launcher.results.record import BatchSearch
from launcher.system import typed
from shards.machine.interpreter import ROOT
from shards.plan.request import MOST_DEVICES

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.backends.base import Prompt
    from launcher.config.schema import RunConfig
    from shards.plan.plan import Plan


NO_MARK = "0" * 32  # the mark of a run without processes


@dataclass(frozen=True, slots=True)
class Run:
    """A run that can start: `world_size` counts its ranks (processes), `num_devices` the devices of all nodes.

    `plan` is None if the engine's memory use is not modelled. `paces` are the decode ceilings of all engines in
    tokens/s, with `at_once` prompts at a time; only for a dry run, or if `machine` is set.
    """

    config: RunConfig
    command: tuple[str, ...]
    model_folder: Path | None
    model_config: dict[str, Any]
    prompts: tuple[Prompt, ...]
    plan: Plan | None
    world_size: int
    num_devices: int
    on_cuda: bool
    notes: tuple[str, ...]
    quality_windows: tuple[tuple[int, ...], ...] = ()
    paces: dict[str, float] = field(default_factory=dict)

    @property
    def at_once(self) -> int:
        """The number of prompts answered at a time: all, or as many as the engine takes."""
        return min(self.config.backend.most_at_once(self.config) or len(self.prompts), len(self.prompts))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDescription:
    """The contents of `run.json`: everything about a run except its plan and its prompts.

    `mark`, together with the device and inode of the run directory, is in the environment of every process of the run.
    `folder` is the working directory of its command.
    """

    config: dict[str, Any]
    command: tuple[str, ...]
    folder: str
    model_folder: str | None
    model_config: dict[str, Any]
    world_size: int
    num_devices: int
    on_cuda: bool
    notes: tuple[str, ...] = ()
    quality_windows: tuple[tuple[int, ...], ...] = ()
    started_at: float = 0.0
    mark: str = NO_MARK
    batch_search: BatchSearch | None = None

    @classmethod
    def from_plain(cls, values: Any) -> RunDescription:
        """The inverse of `typed.to_plain`; ValueError, UserError or one of MALFORMED for an invalid description."""
        run = typed.decode(values, cls)
        if not re.fullmatch("[0-9a-f]{32}", run.mark):
            raise ValueError(f"mark={run.mark!r} is not one of 32 hexadecimal digits")
        if not 1 <= run.world_size <= MOST_DEVICES:
            raise ValueError(f"world_size={run.world_size} is not from 1 to {MOST_DEVICES}")
        check(run.run_config)
        return run

    @property
    def run_config(self) -> RunConfig:
        """The configuration, as a new object for each call."""
        return from_dict(self.config)

    @property
    def label(self) -> str:
        """Engine and model, as a title."""
        return f"{self.config['backend']['name']} {self.config['model']['name']}"

    @property
    def script(self) -> str | None:
        """A shell script that repeats the run; None for a run that was not started by a command."""
        if not self.command:
            return None
        asked = [word for word in self.command[1:] if not word.startswith("resume=")]
        lines = (
            "#!/bin/sh",
            f"cd {shlex.quote(self.folder)} || exit 1",
            f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
            f"exec {shlex.join([sys.executable, *asked])}",
            "",
        )
        return "\n".join(lines)

    @property
    def answering_ranks(self) -> range:
        """The ranks that save answers: all if the engine is data-parallel, otherwise only the first."""
        backend = load_engine(self.config["backend"]["name"])(**self.config["backend"])
        return range(self.world_size if backend.data_parallel else 1)


def describe(
    run: Run, started_at: float = 0.0, mark: str = NO_MARK, batch_search: BatchSearch | None = None
) -> RunDescription:
    """The description of a run; without `started_at` and `mark` for a dry run, which is not started."""
    return RunDescription(
        config=to_dict(run.config),
        command=run.command,
        folder=os.getcwd(),
        model_folder=str(run.model_folder) if run.model_folder else None,
        model_config=run.model_config,
        world_size=run.world_size,
        num_devices=run.num_devices,
        on_cuda=run.on_cuda,
        notes=run.notes,
        quality_windows=run.quality_windows,
        started_at=started_at,
        mark=mark,
        batch_search=batch_search,
    )
