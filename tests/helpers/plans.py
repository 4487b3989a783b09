"""Plans with chosen figures, for tests of code that takes a plan."""

from __future__ import annotations

from typing import Any

from shards.plan.plan import Plan


def plan(**changes: Any) -> Plan:
    """A plan of one unknown device, with these changes."""
    values: dict[str, Any] = {
        "engine": "fsdp",
        "num_devices": 1,
        "device_name": "CPU",
        "num_parameters": 1,
        "kv_bytes_per_token": 1,
        "step_bytes": 1,
        "bandwidth": None,
        "kv_cache_memory_bytes": None,
        "devices": (),
        "load_host_bytes": None,
        "load_device_bytes": 0,
        "largest_batch": None,
        "longest_context": None,
        "smallest_devices": None,
        "limit": None,
        "prefill_limit": None,
        "roofline": None,
        "windows": (),
    }
    return Plan(**values | changes)
