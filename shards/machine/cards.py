"""The CUDA devices of this machine, as reported by the driver. No torch."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace

from shards.errors import PlanError
from shards.machine import nvml
from shards.machine.hardware import DEVICES, Device, preset

SEE_ALL_CARDS = "srun --gpus-per-node=N, by which each rank sees all cards of its node, not --gpus-per-task"

_BY_DRIVER_NAME = {
    "Tesla T4": "t4",
    "L4": "l4",
    "A10": "a10",
    "L40S": "l40s",
    "GeForce RTX 3090": "rtx3090",
    "GeForce RTX 4090": "rtx4090",
    "GeForce RTX 5090": "rtx5090",
    "TITAN RTX": "titan_rtx",
    "RTX A5000": "a5000",
    "RTX A6000": "a6000",
    "A100-SXM4-40GB": "a100_40g",
    "A100-PCIE-40GB": "a100_40g",
    "A100-SXM4-80GB": "a100_80g",
    "A100 80GB PCIe": "a100_80g",
    "H100 80GB HBM3": "h100",
    "H200": "h200",
    "B200": "b200",
}


def count_as_nvml(environ: MutableMapping[str, str]) -> None:
    """Make CUDA number the GPUs as NVML does, unless the user has chosen: CUDA's own order puts the fastest first.

    It only works before this process first uses CUDA.
    """
    environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def cuda_devices(environ: Mapping[str, str]) -> tuple[Device, ...]:
    """The CUDA devices that a process with `environ` sees, in the order of NVML; none without a driver.

    It asks the driver through NVML, which creates no CUDA context. Rates are added from the presets; values that NVML
    does not report are None. PlanError if a part of a GPU is visible (MIG).
    """
    setting = environ.get("CUDA_VISIBLE_DEVICES")
    cards = nvml.cards()
    devices = []
    for card in cards:
        name = card.name or f"GPU {card.index}"
        device = Device(name)
        if short_name(name) in DEVICES:
            device = preset(short_name(name))
        if card.memory_bytes is not None:
            device = replace(device, capacity_bytes=card.memory_bytes)
        devices.append(replace(device, name=name, uuid=card.uuid))
    in_parts = [device for device, card in zip(devices, cards, strict=True) if card.is_in_parts]
    shown = visible(devices, setting)
    cut = next((card.name for card in shown if _is_among(card, in_parts)), None)
    if cut or (setting or "").strip().startswith("MIG-"):
        if cut:
            which = f"{cut} is cut into parts"
        else:
            which = f"CUDA_VISIBLE_DEVICES={setting} is a part of a card"
        raise PlanError(f"{which} (MIG), but a run needs whole GPUs.", "accelerator=cpu, or other cards")
    return shown


def visible(devices: list[Device], setting: str | None) -> tuple[Device, ...]:
    """`devices` as CUDA_VISIBLE_DEVICES shows them: indices or UUID prefixes, up to the first that is neither."""
    if setting is None:
        return tuple(devices)
    shown: list[Device] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit():
            named = devices[int(entry) :][:1]
        else:
            named = [device for device in devices if entry and (device.uuid or "").startswith(entry)]
        if len(named) != 1:
            break
        device = named[0]
        if _is_among(device, shown):
            return ()
        shown.append(device)
    return tuple(shown)


def _is_among(device: Device, devices: list[Device]) -> bool:
    """True for the device itself, not for an equal one: some GPUs do not report their UUIDs."""
    return any(device is other for other in devices)


def short_name(name: str) -> str:
    """The short name of a GPU, as used in plans, from its name in the driver; that name itself if unknown."""
    return _BY_DRIVER_NAME.get(name.removeprefix("NVIDIA "), name)
