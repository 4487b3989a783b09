"""Describe this machine: CPU, memory, tools, limits. Standard library only."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from shards.machine.shared_memory import SHARED_MEMORY

SHARED_MEMORY_WANTED = 1024**3
"""Ranks of one machine exchange tensors through shared memory, of which containers have 64 MiB by default."""

SPEED_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True, slots=True)
class Host:
    """CPU, memory in bytes and devices; None means not known. `memory_limit_bytes` is the limit of the container."""

    cpu: str | None
    cores: int
    instructions: tuple[str, ...]
    numa_nodes: int | None
    memory_bytes: int | None
    memory_available_bytes: int | None
    memory_limit_bytes: int | None
    shared_memory_bytes: int | None
    shared_memory_free_bytes: int | None
    locked_memory_bytes: int | None
    infiniband: tuple[str, ...]


def describe() -> Host:
    """The description of this machine, with the cores that this process may use."""
    cpu: dict[str, str] = {}
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
        for name, _, value in (line.partition(":") for line in first.splitlines()):
            cpu[name.strip()] = value.strip()
    memory: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for words in (line.split() for line in Path("/proc/meminfo").read_text().splitlines()):
            if len(words) == 3:
                memory[words[0].rstrip(":")] = int(words[1]) * 1024
    limit_bytes: int | None = None
    with contextlib.suppress(OSError, ValueError):
        limit_bytes = int(Path("/sys/fs/cgroup/memory.max").read_text())
    shared_bytes = shared_free_bytes = None
    with contextlib.suppress(OSError):
        room = os.statvfs(SHARED_MEMORY)
        shared_bytes, shared_free_bytes = room.f_frsize * room.f_blocks, room.f_frsize * room.f_bavail
    locked: int | None = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked == resource.RLIM_INFINITY:
        locked = None
    return Host(
        cpu=cpu.get("model name") or platform.processor() or None,
        cores=len(os.sched_getaffinity(0)),
        instructions=tuple(flag for flag in SPEED_FLAGS if flag in cpu.get("flags", "").split()),
        numa_nodes=len(_names(Path("/sys/devices/system/node"), "node[0-9]*")) or None,
        memory_bytes=memory.get("MemTotal"),
        memory_available_bytes=memory.get("MemAvailable"),
        memory_limit_bytes=limit_bytes,
        shared_memory_bytes=shared_bytes,
        shared_memory_free_bytes=shared_free_bytes,
        locked_memory_bytes=locked,
        infiniband=_names(Path("/sys/class/infiniband"), "*"),
    )


def find_tool(name: str) -> str | None:
    """The path of a program on PATH, or next to the interpreter (in an environment that is not activated)."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def process_name(pid: int) -> str:
    """The name of a process, or a text that says that it is hidden or has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return "not visible from here"


def nvcc_version(path: str) -> str | None:
    """The CUDA version of an nvcc, such as 13.0."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        out = subprocess.run([path, "-V"], capture_output=True, text=True, timeout=20, check=True).stdout
        if match := re.search(r"release (\d+\.\d+)", out):
            return match.group(1)
    return None


def _names(folder: Path, pattern: str) -> tuple[str, ...]:
    with contextlib.suppress(OSError):
        return tuple(sorted(path.name for path in folder.glob(pattern)))
    return ()
