"""NVIDIA GPUs as the driver reports them through NVML, without a CUDA context; all calls of NVML are here.

`python -m shards.machine.nvml` prints everything as one JSON object. It is meant to run in a separate process, since
NVML can hang or crash if the driver is broken. Values that the driver does not report are None.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pynvml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shards.untrusted_files import JsonObject

P2P_READ, P2P_NVLINK = 0, 2  # nvmlGpuP2PCapsIndex_t
P2P_STATUS = (
    "yes", "no: chipset", "no: GPU", "no: I/O hub topology", "no: disabled in the registry", "no", "unknown",
)  # fmt: skip
LEVELS = {  # nvmlGpuTopologyLevel_t
    0: "one board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "one PCIe host bridge",
    40: "one NUMA node",
    50: "between NUMA nodes",
}
COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}  # nvmlComputeMode_t
UNCORRECTED, SINCE_BOOT = 1, 0  # nvmlMemoryErrorType_t, nvmlEccCounterType_t


class NvmlError(Exception):
    """There is no driver, or it does not answer."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU in the order of the driver. `memory_bytes` is available to programs: without the driver's own
    reservation."""

    index: int
    name: str | None
    uuid: str | None
    memory_bytes: int | None
    is_in_parts: bool


@dataclass(frozen=True, slots=True)
class CardProcess:
    """A process that has a context on a GPU, and its memory there."""

    pid: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of a GPU at one moment: energy since the driver was loaded, everything else current. None if not
    reported.

    `slowed_by` are the reasons why its clocks are lower than requested: heat and power supply (the software power
    limit, normal under load, does not count).
    """

    uuid: str
    energy_j: float | None
    power_w: float | None
    utilisation: float | None
    sm_clock_mhz: float | None
    temperature_c: float | None
    slowed_by: tuple[str, ...]


SLOWED_BY = {0x08: "hardware slowdown", 0x20: "heat (software)", 0x40: "heat (hardware)", 0x80: "power brake"}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons."""

SM_CLOCK, GPU_TEMPERATURE = 1, 0  # nvmlClockType_t, nvmlTemperatureSensors_t


@contextlib.contextmanager
def kept_open() -> Iterator[None]:
    """A context that keeps the driver's library open, so that repeated queries are cheap; NvmlError if there is
    none."""
    with _session():
        yield


def readings(uuids: Sequence[str]) -> tuple[Reading, ...]:
    """The current state of some GPUs; NvmlError without a driver."""
    values = []
    with _session():
        for uuid in uuids:
            handle = _ask(pynvml.nvmlDeviceGetHandleByUUID, uuid)
            energy = _ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)  # mJ
            power = _ask(pynvml.nvmlDeviceGetPowerUsage, handle)  # mW
            utilisation = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)  # %
            bits = _ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
            reading = Reading(
                uuid=uuid,
                energy_j=_divided(energy, 1000),
                power_w=_divided(power, 1000),
                utilisation=_divided(getattr(utilisation, "gpu", None), 100),
                sm_clock_mhz=_ask(pynvml.nvmlDeviceGetClockInfo, handle, SM_CLOCK),
                temperature_c=_ask(pynvml.nvmlDeviceGetTemperature, handle, GPU_TEMPERATURE),
                slowed_by=tuple(name for bit, name in SLOWED_BY.items() if bits & bit),
            )
            values.append(reading)
    return tuple(values)


def _divided(value: int | None, divisor: int) -> float | None:
    if value is None:
        return None
    return value / divisor


def cards() -> tuple[Card, ...]:
    """The GPUs of this machine; none without a driver."""
    try:
        with _session():
            known = []
            for index, handle in enumerate(_handles()):
                name, uuid = _ask(pynvml.nvmlDeviceGetName, handle), _ask(pynvml.nvmlDeviceGetUUID, handle)
                known.append(Card(index, name, uuid, _memory(handle)[0], bool(_mig(handle))))
            return tuple(known)
    except NvmlError:
        return ()


def versions() -> tuple[str | None, int | None] | None:
    """Version of the driver and of the newest CUDA that it supports (13010 is 13.1); None without a driver."""
    try:
        with _session():
            return _ask(pynvml.nvmlSystemGetDriverVersion), _ask(pynvml.nvmlSystemGetCudaDriverVersion_v2)
    except NvmlError:
        return None


def processes(uuid: str) -> tuple[CardProcess, ...]:
    """The compute processes on a GPU, of all users; NvmlError if the driver does not report them."""
    with _session():
        try:
            return _processes(pynvml.nvmlDeviceGetHandleByUUID(uuid))
        except pynvml.NVMLError as error:
            raise NvmlError(str(error)) from error


def describe() -> JsonObject:
    """Driver, GPUs and their links, as plain values; NvmlError without a driver."""
    with _session():
        handles = _handles()
        pairs = [(a, b) for b in range(len(handles)) for a in range(b)]
        return {
            "driver": _ask(pynvml.nvmlSystemGetDriverVersion),
            "cuda_driver": _ask(pynvml.nvmlSystemGetCudaDriverVersion_v2),
            "gpus": [_gpu(index, handle) for index, handle in enumerate(handles)],
            "links": [_link(a, b, handles[a], handles[b]) for a, b in sorted(pairs)],
        }


@contextlib.contextmanager
def _session() -> Iterator[None]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NvmlError(str(error)) from error
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _ask(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call of NVML; None if it fails."""
    try:
        answer = call(*arguments)
    except pynvml.NVMLError:
        return None
    if isinstance(answer, bytes):
        return answer.decode()
    return answer


