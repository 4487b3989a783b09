"""Devices described by the user: rates, memory and price."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DeviceConfig:
    """Memory and rates of a device, with units, for an unknown device or to override known values."""

    memory: str | None = None  # 48GiB
    bandwidth: str | None = None  # 768GB/s
    flops: str | None = None  # 154.8TFLOP/s, the matmul rate in the precision of the run


@dataclass
class CostConfig:
    device_hour: float | None = None  # price of one device for one hour, in any currency
