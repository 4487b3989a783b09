"""Tables of the memory of devices, as measured and as planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.config.engines import NO_PLAN
from launcher.report.layout import fitted
from launcher.report.units import size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from launcher.results.record import Record

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
"""The labels for a draft model, if there is one."""


PLANNED = "in brackets: as planned"
LEAST_WANTED = (
    "host anonymous", "tensors", "growth of a step", "fragmented", "KV reserved", "peak reserved", "NVML used",
)  # fmt: skip
"""Columns that are left out if the terminal is too narrow, in this order."""


def device_table(record: Record, out: Console) -> Table:
    """A table of the memory of each device of a run, as measured and as planned."""
    named = [name for name in MEMORY if any(getattr(device, name) is not None for device in record.devices)]
    if not any(device.offloaded_bytes for device in record.devices):
        named.remove("offloaded_bytes")
    named += [name for name in DRAFT if any(getattr(device, name) for device in record.devices)]
    labels = MEMORY | DRAFT
    rows, planned = [], record.planned_devices
    for device in record.devices:
        label = f"{device.device} {device.device_name}".strip()
        plan = planned.get(device.rank)
        cells = [size(getattr(device, name)) + _planned(getattr(plan, name, None)) for name in named]
        rows.append([str(device.rank), label, *cells])
    caption = NO_PLAN
    if record.plan:
        caption = PLANNED
    columns = ["rank", "device", *(labels[name] for name in named)]
    return fitted(out, columns, rows, texts=("device",), optional=LEAST_WANTED, caption=caption)


def phase_table(records: Sequence[Record], out: Console, names: Sequence[str] = ()) -> Table | None:
    """A table of the peaks of CUDA's allocator in each phase on each device; None if they were not measured.

    `names` are the names of the runs, if there are several.
    """
    rows = []
    for name, record in zip(names or ("",) * len(records), records, strict=True):
        planned = record.planned_devices
        for device in record.devices:
            plan = planned.get(device.rank)
            for phase in device.phases:
                allocated = size(phase.peak_allocated_bytes)
                if plan:
                    allocated += _planned(plan.peak_bytes(phase.phase))
                peaks = (allocated, size(phase.peak_reserved_bytes))
                rows.append([escape(name), str(device.rank), phase.phase, *peaks])
    if not rows:
        return None
    columns = ["run", "rank", "phase", "peak allocated", "peak reserved"]
    if not names:
        columns, rows = columns[1:], [row[1:] for row in rows]
    return fitted(out, columns, rows, texts=("run",), caption=PLANNED)


def _planned(expected: int | None) -> str:
    """The planned size in brackets, if there is one."""
    if expected is None:
        return ""
    return f" [dim]({size(expected)})[/]"
