"""The cost of a run: time of the processors, energy, money, and the state of its devices meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

START, LOAD, WARM_UP, REPEATS = "start", "load", "warm-up", "repeats"
PHASES = (START, LOAD, WARM_UP, REPEATS)


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """One phase of a rank or a run. `user_s` and `system_s` are of the ranks and all processes that they started.

    `energy_j` is of the devices (of a run without GPUs of the CPU packages), None where it could not be read.
    """

    phase: str
    seconds: float
    user_s: float
    system_s: float
    energy_j: float | None = None


@dataclass(frozen=True, slots=True)
class DeviceSample:
    """A GPU at a moment, in seconds from the start of its rank; None is what its driver does not tell."""

    second: float
    phase: str
    uuid: str
    power_w: float | None
    utilisation: float | None
    sm_clock_mhz: float | None
    temperature_c: float | None


@dataclass(frozen=True, slots=True)
class RankCost:
    """The phases of one rank. Of each node one rank reads the energy and the devices of all: the others have a reason.

    `slowed_by` are the reasons for which clocks were lower than asked for in the repeats, by device.
    """

    phases: tuple[PhaseCost, ...]
    is_meter: bool
    energy_source: str | None = None
    energy_reason: str | None = None
    samples: tuple[DeviceSample, ...] = ()
    samples_reason: str | None = None
    slowed_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of the last attempt at a run, all ranks together; of `phases` the longest time of a rank.

    `joules_per_token` and `watts` are of the repeats, whose new tokens count. `per_million_tokens` is in the money of
    `cost.device_hour`: devices are paid for while the repeats last, and neither load nor warm-up is in it.
    """

    phases: tuple[PhaseCost, ...]
    user_s: float
    system_s: float
    joules_per_token: float | None
    watts: float | None
    energy_source: str | None
    energy_reason: str | None
    device_hour: float | None
    per_million_tokens: float | None
    samples: tuple[DeviceSample, ...]
    samples_reason: str | None
    slowed_by: tuple[str, ...]


def cost_of(
    ranks: Sequence[RankCost], new_tokens: int, tokens_per_s: float | None, num_devices: int, device_hour: float | None
) -> Cost | None:
    """The cost of a run from those of its ranks; `new_tokens` are those of all repeats that these made."""
    if not ranks:
        return None
    meters = [rank for rank in ranks if rank.is_meter]
    phases = [_together(phase, ranks, meters) for phase in PHASES]
    known = [phase for phase in phases if phase is not None]
    repeats = phases[PHASES.index(REPEATS)]
    joules_per_token = watts = per_million = None
    if repeats and repeats.energy_j is not None:
        if new_tokens:
            joules_per_token = repeats.energy_j / new_tokens
        if repeats.seconds:
            watts = repeats.energy_j / repeats.seconds
    if device_hour is not None and tokens_per_s:
        per_million = device_hour * num_devices / 3600 / tokens_per_s * 1e6
    return Cost(
        phases=tuple(known),
        user_s=sum(phase.user_s for phase in known),
        system_s=sum(phase.system_s for phase in known),
        joules_per_token=joules_per_token,
        watts=watts,
        energy_source=next((rank.energy_source for rank in meters), None),
        energy_reason=next((rank.energy_reason for rank in meters if rank.energy_reason), None),
        device_hour=device_hour,
        per_million_tokens=per_million,
        samples=tuple(sample for rank in meters for sample in rank.samples),
        samples_reason=next((rank.samples_reason for rank in meters if rank.samples_reason), None),
        slowed_by=tuple(dict.fromkeys(reason for rank in meters for reason in rank.slowed_by)),
    )


def _together(phase: str, ranks: Sequence[RankCost], meters: Sequence[RankCost]) -> PhaseCost | None:
    parts = [part for rank in ranks for part in rank.phases if part.phase == phase]
    if not parts:
        return None
    energies = [part.energy_j for rank in meters for part in rank.phases if part.phase == phase]
    known = [energy for energy in energies if energy is not None]
    energy_j = None
    if known and len(known) == len(energies):
        energy_j = sum(known)
    return PhaseCost(
        phase,
        max(part.seconds for part in parts),
        sum(part.user_s for part in parts),
        sum(part.system_s for part in parts),
        energy_j,
    )
