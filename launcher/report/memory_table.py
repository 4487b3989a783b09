"""What the devices of runs held, as measured and as planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from launcher.config.engines import NO_PLAN
from launcher.report.units import size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.backends.base import DeviceMemory
    from launcher.results.record import Record
    from shards.plan.memory import DevicePlan

MEMORY = {
    "parameter_bytes": "parameters",
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


def device_table(record: Record) -> Table:
    """What each device of a run held, as measured and as planned."""
    named = [name for name in MEMORY if any(getattr(device, name) is not None for device in record.devices)]
    planned = {device.rank: device for device in record.plan.devices} if record.plan else {}
    caption = "in brackets: as planned" if record.plan else NO_PLAN
    table = Table("rank", "device", *(MEMORY[name] for name in named), caption=caption)
    for device in record.devices:
        label = f"{device.device} {device.device_name}".strip()
        table.add_row(str(device.rank), label, *(_bytes(name, device, planned) for name in named))
    return table


def phase_table(records: Sequence[Record]) -> Table | None:
    """The peaks of CUDA's allocator in each phase on each device of some runs; None where no device was watched so."""
    several = len(records) > 1
    table = Table(
        *(["run"] if several else []), "rank", "phase", "peak allocated", "peak reserved",
        caption="in brackets: as planned",
    )  # fmt: skip
    for record in records:
        run = [escape(f"{record.backend} x{record.num_devices}")] if several else []
        planned = {device.rank: device for device in record.plan.devices} if record.plan else {}
        for device in record.devices:
            for phase in device.phases:
                plan = planned.get(device.rank)
                expected = f" [dim]({size(plan.peak_bytes(phase.phase))})[/]" if plan else ""
                peaks = size(phase.peak_allocated_bytes) + expected, size(phase.peak_reserved_bytes)
                table.add_row(*run, str(device.rank), phase.phase, *peaks)
    return table if table.row_count else None


def _bytes(name: str, device: DeviceMemory, planned: Mapping[int, DevicePlan]) -> str:
    expected = getattr(planned.get(device.rank), name, None)
    return size(getattr(device, name)) + (f" [dim]({size(expected)})[/]" if expected is not None else "")
