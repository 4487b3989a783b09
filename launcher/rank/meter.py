"""Measure the cost of a rank while it works: CPU time, energy, and the state of the node's devices."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from launcher.results.figures.cost import REPEATS, START, WARM_UP, DeviceSample, PhaseCost, RankCost
from shards.errors import UserError
from shards.machine.cards import cuda_devices
from shards.machine.nvml import NvmlError, kept_open, readings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.config.schema import RunConfig
    from shards.machine.nvml import Reading
    from shards.machine.world import World

SAMPLE_S = 0.2
MOST_SAMPLES = 1000
"""The most samples kept by a rank: beyond that, every second sample is dropped and the sampling interval doubled."""

POWERCAP = Path("/sys/class/powercap")
NVML, RAPL = "NVML", "RAPL"
OTHER_RANK = "another rank of the node reads its devices"


@dataclass(frozen=True, slots=True)
class Moment:
    """The counters at one moment: seconds since the start, CPU seconds, and joules by device or CPU package."""

    second: float
    user_s: float
    system_s: float
    energy_j: dict[str, float]


class Meter:
    """Measures the costs of this process and its children in each phase; on the first rank of a node also the energy
    and state of the node's devices.

    A thread samples the devices every SAMPLE_S seconds.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self.is_meter = world.local_rank == 0
        self.uuids: list[str] = []
        self.packages: list[Path] = []
        if self.is_meter and config.accelerator.value == "cuda":
            with contextlib.suppress(UserError):  # the engine reports this error
                devices = cuda_devices(os.environ)[: config.devices]
                self.uuids = [device.uuid for device in devices if device.uuid is not None]
        elif self.is_meter:
            self.packages = packages()
        self.phase = START
        self.phases: list[PhaseCost] = []
        self.samples: list[DeviceSample] = []
        self.slowed_by: dict[str, None] = {}
        self.interval_s = SAMPLE_S
        self._began = psutil.Process().create_time()
        self._last = Moment(0.0, 0.0, 0.0, self._energy())
        self._ended = threading.Event()
        self._is_sampling = False

    def enter(self, phase: str) -> None:
        """End the current phase and begin another.

        Sampling starts after the model is loaded: until then engines may fork, which is unsafe during an NVML call.
        """
        user_s, system_s = cpu_times()
        now, last = Moment(time.time() - self._began, user_s, system_s, self._energy()), self._last
        energy_j, before, after = None, last.energy_j, now.energy_j
        if before and before.keys() == after.keys() and all(after[name] >= before[name] for name in before):
            energy_j = sum(after[name] - before[name] for name in before)  # no counter was reset or wrapped
        self.phases.append(
            PhaseCost(
                self.phase,
                now.second - last.second,
                now.user_s - last.user_s,
                now.system_s - last.system_s,
                energy_j,
            )
        )
        self.phase, self._last = phase, now
        if phase in (WARM_UP, REPEATS) and self.uuids and not self._is_sampling:
            self._is_sampling = True
            threading.Thread(target=self._sample, daemon=True, name="meter").start()

    def end(self) -> RankCost:
        """End the last phase; returns the costs of all phases."""
        self._ended.set()
        self.enter("")
        reason = f"no NVIDIA device, and no energy counter in {POWERCAP}"
        if not self.is_meter:
            reason = OTHER_RANK
        elif self.uuids:
            reason = "the driver does not tell"
        elif self.packages:
            reason = "no NVIDIA device"
        cost = RankCost(
            phases=tuple(self.phases),
            is_meter=self.is_meter,
            energy_source=None,
            energy_reason=reason,
            samples=tuple(self.samples),
            samples_reason=reason,
            slowed_by=tuple(self.slowed_by),
        )
        if self.samples:
            cost = replace(cost, samples_reason=None)
        if all(phase.energy_j is None for phase in self.phases):
            return cost
        if self.uuids:
            return replace(cost, energy_source=NVML, energy_reason=None)
        return replace(cost, energy_source=RAPL, energy_reason=None)

    def _energy(self) -> dict[str, float]:
        known = {reading.uuid: reading.energy_j for reading in self._readings() if reading.energy_j is not None}
        for package in self.packages:
            with contextlib.suppress(OSError, ValueError):
                known[package.name] = int((package / "energy_uj").read_text()) / 1e6
        return known

    def _readings(self) -> Sequence[Reading]:
        if not self.uuids:
            return ()
        with contextlib.suppress(NvmlError):
            return readings(self.uuids)
        return ()

    def _sample(self) -> None:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(NvmlError):
                stack.enter_context(kept_open())
            while not self._ended.wait(self.interval_s):
                for reading in self._readings():
                    second = time.time() - self._began
                    state = (reading.power_w, reading.utilisation, reading.sm_clock_mhz, reading.temperature_c)
                    self.samples.append(DeviceSample(second, self.phase, reading.uuid, *state))
                    if self.phase == REPEATS:
                        self.slowed_by |= {f"{reading.uuid}: {reason}": None for reason in reading.slowed_by}
                if len(self.samples) > MOST_SAMPLES:
                    devices = max(len(self.uuids), 1)
                    self.samples = [sample for place, sample in enumerate(self.samples) if place // devices % 2 == 0]
                    self.interval_s *= 2


def packages(folder: Path = POWERCAP) -> list[Path]:
    """The folders of CPU packages with a readable RAPL energy counter; often only root may read them."""
    counters = sorted(folder.glob("intel-rapl:[0-9]")) + sorted(folder.glob("intel-rapl:[0-9][0-9]"))
    return [package for package in counters if os.access(package / "energy_uj", os.R_OK)]


def cpu_times() -> tuple[float, float]:
    """User and system CPU time in seconds of this process and all its children, including those that have ended."""
    this = psutil.Process()
    user_s = system_s = 0.0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            user_s += times.user + times.children_user
            system_s += times.system + times.children_system
    return user_s, system_s
