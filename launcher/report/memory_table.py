"""Tables of the memory of devices, as measured and as planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.config.engines import NO_PLAN
from launcher.report.layout import fitted
from launcher.report.units import size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console
    from rich.table import Table

    from launcher.backends.base import DeviceMemory
    from launcher.results.record import Record
    from shards.plan.memory import DevicePlan

MEMORY = {
    "parameter_bytes": "parameters",
    "offloaded_bytes": "offloaded",
    "kv_cache_bytes": "KV cache",
    "kv_cache_reserved_bytes": "KV reserved",
    "tensor_bytes": "tensors",
    "peak_allocated_bytes": "peak allocated",
    "peak_reserved_bytes": "peak reserved",
    "fragmented_bytes": "fragmented",
    "step_growth_bytes": "growth of a step",
    "nvml_used_bytes": "NVML used",
    "host_anonymous_bytes": "host anonymous",
}
"""The label of each figure of a device's memory."""

DRAFT = {"draft_parameter_bytes": "draft", "draft_cache_bytes": "draft's KV cache"}
"""Those of a draft model, where there is one."""


LEAST_WANTED = (
    "host anonymous", "tensors", "growth of a step", "fragmented", "KV reserved", "peak reserved", "NVML used",
)  # fmt: skip
"""What a narrow terminal does without, the first of them first."""


def device_table(record: Record, out: Console) -> Table:
    """A table of the memory of each device of a run, as measured and as planned."""
    named = [name for name in MEMORY if any(getattr(device, name) is not None for device in record.devices)]
    if not any(device.offloaded_bytes for device in record.devices):
        named.remove("offloaded_bytes")
    named += [name for name in DRAFT if any(getattr(device, name) for device in record.devices)]
    labels = MEMORY | DRAFT
    planned = {device.rank: device for device in record.plan.devices} if record.plan else {}
    rows = []
    for device in record.devices:
        label = f"{device.device} {device.device_name}".strip()
        rows.append([str(device.rank), label, *(_bytes(name, device, planned) for name in named)])
    caption = "in brackets: as planned" if record.plan else NO_PLAN
    columns = ["rank", "device", *(labels[name] for name in named)]
    return fitted(out, columns, rows, texts=("device",), optional=LEAST_WANTED, caption=caption)


def phase_table(records: Sequence[Record], out: Console, names: Sequence[str] = ()) -> Table | None:
    """The peaks of CUDA's allocator in each phase on each device of some runs; None where no device was watched so.

    `names` are those of several runs.
    """
    rows = []
    for number, record in enumerate(records):
        run = [escape(names[number])] if names else []
        if record.plan:
            planned = {device.rank: device for device in record.plan.devices}
        else:
            planned = {}
        for device in record.devices:
            for phase in device.phases:
                plan = planned.get(device.rank)
                if plan:
                    expected = f" [dim]({size(plan.peak_bytes(phase.phase))})[/]"
                else:
                    expected = ""
                peaks = size(phase.peak_allocated_bytes) + expected, size(phase.peak_reserved_bytes)
                rows.append([*run, str(device.rank), phase.phase, *peaks])
    columns = [*(["run"] if names else []), "rank", "phase", "peak allocated", "peak reserved"]
    if rows:
        return fitted(out, columns, rows, texts=("run",), caption="in brackets: as planned")
    return None


def _bytes(name: str, device: DeviceMemory, planned: Mapping[int, DevicePlan]) -> str:
    expected = getattr(planned.get(device.rank), name, None)
    return size(getattr(device, name)) + (f" [dim]({size(expected)})[/]" if expected is not None else "")