def _handles() -> list[Any]:
    return [_ask(pynvml.nvmlDeviceGetHandleByIndex, index) for index in range(_ask(pynvml.nvmlDeviceGetCount) or 0)]


def _memory(handle: Any) -> tuple[int | None, int | None, int | None]:
    """Bytes available to programs, reserved by the driver, and free.

    The first version of the call, the only one before driver 510, counts reserved memory as available.
    """
    if memory := _ask(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2):
        return int(memory.total - memory.reserved), int(memory.reserved), int(memory.free)
    if memory := _ask(pynvml.nvmlDeviceGetMemoryInfo, handle):
        return int(memory.total), None, int(memory.free)
    return None, None, None


def _mig(handle: Any) -> bool | None:
    return _switch(_ask(pynvml.nvmlDeviceGetMigMode, handle))


def _switch(modes: Sequence[int] | None) -> bool | None:
    """The current mode of a switch; NVML also returns the mode after the next reboot."""
    if not modes:
        return None
    return bool(modes[0])


def _processes(handle: Any) -> tuple[CardProcess, ...]:
    return tuple(
        CardProcess(int(process.pid), process.usedGpuMemory)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    )


def _gpu(index: int, handle: Any) -> JsonObject:
    memory_bytes, reserved_bytes, free_bytes = _memory(handle)
    capability = _ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    persistence = _ask(pynvml.nvmlDeviceGetPersistenceMode, handle)
    links = [_ask(pynvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS)]
    states = [state for state in links if state is not None]
    nvlinks = None
    if states:
        nvlinks = sum(states)
    return {
        "index": index,
        "name": _ask(pynvml.nvmlDeviceGetName, handle),
        "uuid": _ask(pynvml.nvmlDeviceGetUUID, handle),
        "memory_bytes": memory_bytes,
        "reserved_bytes": reserved_bytes,
        "free_bytes": free_bytes,
        "compute_capability": capability and ".".join(map(str, capability)),
        "pcie_generation": _ask(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        "pcie_generation_max": _ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        "pcie_width": _ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        "pcie_width_max": _ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        "nvlinks": nvlinks,  # links that are up; null if the GPU has none
        "mig": _mig(handle),
        "ecc": _switch(_ask(pynvml.nvmlDeviceGetEccMode, handle)),
        "ecc_errors": _ask(pynvml.nvmlDeviceGetTotalEccErrors, handle, UNCORRECTED, SINCE_BOOT),
        "persistence": None if persistence is None else bool(persistence),
        "compute_mode": COMPUTE_MODES.get(_ask(pynvml.nvmlDeviceGetComputeMode, handle)),
        "processes": [[one.pid, one.memory_bytes] for one in _ask(_processes, handle) or ()],
    }


def _link(a: int, b: int, first: Any, second: Any) -> JsonObject:
    level = _ask(pynvml.nvmlDeviceGetTopologyCommonAncestor, first, second)
    read = _ask(pynvml.nvmlDeviceGetP2PStatus, first, second, P2P_READ)
    nvlink = _ask(pynvml.nvmlDeviceGetP2PStatus, first, second, P2P_NVLINK)
    return {
        "gpus": [a, b],
        "nvlink": None if nvlink is None else nvlink == 0,
        "pcie_path": LEVELS.get(level),
        "peer_to_peer": None if read is None else P2P_STATUS[min(read, len(P2P_STATUS) - 1)],
    }


def main() -> int:
    """Print the description; returns 1, with the reason on stderr, if there is no driver."""
    try:
        description = describe()
    except NvmlError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(description), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
