"""A driver of NVIDIA cards that is none: what NVML says of them, for machines that have no card or other ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from shards.machine.hardware import GIB


class NVMLError(Exception):
    pass


def nvml(cards: list[dict[str, Any]]) -> SimpleNamespace:
    """A driver that shows `cards`; what a card lacks it refuses to tell."""

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
"""As new drivers describe one: of its memory a GiB is their own, which the first version of the call does not tell."""
