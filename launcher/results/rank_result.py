"""The result that one rank writes at its end, for the record."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.backends.base import Compilation, DeviceMemory, LoadTimes
from launcher.results.figures.cost import RankCost
from launcher.results.figures.quality import Quality
from launcher.results.measured import Repeat
from launcher.results.record import RankRecord, RunError
from launcher.system.environment import Environment
from shards.machine.network import Network


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """How one rank of an attempt ended, with its measurements and its devices.

    `answers` is True if it saved completions of its own, `waits` if it hangs because it waits for another rank.
    """

    rank: int
    attempt: int
    status: str
    host: str
    pid: int
    answers: bool
    last_step_at: float
    ended_at: float
    error: RunError | None = None
    load_s: float | None = None
    load_times: LoadTimes | None = None
    compilation: Compilation | None = None
    repeats: tuple[Repeat, ...] = ()
    devices: tuple[DeviceMemory, ...] = ()
    environment: Environment | None = None
    waits: bool = False
    network: Network | None = None
    cost: RankCost | None = None
    quality: Quality | None = None

    @property
    def record(self) -> RankRecord:
        """The part that the record of the run keeps."""
        return RankRecord(
            self.rank, self.status, self.host, self.pid, self.error, self.load_s, self.repeats, self.network,
            self.load_times,
        )  # fmt: skip
