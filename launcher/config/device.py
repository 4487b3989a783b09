"""Devices as the user describes them: rates, memory and price."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DeviceConfig:
    """The memory and rates of a device that is not known, or in place of known ones; with their units."""

    memory: str | None = None  # 48GiB
    bandwidth: str | None = None  # 768GB/s
    flops: str | None = None  # 154.8TFLOP/s, of matrices in the precision of the run


@dataclass
class CostConfig:
    device_hour: float | None = None  # the price of a device for an hour, in any money
