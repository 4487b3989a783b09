"""Cards and links as numbers with their sources, and the CUDA devices of this machine. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pynvml

from shards.errors import PlanError

GIB = 1024**3
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Device:
    """A device as a plan sees it: bytes, bytes/s, multiply-adds counted as two FLOP/s. None is not known."""

    name: str
    kind: Literal["cuda", "cpu"] = "cuda"
    capacity_bytes: int | None = None
    bandwidth: float | None = None
    flops_16: float | None = None
    flops_32: float | None = None
    uuid: str | None = None

    def flops(self, dtype_bytes: int) -> float | None:
        """Dense matmul rate at the width of the weights."""
        return self.flops_32 if dtype_bytes >= 4 else self.flops_16


@dataclass(frozen=True, slots=True)
class Link:
    """What joins devices: bytes/s that a device sends and receives at once, and the time of a small all-reduce."""

    name: str
    bandwidth: float
    latency_s: float


CPU = Device("CPU", kind="cpu")
"""A processor: its memory is shared by the ranks and what they load from, so no rank has a capacity of its own."""

# Memory as the driver reports it; bandwidth and dense (not sparse) rates from NVIDIA's data sheets of the RTX A5000,
# RTX A6000, A100 and H100 SXM. h200: 4.3 TB/s and 790 TFLOP/s are a copy and a bf16 matmul measured on one card, where
# its data sheet says 4.8 and 989.
DEVICES: dict[str, Device] = {
    "a5000": Device("RTX A5000", "cuda", 24564 * MIB, 768e9, 111.1e12, 27.8e12),
    "a6000": Device("RTX A6000", "cuda", 49140 * MIB, 768e9, 154.8e12, 38.7e12),
    "a100_40g": Device("A100 40 GB", "cuda", 40960 * MIB, 1555e9, 312e12, 19.5e12),
    "a100_80g": Device("A100 80 GB", "cuda", 81920 * MIB, 2039e9, 312e12, 19.5e12),
    "h100": Device("H100 80 GB", "cuda", 81559 * MIB, 3350e9, 989e12, 67e12),
    "h200": Device("H200 141 GB", "cuda", 143771 * MIB, 4300e9, 790e12, 67e12),
    "cpu": CPU,
}

# What a device moves in one direction in practice. pcie4: of 31.5 GB/s; nvlink_bridge: two RTX A6000, of 56; nvlink3:
# what NVIDIA gives for NCCL on A100 (nccl-tests#149), of 300; the others in about that proportion. The times of a small
# all-reduce are assumptions. `python -m launcher.probe` measures both.
LINKS: dict[str, Link] = {
    "pcie4": Link("PCIe 4.0 x16", 25e9, 30e-6),
    "pcie5": Link("PCIe 5.0 x16", 50e9, 30e-6),
    "nvlink_bridge": Link("NVLink bridge", 50e9, 20e-6),
    "nvlink3": Link("NVLink 3", 230e9, 10e-6),
    "nvlink4": Link("NVLink 4", 345e9, 10e-6),
    "infiniband_hdr": Link("InfiniBand HDR", 23e9, 15e-6),
    "ethernet_10g": Link("10 Gbit/s Ethernet", 1.1e9, 50e-6),
}

_USUAL_LINKS = {"a100_40g": "nvlink3", "a100_80g": "nvlink3", "h100": "nvlink4", "h200": "nvlink4"}

_BY_DRIVER_NAME = {
    "RTX A5000": "a5000",
    "RTX A6000": "a6000",
    "A100-SXM4-40GB": "a100_40g",
    "A100-PCIE-40GB": "a100_40g",
    "A100-SXM4-80GB": "a100_80g",
    "A100 80GB PCIe": "a100_80g",
    "H100 80GB HBM3": "h100",
    "H200": "h200",
}


def known_device(name: str) -> Device:
    """A preset by its short name; PlanError names the others."""
    if name not in DEVICES:
        raise PlanError(f"No device is called {name!r}.", f"one of {', '.join(DEVICES)}.")
    return DEVICES[name]


def known_link(name: str) -> Link:
    """A preset by its short name; PlanError names the others."""
    if name not in LINKS:
        raise PlanError(f"No link is called {name!r}.", f"one of {', '.join(LINKS)}.")
    return LINKS[name]


def usual_link(device: str) -> Link:
    """What mostly joins the devices of this short name in one machine."""
    return LINKS[_USUAL_LINKS.get(device, "pcie4")]


def cuda_devices(environ: Mapping[str, str]) -> tuple[Device, ...]:
    """The CUDA devices that a process with `environ` sees, in its order; none where there is no driver.

    Asks the driver through NVML, which makes no CUDA context. What a card can do is added from the presets.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        found = [_from_nvml(i) for i in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()
    return visible(found, environ.get("CUDA_VISIBLE_DEVICES"))


def visible(devices: list[Device], setting: str | None) -> tuple[Device, ...]:
    """`devices` as CUDA_VISIBLE_DEVICES shows them: indices or UUID prefixes, cut off at the first that is neither."""
    if setting is None:
        return tuple(devices)
    shown: list[Device] = []
    for entry in (part.strip() for part in setting.split(",")):
        device = _entry(devices, entry)
        if device is None:
            break
        if device in shown:
            return ()
        shown.append(device)
    return tuple(shown)


def _entry(devices: list[Device], entry: str) -> Device | None:
    if entry.isdigit():
        return devices[int(entry)] if int(entry) < len(devices) else None
    named = [device for device in devices if entry and (device.uuid or "").startswith(entry)]
    return named[0] if len(named) == 1 else None


def _from_nvml(index: int) -> Device:
    handle: Any = pynvml.nvmlDeviceGetHandleByIndex(index)
    name, uuid = str(pynvml.nvmlDeviceGetName(handle)), str(pynvml.nvmlDeviceGetUUID(handle))
    total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    preset = DEVICES.get(_BY_DRIVER_NAME.get(name.removeprefix("NVIDIA "), ""), Device(name))
    return replace(preset, name=name, capacity_bytes=total, uuid=uuid)
