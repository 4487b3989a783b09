"""A published measurement, as part of the configuration that reproduces it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MISSING: Any = "???"  # OmegaConf's marker of a mandatory value


FIGURES = ("new_tokens_per_s", "generation_s", "load_s", "user_s", "system_s", "peak_memory_gb")
"""Names of published figures; the last word is the unit."""


@dataclass
class FigureConfig:
    """One published figure: tokens/s, the time of the whole generation, memory of a device, or another time."""

    name: str = MISSING  # one of FIGURES
    value: float = MISSING
    unit: str = MISSING


@dataclass
class ExperimentConfig:
    """A published measurement that a preset of conf/experiment reproduces; nothing here changes the run."""

    name: str | None = None
    about: str | None = None
    hardware: str | None = None  # a value of `python -m launcher.plan machines=`; None: the source does not name it
    source: str | None = None
    location: str | None = None
    unknown: list[str] = field(default_factory=list)  # details that the source does not give
    needs: list[str] = field(default_factory=list)  # required options that this launcher does not have yet
    notes: list[str] = field(default_factory=list)
    figures: list[FigureConfig] = field(default_factory=list)
