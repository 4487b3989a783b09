"""What the user says of a device: what it can do, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DeviceConfig:
    """What a device can do, where that is not known here or is to be tried; with its unit."""

    memory: str | None = None  # 48GiB
    bandwidth: str | None = None  # 768GB/s
    flops: str | None = None  # 154.8TFLOP/s, of matrices in the precision of the run


@dataclass
class CostConfig:
    device_hour: float | None = None  # the price of a device for an hour, in any money
