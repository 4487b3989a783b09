"""Check the GPUs of a machine, their links, and what engines need to use them. Standard library only."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.doctor import host
from launcher.doctor.checks import Check, State, size
from shards.machine.interpreter import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shards.untrusted_files import JsonObject

LEAST_DRIVERS = {12: 525, 13: 580}
"""The oldest driver for programs built for a major version of CUDA; scripts/setup.sh has the same numbers."""

LOCK = ROOT / "scripts" / "lock" / "cuda.txt"
COMPILES = "vLLM on CUDA (Triton) and DeepSpeed compile with it"
LEAST_CAPABILITIES = {12: (5, 0), 13: (7, 5)}
"""The lowest compute capability for which PyTorch's builds for a major version of CUDA have kernels."""

IN_BIOS = "switch ACS and the IOMMU off in the BIOS"
PEER_MENDS = {
    "no: chipset": IN_BIOS,
    "no: I/O hub topology": IN_BIOS,
    "no: disabled in the registry": "take NVreg_RegistryDwords out of /etc/modprobe.d, and reboot",
}
HIDDEN = 2 << 30
"""If no process is visible, but at least this many bytes are in use, another user's process holds the GPU."""


def check_cards(found: JsonObject | None, reason: str) -> list[Check]:
    """The GPUs and their links; a note if there are none."""
    if not (found or {}).get("gpus"):
        fact = f"none: {reason or 'NVML is silent'}"
        if found is not None:
            fact = "the driver shows none"
        return [Check("devices", "GPUs", "note", fact)]
    assert found is not None
    checks = []
    for gpu in found["gpus"]:
        state, problems, mend = _problems(gpu, found["gpus"])
        checks.append(Check("devices", f"GPU {gpu['index']}", state, "; ".join([*_facts(gpu, found), *problems]), mend))
    return [*checks, *map(_check_link, found["links"])]


def _facts(gpu: JsonObject, found: JsonObject) -> list[str]:
    cuda = found["cuda_driver"]
    bus = [gpu["pcie_generation"], gpu["pcie_width"], gpu["pcie_generation_max"], gpu["pcie_width_max"]]
    now, width, most, widest = (value or "?" for value in bus)
    links, version = "no NVLink", "?"
    if gpu["nvlinks"]:
        links = f"{gpu['nvlinks']} NVLinks up"
    if cuda:
        version = f"{cuda // 1000}.{cuda % 1000 // 10}"
    return [
        gpu["name"] or "no name",
        f"{size(gpu['memory_bytes'])} ({size(gpu['free_bytes'])} free)",
        f"compute capability {gpu['compute_capability'] or '?'}",
        f"PCIe {now} x{width} now, at most {most} x{widest}",
        links,
        f"driver {found['driver'] or '?'}, CUDA {version}",
    ]


def _problems(gpu: JsonObject, gpus: Sequence[JsonObject]) -> tuple[State, list[str], str]:
    """Problems that prevent a run on a GPU or distort it, the most serious first, with the fix for that one."""
    index = gpu["index"]
    findings: list[tuple[State, str, str]] = []
    if gpu["mig"]:
        findings.append(("warning", "MIG is on, but a run needs whole GPUs", f"nvidia-smi -i {index} -mig 0"))
    if gpu["compute_mode"] not in (None, "default"):
        mode = f"compute mode {gpu['compute_mode']}: not every process may use it"
        findings.append(("warning", mode, f"nvidia-smi -i {index} -c DEFAULT"))
    if gpu["ecc_errors"]:
        errors = f"{gpu['ecc_errors']} uncorrected memory errors since boot"
        findings.append(("warning", errors, f"nvidia-smi --gpu-reset -i {index}"))
    if users := _users(gpu):
        idle = ",".join(str(other["index"]) for other in gpus if not _users(other))
        mend = "nvidia-smi"
        if idle:
            mend = f"export CUDA_VISIBLE_DEVICES={idle}"
        elif gpu["processes"]:
            mend = f"kill {gpu['processes'][0][0]}"
        findings.append(("warning", f"in use: {users}", mend))
    if gpu["pcie_width"] and gpu["pcie_width"] < (gpu["pcie_width_max"] or 0):
        findings.append(
            ("note", "fewer PCIe lanes than the card has", f"move it to a slot of x{gpu['pcie_width_max']}")
        )
    if gpu["ecc"] is False:
        findings.append(("note", "ECC is off", f"nvidia-smi -i {index} -e 1, and reboot"))
    if gpu["persistence"] is False:
        findings.append(("note", "persistence mode is off: the first use takes seconds", "nvidia-smi -pm 1"))
    if not findings:
        return "ok", [], ""
    return findings[0][0], [words for _, words, _ in findings], findings[0][2]


