"""Versions, code state, hardware and driver of a measurement."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.config.engines import engines
from launcher.version import __version__
from shards.machine import nvml

PACKAGES = ("hydra-core", "safetensors")


@dataclass(frozen=True, slots=True)
class GitState:
    """Commit of a checkout, and whether tracked files differ from it."""

    commit: str
    dirty: bool


@dataclass(frozen=True, slots=True)
class Gpus:
    """Names of the GPUs in the order of the driver, and its versions; None if the driver does not report them."""

    names: tuple[str | None, ...]
    driver: str | None
    cuda_driver: int | None


@dataclass(frozen=True, slots=True)
class Environment:
    """Versions, code state and hardware of one process; what cannot be read is None."""

    launcher: str
    git: GitState | None
    python: str
    executable: str
    packages: dict[str, str]
    host: str
    platform: str
    cpu: str | None
    cpu_count: int
    memory_bytes: int
    gpus: Gpus | None


def describe() -> Environment:
    """The environment of this process."""
    return Environment(
        launcher=__version__,
        git=git_state(Path(__file__).parent),
        python=platform.python_version(),
        executable=sys.executable,
        packages=versions(),
        host=platform.node(),
        platform=platform.platform(),
        cpu=cpu_name(),
        cpu_count=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        gpus=gpus(),
    )


def versions() -> dict[str, str]:
    """The installed versions of the packages that matter to a measurement, including those of all engines."""
    of_engines = (name for kind in engines().values() for name in (*kind.modules(), *kind.distributions))
    installed = {}
    for name in dict.fromkeys((*of_engines, *PACKAGES)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def git_state(folder: Path) -> GitState | None:
    """The state of the checkout that contains `folder`; None outside a checkout."""

    def git(*arguments: str) -> str:
        # Without optional locks: a rank that is killed during the call must not leave a lock file in the checkout.
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return GitState(git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str | None:
    """The model name of the first processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None


def gpus() -> Gpus | None:
    """Names of the GPUs, driver and CUDA version from NVML; None without an NVIDIA driver."""
    known = nvml.versions()
    if known is None:
        return None
    driver, cuda_driver = known
    return Gpus(tuple(card.name for card in nvml.cards()), driver, cuda_driver)
