"""A run that can start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.backends.base import Prompt
    from launcher.config.schema import RunConfig
    from shards.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Run:
    """A run that can start: `processes` are started by the launcher, `world_size` devices take part.

    `paces` are the decode ceilings of all engines, for a dry run only.
    """

    config: RunConfig
    command: tuple[str, ...]
    model_folder: Path | None
    model_config: dict[str, Any]
    prompts: tuple[Prompt, ...]
    plan: Plan
    processes: int
    world_size: int
    on_cuda: bool
    notes: tuple[str, ...]
    paces: dict[str, float]
