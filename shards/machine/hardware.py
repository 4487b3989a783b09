"""GPUs and links as numbers, with their sources. No torch, no driver."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from shards.errors import PlanError

GIB = 1024**3
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Device:
    """A device for a plan: bytes, bytes/s, FLOP/s (a multiply-add counts as two). None: not known.

    `host_bandwidth` is the bandwidth of its link to main memory.
    """

    name: str
    kind: Literal["cuda", "cpu"] = "cuda"
    capacity_bytes: int | None = None
    bandwidth: float | None = None
    flops_16: float | None = None
    flops_32: float | None = None
    uuid: str | None = None
    host_bandwidth: float | None = None

    def flops(self, dtype_bytes: int) -> float | None:
        """Dense matmul rate at the width of the weights."""
        if dtype_bytes >= 4:
            return self.flops_32
        return self.flops_16


@dataclass(frozen=True, slots=True)
class Link:
    """A link between devices: bytes/s that a device sends and receives simultaneously, and the time of a small
    all-reduce."""

    name: str
    bandwidth: float
    latency_s: float


CPU = Device("CPU", kind="cpu")
"""A CPU: its capacity is that of the machine, shared by the ranks and the files that they have mapped."""

# Memory in GiB is what the driver leaves to programs, as in torch's out-of-memory errors ("has a total capacity of
# 47.54 GiB"); drivers differ by 0.1 GiB, and these are the lowest values reported. Memory in MiB is what the driver
# reports including its own part, some 0.5 GiB more, for cards without a better figure. Bandwidth and dense (not sparse)
# matmul rates in 16 bits with 32-bit sums are from the makers' data sheets and architecture white papers (Turing,
# Ampere GA100 and GA102, Ada AD102, Hopper, Blackwell GB202, HGX B200, CDNA 3). h200: 4.3 TB/s and 790 TFLOP/s were
# measured on one card with a copy and a bf16 matmul; its data sheet says 4.8 and 989.
DEVICES: dict[str, Device] = {
    "t4": Device("T4", "cuda", int(14.75 * GIB), 320e9, 65e12, 8.1e12),
    "l4": Device("L4", "cuda", int(22.03 * GIB), 300e9, 121e12, 30.3e12),
    "a10": Device("A10", "cuda", 23028 * MIB, 600e9, 125e12, 31.2e12),
    "l40s": Device("L40S", "cuda", int(44.40 * GIB), 864e9, 362e12, 91.6e12),
    "rtx3090": Device("GeForce RTX 3090", "cuda", int(23.56 * GIB), 936e9, 71e12, 35.6e12),
    "rtx4090": Device("GeForce RTX 4090", "cuda", int(23.61 * GIB), 1008e9, 165.2e12, 82.6e12),
    "rtx5090": Device("GeForce RTX 5090", "cuda", int(31.36 * GIB), 1792e9, 209.5e12, 104.8e12),
    "titan_rtx": Device("TITAN RTX", "cuda", int(23.65 * GIB), 672e9, 130.5e12, 16.3e12),
    "a5000": Device("RTX A5000", "cuda", 24564 * MIB, 768e9, 111.1e12, 27.8e12),
    "a6000": Device("RTX A6000", "cuda", int(47.54 * GIB), 768e9, 154.8e12, 38.7e12),
    "a100_40g": Device("A100 40 GB", "cuda", int(39.39 * GIB), 1555e9, 312e12, 19.5e12),
    "a100_80g": Device("A100 80 GB", "cuda", int(79.14 * GIB), 2039e9, 312e12, 19.5e12),
    "h100": Device("H100 80 GB", "cuda", int(79.10 * GIB), 3350e9, 989e12, 67e12),
    "h200": Device("H200 141 GB", "cuda", int(139.80 * GIB), 4300e9, 790e12, 67e12),
    "b200": Device("B200", "cuda", int(178.35 * GIB), 8000e9, 2250e12, 75e12),
    "mi300x": Device("Instinct MI300X", "cuda", 196608 * MIB, 5300e9, 1307.4e12, 163.4e12),
    "gpu": Device("GPU"),
    "cpu": CPU,
}

# Bytes/s that a device moves in one direction in practice. The nominal rates are 31.5 GB/s for pcie4, 56 for
# nvlink_bridge (two RTX A6000), and 300 for nvlink3, whose value is NVIDIA's for NCCL on A100 (nccl-tests#149). The
# others are in about that proportion to their nominal rates, infinity_fabric to the 448 that a MI300X sends to its
# seven neighbours. The times of a small all-reduce are assumptions. `python -m launcher.probe` measures both.
LINKS: dict[str, Link] = {
    "pcie3": Link("PCIe 3.0 x16", 12.5e9, 30e-6),
    "pcie4": Link("PCIe 4.0 x16", 25e9, 30e-6),
    "pcie5": Link("PCIe 5.0 x16", 50e9, 30e-6),
    "nvlink_bridge": Link("NVLink bridge", 50e9, 20e-6),
    "nvlink3": Link("NVLink 3", 230e9, 10e-6),
    "nvlink4": Link("NVLink 4", 345e9, 10e-6),
    "nvlink5": Link("NVLink 5", 690e9, 10e-6),
    "infinity_fabric": Link("Infinity Fabric", 340e9, 15e-6),
    "infiniband_hdr": Link("InfiniBand HDR", 23e9, 15e-6),
    "ethernet_10g": Link("10 Gbit/s Ethernet", 1.1e9, 50e-6),
}

_HOST_LINKS = {
    "t4": "pcie3",
    "titan_rtx": "pcie3",
    "rtx5090": "pcie5",
    "h100": "pcie5",
    "h200": "pcie5",
    "b200": "pcie5",
    "mi300x": "pcie5",
}

_USUAL_LINKS = {
    "a100_40g": "nvlink3",
    "a100_80g": "nvlink3",
    "h100": "nvlink4",
    "h200": "nvlink4",
    "b200": "nvlink5",
    "mi300x": "infinity_fabric",
    "rtx5090": "pcie5",
}


def known_device(name: str) -> Device:
    """A preset by its short name, in any case; PlanError with the known names."""
    if name.lower() not in DEVICES:
        raise PlanError(f"{name} is not one of the devices {', '.join(DEVICES)}.", _nearest(name, DEVICES))
    return preset(name.lower())


def preset(name: str) -> Device:
    """The preset of a short name, with its bandwidth from main memory over 16 lanes."""
    device = DEVICES[name]
    is_bare = device.kind == "cpu" or device.bandwidth is None
    if is_bare:
        return device
    return replace(device, host_bandwidth=LINKS[_HOST_LINKS.get(name, "pcie4")].bandwidth)


def known_link(name: str) -> Link:
    """A preset by its short name, in any case; PlanError with the known names."""
    if name.lower() not in LINKS:
        raise PlanError(f"{name} is not one of the links {', '.join(LINKS)}.", f"link={_nearest(name, LINKS)}")
    return LINKS[name.lower()]


def usual_link(device: str) -> Link:
    """The usual link between devices of this short name in one machine."""
    return LINKS[_USUAL_LINKS.get(device.lower(), "pcie4")]


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name.lower(), known, 1, cutoff=0)[0]
