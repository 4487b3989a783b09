"""A fake NVML, which reports chosen GPUs on machines that have none or others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from shards.machine.hardware import GIB


class NVMLError(Exception):
    pass


def nvml(cards: list[dict[str, Any]]) -> SimpleNamespace:
    """A fake of the NVML module that shows `cards`; a query of a value that a card lacks raises NVMLError."""

    def tell(key: str) -> Any:
        def told(card: dict[str, Any]) -> Any:
            if key not in card:
                raise NVMLError("Not Supported")
            return card[key]

        return told

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(cards),
        nvmlDeviceGetHandleByIndex=lambda index: cards[index],
        nvmlDeviceGetName=tell("name"),
        nvmlDeviceGetUUID=tell("uuid"),
        nvmlMemory_v2=2,
        nvmlDeviceGetMemoryInfo=lambda card, version=1: tell(f"memory_v{version}")(card),
        nvmlDeviceGetMigMode=tell("mig"),
        nvmlDeviceGetHandleByUUID=lambda uuid: next(card for card in cards if card.get("uuid") == uuid),
        nvmlDeviceGetComputeRunningProcesses=tell("processes"),
    )


A6000 = {
    "name": "NVIDIA RTX A6000",
    "uuid": "GPU-a",
    "memory_v1": SimpleNamespace(total=49 * GIB, free=48 * GIB),
    "memory_v2": SimpleNamespace(total=49 * GIB, reserved=GIB, free=48 * GIB),
}
"""An A6000 as new drivers describe it: they reserve 1 GiB of its memory, which only version 2 of the call reports."""
