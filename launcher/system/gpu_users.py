"""Find other processes that hold memory on the devices of a run, by UUID, since they distort measurements."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import psutil

from shards.machine.cards import cuda_devices
from shards.machine.hardware import GIB
from shards.machine.nvml import CardProcess, NvmlError, processes

if TYPE_CHECKING:
    from collections.abc import Mapping


def neighbours(environ: Mapping[str, str], devices: int) -> list[str]:
    """A sentence for each other process that holds memory on the first `devices` GPUs visible in `environ`."""
    uuids = [device.uuid for device in cuda_devices(environ)[:devices] if device.uuid is not None]
    lines = []
    for uuid in uuids:
        with contextlib.suppress(NvmlError):
            lines += [sentence(uuid, process) for process in processes(uuid) if process.pid != os.getpid()]
    return lines


HELD = "when the run began"


def is_of_a_neighbour(note: str) -> bool:
    """True if a note of a run is a sentence of `neighbours`."""
    return note.endswith(HELD)


def sentence(uuid: str, process: CardProcess) -> str:
    """The sentence about one process."""
    if process.memory_bytes is None:
        memory = "memory"
    else:
        memory = f"{process.memory_bytes / GIB:.2f} GiB"
    try:
        name = psutil.Process(process.pid).name()
    except psutil.Error:
        name = "not visible from here"
    return f"{uuid}: process {process.pid} ({name}) already held {memory} {HELD}"
