"""The record of a run as dataclasses, with the version of its form and a reader of older forms.

A run may take several attempts: interrupted or killed, it goes on later in the same directory. What each attempt made
is in `attempts`: its hosts, how it ended, and its repeats of the prompt set. The headline figures are medians over
whole repeats only, each timed within one attempt; with none, `partial` says of how many prompts they are. `load_s`,
`load_times` (of the slowest rank), `ranks`, `devices` and `environment` are of the last attempt; `notes` are of the
run and the last attempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.backends.base import Compilation, DeviceMemory, LoadTimes
from launcher.results.cost import Cost
from launcher.results.measured import BandwidthUse, CeilingShare, Metrics, Partial, Repeat, Totals
from launcher.results.quality import Quality
from launcher.system.environment import Environment
from launcher.system.typed import decode
from shards.machine.network import Network
from shards.plan.plan import Plan

if TYPE_CHECKING:
    from launcher.results.measured import Spread
    from shards.plan.memory import DevicePlan
    from shards.untrusted_files import JsonObject

SCHEMA_VERSION = 2
SCHEMES_OF_VERSION_1 = {"fsdp": "gathered", "tensor_parallel": "split"}


@dataclass(frozen=True, slots=True)
class RunError:
    """The error of a run, or of one rank: the rank and its stage, the error and a hint.

    Of memory that ran out `device`, `asked_bytes` and `free_bytes` are as the allocator's message says them.
    """

    rank: int | None
    stage: str
    type: str
    message: str
    hint: str = ""
    traceback: str | None = None
    device: str | None = None
    asked_bytes: int | None = None
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class RankRecord:
    """One rank in the record: how it ended, its own measurements, and of several nodes its way to the others."""

    rank: int
    status: str
    host: str
    pid: int
    error: RunError | None = None
    load_s: float | None = None
    repeats: tuple[Repeat, ...] = ()
    network: Network | None = None
    load_times: LoadTimes | None = None


@dataclass(frozen=True, slots=True)
class RepeatSummary:
    """One repeat over all ranks, numbered from 1."""

    repeat: int
    completions: int
    new_tokens: int
    wall_s: float
    new_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a run, how it ended, and the repeats that it finished."""

    attempt: int
    status: str | None
    hosts: tuple[str, ...]
    notes: tuple[str, ...]
    repeats: tuple[RepeatSummary, ...]


@dataclass(frozen=True, slots=True)
class BatchTry:
    """One try of the search for the largest batch."""

    batch: int
    status: str
    run_dir: str | None


@dataclass(frozen=True, slots=True)
class BatchSearch:
    """The search for the largest batch; `asked` is the configuration that it was made for."""

    largest_batch: int
    limited_by: str
    planned: int | None
    plan_over_found: float | None
    tries: tuple[BatchTry, ...]
    asked: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Seal:
    """SHA-256 of the record (with an empty `record` here) and of the files beside it, by which a change is seen.

    It is no signature: somebody who changes a run can make new ones.
    """

    record: str
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Record:
    """The whole of one run. `world_size` counts ranks (processes), `num_devices` the devices of all nodes."""

    status: str
    backend: str
    model: str
    precision: str
    world_size: int
    num_devices: int
    num_nodes: int
    batch_size: int | None  # None: the engine makes its batches itself
    config: dict[str, Any]
    schema_version: int = SCHEMA_VERSION
    error: RunError | None = None
    run_dir: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    load_s: float | None = None
    load_times: LoadTimes | None = None
    compilation: Compilation | None = None
    new_tokens_per_s: float | None = None
    ttft_s: float | None = None
    itl_s: float | None = None
    totals: Totals | None = None
    partial: Partial | None = None
    metrics: Metrics | None = None
    ceiling: CeilingShare | None = None
    mbu: BandwidthUse | None = None
    quality: Quality | None = None
    cost: Cost | None = None
    devices: tuple[DeviceMemory, ...] = ()
    ranks: tuple[RankRecord, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    batch_search: BatchSearch | None = None
    notes: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    plan: Plan | None = None
    environment: Environment | None = None
    seal: Seal | None = None

    @property
    def speed(self) -> Spread | None:
        """The new tokens/s of the repeats."""
        if self.metrics is None:
            return None
        return self.metrics.new_tokens_per_s

    @property
    def ceiling_tokens_per_s(self) -> float | None:
        """The highest decode speed that the machine allows."""
        if self.ceiling is None:
            return None
        return self.ceiling.tokens_per_s

    @property
    def planned_devices(self) -> dict[int, DevicePlan]:
        """The plan of each device by its rank; empty without a plan."""
        if self.plan is None:
            return {}
        return {device.rank: device for device in self.plan.devices}


def read_record(values: Any) -> Record:
    """The record in plain values of this or an older version; ValueError for values that are none."""
    if not isinstance(values, dict):
        raise ValueError("a record is a JSON object")
    version = values.get("schema_version", values.get("schema"))
    if version == 1:
        values = _from_version_1(values)
    elif version != SCHEMA_VERSION:
        raise ValueError(f"a record of schema version {version}, and versions 1 to {SCHEMA_VERSION} are known")
    return decode(values, Record)


def _from_version_1(values: JsonObject) -> JsonObject:
    """Version 1 counted devices as `world_size`, had the ceiling's tokens/s under the name of the measured ones, and
    called the schemes of the roofline after engines."""
    plan, ceiling = values["plan"], values["ceiling"]
    if plan is not None:
        roofline = plan["roofline"]
        if roofline is not None:
            roofline = roofline | {"scheme": SCHEMES_OF_VERSION_1.get(roofline["scheme"], roofline["scheme"])}
        plan = plan | {"num_devices": plan["world_size"], "roofline": roofline}
    if ceiling is not None:
        ceiling = ceiling | {"tokens_per_s": ceiling["decode_tokens_per_s"]}
    return values | {
        "schema_version": SCHEMA_VERSION,
        "world_size": len(values["ranks"]) or values["world_size"],
        "num_devices": values["world_size"],
        "batch_size": values["config"]["measure"]["batch_size"],
        "ranks": [
            rank | {"error": rank["error"] and {"rank": rank["rank"], **rank["error"]}} for rank in values["ranks"]
        ],
        "plan": plan,
        "ceiling": ceiling,
    }
