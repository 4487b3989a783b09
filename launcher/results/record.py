"""The record of a run as dataclasses, with its schema version and a reader of older versions.

A run may take several attempts: if it is interrupted or killed, it can be resumed in the same directory. `attempts` has
the hosts, the status and the repeats of each attempt. The headline figures are medians over complete repeats only, each
timed within one attempt; without one, `partial` has the number of prompts that were measured. `load_s`, `load_times`
(of the slowest rank), `ranks`, `devices` and `environment` describe the last attempt; `notes` belong to the run and the
last attempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.backends.base import Compilation, DeviceMemory, LoadTimes
from launcher.results.figures.cost import Cost
from launcher.results.figures.quality import Quality
from launcher.results.measured import BandwidthUse, CeilingShare, Metrics, Partial, Repeat, Totals
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

    For out-of-memory errors `device`, `asked_bytes` and `free_bytes` are taken from the allocator's message.
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
    """One rank in the record: how it ended, its own measurements, and on several nodes its network interface."""

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
    """One trial of the search for the largest batch."""

    batch: int
    status: str
    run_dir: str | None


@dataclass(frozen=True, slots=True)
class BatchSearch:
    """The search for the largest batch; `asked` is the configuration that was searched."""

    largest_batch: int
    limited_by: str
    planned: int | None
    plan_over_found: float | None
    tries: tuple[BatchTry, ...]
    asked: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Seal:
    """SHA-256 of the record (with an empty `record` here) and of the files next to it, to detect changes.

    It is not a signature: whoever changes a run can compute new hashes.
    """

    record: str
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Record:
    """The record of one run. `world_size` counts ranks (processes), `num_devices` the devices of all nodes."""

    status: str
    backend: str
    model: str
    precision: str
    world_size: int
    num_devices: int
    num_nodes: int
    batch_size: int | None  # None: the engine forms its own batches
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
        """New tokens/s over the repeats."""
        if self.metrics is None:
            return None
        return self.metrics.new_tokens_per_s

    @property
    def ceiling_tokens_per_s(self) -> float | None:
        """The highest decode speed that the hardware allows."""
        if self.ceiling is None:
            return None
        return self.ceiling.tokens_per_s

    @property
    def planned_devices(self) -> dict[int, DevicePlan]:
        """The plan of each device by rank; empty without a plan."""
        if self.plan is None:
            return {}
        return {device.rank: device for device in self.plan.devices}


def read_record(values: Any) -> Record:
    """The record from plain values of this or an older version; ValueError for values that are not a record."""
    if not isinstance(values, dict):
        raise ValueError("a record is a JSON object")
    version = values.get("schema_version", values.get("schema"))
    if version == 1:
        values = _from_version_1(values)
    elif version != SCHEMA_VERSION:
        raise ValueError(f"a record of schema version {version}, and versions 1 to {SCHEMA_VERSION} are known")
    return decode(values, Record)


def _from_version_1(values: JsonObject) -> JsonObject:
    """Convert version 1, which counted devices as `world_size`, stored the ceiling's tokens/s under the name of the
    measured ones, and named the schemes of the roofline after engines."""
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