def _users(gpu: JsonObject) -> str:
    """The processes that hold memory of a GPU; in a container the driver may not show all of them."""
    if gpu["processes"]:
        shown = (f"process {pid} ({host.process_name(pid)}, {size(held)})" for pid, held in gpu["processes"])
        return ", ".join(shown)
    used = (gpu["memory_bytes"] or 0) - (gpu["free_bytes"] or 0)
    known = gpu["memory_bytes"] is not None and gpu["free_bytes"] is not None
    if known and used >= HIDDEN:
        return f"{size(used)} by processes that are not visible from here"
    return ""


def _check_link(link: JsonObject) -> Check:
    way = f"PCIe, {link['pcie_path'] or 'path not known'}"
    if link["nvlink"]:
        way = "NVLink"
    peers = link["peer_to_peer"]
    fact = f"{way}; peer to peer {peers or 'not known'}"
    state: State = "ok"
    if peers not in ("yes", None):
        state = "note"
        fact += ": what they send goes through the memory of the host"
    return Check("devices", "GPUs {} and {}".format(*link["gpus"]), state, fact, PEER_MENDS.get(peers, ""))


def check_cuda(found: JsonObject | None, built_for: Sequence[str]) -> list[Check]:
    """Check what CUDA engines need: a driver, a compiler with Python's headers, optionally nvcc.

    `built_for` are the CUDA versions of the installed torch builds; without any, that of the lock.
    """
    if not (found or {}).get("gpus"):
        return []
    assert found is not None
    required = max((int(version.partition(".")[0]) for version in built_for), default=None) or locked_cuda()
    checks = [_check_driver(found["driver"], found.get("cuda_driver"), required), _check_nvcc(required)]
    least = LEAST_CAPABILITIES.get(required or 0, (0, 0))
    for gpu in found["gpus"]:
        capability = gpu["compute_capability"]
        if capability and tuple(map(int, capability.split("."))) < least:
            kernels = f"builds for CUDA {required} have kernels from {'.'.join(map(str, least))} on"
            fact = f"compute capability {capability}, and {kernels}"
            mend = "LAUNCHER_FLAVOR=cpu bash scripts/setup.sh"
            checks.append(Check("system", f"GPU {gpu['index']}", "broken", fact, mend))
    return checks


def _check_driver(driver: str | None, cuda_driver: int | None, cuda: int | None) -> Check:
    """Check the driver's version. Older drivers also work with NVIDIA's package for forward compatibility, and then
    report a newer CUDA version."""
    least = LEAST_DRIVERS.get(cuda or 0)
    major = re.match(r"\d+", driver or "")
    if least is None or major is None:
        return Check("system", "driver", "note", f"{driver or 'not known'}; for CUDA {cuda or 'not known'}")
    if int(major.group()) >= least:
        return Check("system", "driver", "ok", f"{driver}; CUDA {cuda} needs {least}")
    if cuda_driver and cuda and cuda_driver // 1000 >= cuda:
        return Check("system", "driver", "ok", f"{driver}, with what makes it run CUDA {cuda_driver // 1000}")
    wrong = f"{driver}, and CUDA {cuda}, for which torch and vLLM are built, needs {least} or newer"
    return Check("system", "driver", "broken", wrong, f"apt-get install nvidia-driver-{least}-server, and reboot")


def locked_cuda() -> int | None:
    """The major version of CUDA that the locked packages are built for; None outside a checkout."""
    if not LOCK.is_file():
        return None
    match = re.search(r"^nvidia-cuda-runtime==(\d+)", LOCK.read_text(), re.MULTILINE)
    if match is None:
        return None
    return int(match.group(1))


def _check_nvcc(cuda: int | None) -> Check:
    """Check nvcc. No engine requires it; but if it is installed, vLLM compiles FlashInfer's kernels with it, so its
    CUDA version must match."""
    path = host.find_tool("nvcc")
    if path is None:
        return Check("system", "nvcc", "note", "not found; vLLM does without FlashInfer's kernels")
    version = host.nvcc_version(path)
    if cuda is None or version is None or version.startswith(f"{cuda}."):
        return Check("system", "nvcc", "ok", f"{path}, CUDA {version or '?'}")
    wrong = f"{path} is of CUDA {version}, the engines are built for {cuda}; FlashInfer's kernels may not compile"
    return Check("system", "nvcc", "warning", wrong, f"export PATH=/usr/local/cuda-{cuda}/bin:$PATH")


def check_compiler() -> list[Check]:
    """Check for a C compiler and Python's headers: vLLM on CUDA compiles kernel launchers, DeepSpeed its CPU
    operation."""
    named = os.environ.get("CC")
    if named:
        compiler = host.find_tool(named)
    else:
        compiler = host.find_tool("gcc") or host.find_tool("clang")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    checks = [Check("system", "C compiler", "missing", f"no {named or 'gcc'}; {COMPILES}", "apt-get install gcc")]
    if compiler:
        checks = [Check("system", "C compiler", "ok", compiler)]
    if headers.is_file():
        return [*checks, Check("system", "Python.h", "ok", str(headers))]
    mend = f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return [*checks, Check("system", "Python.h", "missing", f"not in {headers.parent}; {COMPILES}", mend)]
