"""Clocks, the memory of a device, and the environment of a run."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from launcher.backends.base import DeviceMemory
from shards.load.blocks import local_tensor
from shards.machine.nvml import NvmlError, processes

if TYPE_CHECKING:
    from collections.abc import Iterable


class Clock:
    """Moments on a device, in seconds since the clock was made: CUDA events there, the monotonic clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._moments: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """Note this moment; on CUDA without waiting for the device."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(perf_counter())

    def marks(self) -> list[float]:
        """Seconds from the start to each mark, after the device has reached the last."""
        start, *rest = self._moments
        if not self._cuda:
            return [moment - start for moment in rest]
        self._moments[-1].synchronize()
        return [start.elapsed_time(event) / 1000 for event in rest]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors: tied and viewed tensors count once."""
    storages = {}
    for tensor in tensors:
        storage = local_tensor(tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def parameter_bytes(model: torch.nn.Module, device: torch.device) -> int:
    """Bytes of the parameters that this rank holds on `device`: of a shard its own elements, tied parameters once."""
    shards = (local_tensor(parameter) for parameter in model.parameters())
    return sum(shard.nbytes for shard in shards if shard.device == device)


def module_memory(
    model: torch.nn.Module, device: torch.device, rank: int, kv_cache_bytes: dict[torch.device, int]
) -> DeviceMemory:
    """The memory of one device of this process, which holds `model` or a part of it."""
    values: dict[str, Any] = {
        "parameter_bytes": parameter_bytes(model, device),
        "kv_cache_bytes": kv_cache_bytes.get(device, 0),
        "host_anonymous_bytes": host_anonymous_bytes(),
    }
    reasons: dict[str, str] = {}
    if device.type == "cuda":
        values |= _cuda_memory(device, reasons)
    else:
        values["tensor_bytes"] = _live_tensor_bytes()
        for name in ("peak_allocated_bytes", "peak_reserved_bytes", "nvml_used_bytes"):
            reasons[name] = "no CUDA device"
    reasons["kv_cache_reserved_bytes"] = "the cache grows with the sequence; nothing is reserved"
    return DeviceMemory(rank=rank, device=str(device), reasons=reasons, **values)


def _cuda_memory(device: torch.device, reasons: dict[str, str]) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    uuid = f"GPU-{properties.uuid}"
    reasons["tensor_bytes"] = "the allocator's own count is peak_allocated_bytes"
    return {
        "device_name": properties.name,
        "device_uuid": uuid,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        "nvml_used_bytes": nvml_used(uuid, reasons),
    }


def nvml_used(uuid: str, reasons: dict[str, str]) -> int | None:
    """What the driver says that this process holds of a card; None, with the reason, where it does not."""
    try:
        own = next((process for process in processes(uuid) if process.pid == os.getpid()), None)
    except NvmlError as error:
        reasons["nvml_used_bytes"] = f"NVML: {error}"
        return None
    if own is None:
        reasons["nvml_used_bytes"] = "NVML does not show this process (another PID namespace?)"
    elif own.memory_bytes is None:
        reasons["nvml_used_bytes"] = "NVML shows this process, and the driver does not say what it holds"
    return None if own is None else own.memory_bytes


def _live_tensor_bytes() -> int:
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return storage_bytes(tensor for tensor in found if tensor.device.type == "cpu" and tensor.layout == torch.strided)


def host_anonymous_bytes() -> int:
    """Anonymous resident memory of this process: its own pages, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")
