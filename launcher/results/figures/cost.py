"""The cost of a run: CPU time, energy, money, and the state of its devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

START, LOAD, WARM_UP, REPEATS = "start", "load", "warm-up", "repeats"
PHASES = (START, LOAD, WARM_UP, REPEATS)


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """One phase of a rank or a run. `user_s` and `system_s` include all child processes of the ranks.

    `energy_j` is the energy of the devices (of the CPU packages in a run without GPUs), None if it could not be read.
    """

    phase: str
    seconds: float
    user_s: float
    system_s: float
    energy_j: float | None = None


@dataclass(frozen=True, slots=True)
class DeviceSample:
    """The state of a GPU at a moment, in seconds from the start of its rank; None for values that its driver does not
    report."""

    second: float
    phase: str
    uuid: str
    power_w: float | None
    utilisation: float | None
    sm_clock_mhz: float | None
    temperature_c: float | None


@dataclass(frozen=True, slots=True)
class RankCost:
    """The phases of one rank. One rank of each node reads the energy and the devices of the node; the others have a
    reason instead.

    `slowed_by` are the reasons, by device, why clocks were lower than requested during the repeats.
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
    """The cost of the last attempt of a run over all ranks; the time of a phase is that of the slowest rank.

    `joules_per_token` and `watts` are for the repeats and their new tokens. `per_million_tokens` is in the currency of
    `cost.device_hour`; it covers the repeats only, without load and warm-up.
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
    """The cost of a run from those of its ranks; `new_tokens` is the number of new tokens in all repeats.

    `tokens_per_s` is the speed of the run, `device_hour` the price of a device for one hour.
    """
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
