"""Device clocks and memory figures of a rank."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from launcher.backends.base import DeviceMemory, PhaseMemory
from shards.load.blocks import local_tensor
from shards.machine.nvml import NvmlError, processes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from launcher.backends.base import Phase
    from shards.untrusted_files import JsonObject


PREFILL: Phase = "prefill"
DECODE: Phase = "decode"
BY_PHASE = ("phases", "fragmented_bytes", "step_growth_bytes")


class Clock:
    """Timestamps on a device, in seconds since the clock was created: CUDA events, or the monotonic clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._moments: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """Record a timestamp; on CUDA without synchronizing."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(perf_counter())

    def marks(self) -> list[float]:
        """Seconds from the start to each timestamp, after the device has reached the last one."""
        start, *rest = self._moments
        if not self._cuda:
            return [moment - start for moment in rest]
        self._moments[-1].synchronize()
        return [start.elapsed_time(event) / 1000 for event in rest]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages of the tensors: tied tensors and views count once."""
    storages = {}
    for tensor in tensors:
        storage = local_tensor(tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def parameter_bytes(model: torch.nn.Module, device: torch.device) -> int:
    """Bytes of the parameters that this rank holds on `device`: local shards of sharded ones, tied ones once."""
    shards = (local_tensor(parameter) for parameter in model.parameters())
    return sum(shard.nbytes for shard in shards if shard.device == device)


def is_elsewhere(parameter: torch.Tensor, device: torch.device) -> bool:
    """True if a parameter is not on the device: it is on disk, or in main memory while the device is a GPU."""
    return parameter.is_meta or (parameter.device.type == "cpu" and device.type != "cpu")


class PhasePeaks:
    """Peaks of CUDA's allocator in each phase of a run, for the CUDA devices among `devices`.

    The allocator counts memory when it is requested, not when the device uses it: so no phase has to synchronize.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.devices = tuple(device for device in devices if device.type == "cuda")
        self.phases: dict[torch.device, dict[str, PhaseMemory]] = {device: {} for device in self.devices}
        self.fragmented_bytes = dict.fromkeys(self.devices, 0)
        self.step_growth_bytes: dict[torch.device, int | None] = dict.fromkeys(self.devices)
        self._reserved_bytes: dict[torch.device, int] = {}  # reserved after the last step
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)

    def end(self, phase: Phase) -> None:
        """Attribute everything allocated since the last call to one step of `phase`."""
        for device in self.devices:
            stats = torch.cuda.memory_stats_as_nested_dict(device)
            torch.cuda.reset_peak_memory_stats(device)
            allocated, reserved, split = (
                stats[name]["all"] for name in ("allocated_bytes", "reserved_bytes", "inactive_split_bytes")
            )
            so_far = self.phases[device].get(phase, PhaseMemory(phase, 0, 0))
            self.phases[device][phase] = PhaseMemory(
                phase,
                max(so_far.peak_allocated_bytes, allocated["peak"]),
                max(so_far.peak_reserved_bytes, reserved["peak"]),
            )
            self.fragmented_bytes[device] = max(self.fragmented_bytes[device], split["peak"])
            if phase == "decode":
                growth = reserved["current"] - self._reserved_bytes[device]
                self.step_growth_bytes[device] = max(self.step_growth_bytes[device] or 0, growth)
            self._reserved_bytes[device] = reserved["current"]


def module_memory(
    model: torch.nn.Module,
    device: torch.device,
    rank: int,
    kv_cache_bytes: dict[torch.device, int],
    peaks: PhasePeaks | None = None,
    is_reserved: bool = False,
) -> DeviceMemory:
    """The memory of one device of this process, which holds `model` or a part of it. `is_reserved`: the cache was
    allocated in full from the start."""
    values: JsonObject = {
        "parameter_bytes": parameter_bytes(model, device),
        "kv_cache_bytes": kv_cache_bytes.get(device, 0),
        "host_anonymous_bytes": host_anonymous_bytes(),
        "offloaded_bytes": sum(p.nbytes for p in map(local_tensor, model.parameters()) if is_elsewhere(p, device)),
    }
    reasons: dict[str, str] = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        uuid = f"GPU-{properties.uuid}"
        reasons["tensor_bytes"] = "the allocator's own count is peak_allocated_bytes"
        values |= {
            "device_name": properties.name,
            "device_uuid": uuid,
            "nvml_used_bytes": nvml_used(uuid, reasons),
        }
        phases: tuple[PhaseMemory, ...] = ()
        if peaks is None:
            reasons |= dict.fromkeys(BY_PHASE, "the engine mixes the phases in its steps")
        else:
            phases = tuple(peaks.phases[device].values())
            values["fragmented_bytes"] = peaks.fragmented_bytes[device]
            values["step_growth_bytes"] = peaks.step_growth_bytes[device]
            if values["step_growth_bytes"] is None:
                reasons["step_growth_bytes"] = "no decode step was made"
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        values["phases"] = phases
        values["peak_allocated_bytes"] = max(allocated, *(phase.peak_allocated_bytes for phase in phases), 0)
        values["peak_reserved_bytes"] = max(reserved, *(phase.peak_reserved_bytes for phase in phases), 0)
    else:
        tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
        on_cpu = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        packed = sum(tensor.nbytes for tensor in on_cpu if tensor.layout is torch._mkldnn)
        strided = storage_bytes(tensor for tensor in on_cpu if tensor.layout is torch.strided)
        values["tensor_bytes"] = packed + strided
        for name in ("peak_allocated_bytes", "peak_reserved_bytes", *BY_PHASE, "nvml_used_bytes"):
            reasons[name] = "no CUDA device"
    if is_reserved:
        values["kv_cache_reserved_bytes"] = values["kv_cache_bytes"]
    else:
        reasons["kv_cache_reserved_bytes"] = "the cache grows with the sequence; nothing is reserved"
    return DeviceMemory(rank=rank, device=str(device), reasons=reasons, **values)


def nvml_used(uuid: str, reasons: dict[str, str]) -> int | None:
    """Bytes of a GPU used by this process according to the driver; None, with the reason in `reasons`, if unknown."""
    try:
        this = next((process for process in processes(uuid) if process.pid == os.getpid()), None)
    except NvmlError as error:
        reasons["nvml_used_bytes"] = f"NVML: {error}"
        return None
    if this is None:
        reasons["nvml_used_bytes"] = "NVML does not show this process (another PID namespace?)"
        return None
    if this.memory_bytes is None:
        reasons["nvml_used_bytes"] = "NVML lists this process, but the driver does not report its memory"
    return this.memory_bytes


def host_anonymous_bytes() -> int:
    """Anonymous resident memory of this process, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")
