"""Who else holds memory on the devices of a run, by UUID: a measure beside them is not of the whole device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import psutil
import pynvml

from shards.machine.hardware import GIB, cuda_devices

if TYPE_CHECKING:
    from collections.abc import Mapping


def neighbours(environ: Mapping[str, str], devices: int) -> list[str]:
    """A sentence for each foreign process that holds memory on the first `devices` cards that `environ` shows."""
    uuids = [device.uuid for device in cuda_devices(environ)[:devices] if device.uuid is not None]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [sentence(uuid, process) for uuid in uuids for process in _processes(uuid) if process.pid != os.getpid()]
    finally:
        pynvml.nvmlShutdown()


def _processes(uuid: str) -> list[Any]:
    try:
        return list(pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid)))
    except pynvml.NVMLError:
        return []


def sentence(uuid: str, process: Any) -> str:
    """What NVML says of one process (its `pid` and `usedGpuMemory` in bytes, None where the driver hides it)."""
    held = "memory" if process.usedGpuMemory is None else f"{process.usedGpuMemory / GIB:.2f} GiB"
    try:
        name = psutil.Process(process.pid).name()
    except psutil.Error:
        name = "not visible from here"
    return f"{uuid}: process {process.pid} ({name}) already held {held} when the run began"
