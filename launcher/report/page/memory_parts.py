"""The parts of a device's memory, measured and planned, for stacked bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.backends.base import DeviceMemory
    from shards.plan.memory import DevicePlan


def cache_of(device: DeviceMemory) -> int:
    """Bytes of keys and values on a device: the reserved bytes, or those of the largest call."""
    return max(device.kv_cache_bytes or 0, device.kv_cache_reserved_bytes or 0)


def measured_parts(device: DeviceMemory, unit: int) -> dict[str, float]:
    """The parts of a device's measured memory, and the rest of the allocator's peak if that is known."""
    parts = {"parameters": (device.parameter_bytes or 0) / unit, "KV cache": cache_of(device) / unit}
    if device.peak_allocated_bytes is not None:
        parts["other"] = max(device.peak_allocated_bytes / unit - sum(parts.values()), 0.0)
    return parts


def planned_parts(plan: DevicePlan, device: DeviceMemory, unit: int) -> dict[str, float]:
    """The parts of a device's planned memory, by the names of the measured parts."""
    cache = max(plan.kv_cache_bytes, plan.kv_cache_reserved_bytes)
    parts = {"parameters": plan.parameter_bytes / unit, "KV cache": cache / unit}
    if device.peak_allocated_bytes is not None:
        parts["other"] = (plan.activation_bytes + plan.buffer_bytes) / unit
    return parts
