"""`python -m launcher.system.nvml`: the cards, and what joins them, as one JSON object. No CUDA context is made.

For a process of its own: NVML can hang or crash where a driver is broken. What a driver does not tell is null.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pynvml

from shards.machine.hardware import ask

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


def gpus() -> list[dict[str, Any]]:
    """One object for each card of the machine, in the order of the driver."""
    return [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]


def _gpu(index: int) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    capability = ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    return {
        "index": index,
        "name": ask(pynvml.nvmlDeviceGetName, handle),
        "uuid": ask(pynvml.nvmlDeviceGetUUID, handle),
        "memory_bytes": memory and int(memory.total),
        "free_bytes": memory and int(memory.free),
        "compute_capability": capability and ".".join(map(str, capability)),
        "pcie_generation": ask(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        "pcie_generation_max": ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        "pcie_width": ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        "pcie_width_max": ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        "nvlinks": _nvlinks(handle),
        "mig": _mig(handle),
    }


def _nvlinks(handle: Any) -> int | None:
    """How many NVLinks of the card are up; None where it has none to ask about."""
    states = [ask(pynvml.nvmlDeviceGetNvLinkState, handle, link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS)]
    known = [state for state in states if state is not None]
    return sum(known) if known else None


def _mig(handle: Any) -> bool | None:
    modes = ask(pynvml.nvmlDeviceGetMigMode, handle)
    return bool(modes[0]) if modes else None


def links() -> list[dict[str, Any]]:
    """What joins each pair of cards."""
    count = pynvml.nvmlDeviceGetCount()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    return [_link(a, b, handles[a], handles[b]) for a in range(count) for b in range(a + 1, count)]


def _link(a: int, b: int, first: Any, second: Any) -> dict[str, Any]:
    level = ask(pynvml.nvmlDeviceGetTopologyCommonAncestor, first, second)
    read = ask(pynvml.nvmlDeviceGetP2PStatus, first, second, P2P_READ)
    nvlink = ask(pynvml.nvmlDeviceGetP2PStatus, first, second, P2P_NVLINK)
    return {
        "gpus": [a, b],
        "nvlink": None if nvlink is None else nvlink == 0,
        "pcie_path": LEVELS.get(level),
        "peer_to_peer": None if read is None else P2P_STATUS[min(read, len(P2P_STATUS) - 1)],
    }


def main() -> int:
    """Exit code 1, with the reason on stderr, where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        print(error, file=sys.stderr)
        return 1
    found = {
        "driver": ask(pynvml.nvmlSystemGetDriverVersion),
        "cuda_driver": ask(pynvml.nvmlSystemGetCudaDriverVersion_v2),
        "gpus": gpus(),
        "links": links(),
    }
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
