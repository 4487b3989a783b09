"""Rates that `shards.parallel.probe` measured on this machine, stored in the user's cache folder. No torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from shards.machine.cards import cuda_devices
from shards.machine.hardware import CPU, Device, Link

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shards.untrusted_files import JsonObject


LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Measured:
    """The best of several repeats, with `num_devices` ranks working at the same time; the link is None for a single
    one."""

    device: Device
    num_devices: int
    link: Link | None

    def to_dict(self) -> JsonObject:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measured:
        """The inverse of `to_dict`."""
        link = values["link"]
        return cls(Device(**values["device"]), values["num_devices"], link and Link(**link))


def cache_folder(environ: Mapping[str, str]) -> Path:
    """The user's cache folder for this project."""
    home = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME", "~")).expanduser() / ".cache")
    return Path(home) / "multi-gpu-launcher"


def cache_file(environ: Mapping[str, str], device: Device, num_devices: int) -> Path:
    """The file with the rates of `num_devices` devices of this kind on this host."""
    name = "".join(letter if letter.isalnum() else "_" for letter in device.name.lower())
    return cache_folder(environ) / f"probe_{os.uname().nodename}_{name}_{num_devices}.json"


def save(environ: Mapping[str, str], measured: Measured) -> Path:
    """Store the rates atomically."""
    path = cache_file(environ, measured.device, measured.num_devices)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(measured.to_dict(), indent=2) + "\n")
    temporary.replace(path)
    return path


def main_memory_bytes() -> int:
    """Memory of this machine, or of the container that contains this process."""
    total: int = psutil.virtual_memory().total
    try:
        limit = LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return total
    if limit.isdigit():
        return min(total, int(limit))
    return total


def this_machine(environ: Mapping[str, str], num_devices: int, on_cuda: bool) -> tuple[Device, Link | None]:
    """The device of this machine, with measured rates in preference to those of its data sheet, and the measured link.

    The link is None if `num_devices` devices were never probed; an unreadable cache counts as empty.
    """
    device = replace(CPU, capacity_bytes=main_memory_bytes())
    if on_cuda and (cards := cuda_devices(environ)):
        device = cards[0]
    try:
        path = cache_file(environ, device, num_devices)
        measured = Measured.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return device, None
    rates = measured.device
    known = replace(device, bandwidth=rates.bandwidth, flops_16=rates.flops_16, flops_32=rates.flops_32)
    return known, measured.link
