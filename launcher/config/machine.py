"""The machine that a run is planned for: `machine=2xa6000`, `link=`, and `device.*` with their units."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.config.schema import ConfigError
from shards.errors import PlanError
from shards.machine.hardware import CPU, known_device, known_link, usual_link

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from launcher.config.schema import RunConfig
    from shards.machine.hardware import Device, Link

SIZES = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "tib": 2**40, "tb": 10**12}
UNITS = {
    "device.memory": (SIZES, "48GiB"),
    "device.bandwidth": ({f"{unit}/s": size for unit, size in SIZES.items()}, "768GB/s"),
    "device.flops": ({"tflop/s": 10**12, "tflops": 10**12, "gflop/s": 10**9, "pflop/s": 10**15}, "154.8TFLOP/s"),
}


def machine_of(text: str, key: str = "machine") -> tuple[int, str]:
    """The number and the short name of the devices in a text such as `2xa6000`; ConfigError for any other form."""
    number, times, name = text.partition("x")
    if not times or not number.isascii() or not number.isdigit() or int(number) < 1:
        raise ConfigError(f"{key}={text} has no number of devices.", f"{key}=2x{text}")
    try:
        known_device(name)
    except PlanError as error:
        raise ConfigError(f"{key}={text}: {error.fact}", f"{key}={number}x{error.hint}") from None
    return int(number), name.lower()


def quantity(key: str, text: str) -> float:
    """The value of one of the keys in UNITS, in bytes, bytes/s or FLOP/s; ConfigError without a known unit."""
    units, example = UNITS[key]
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z/]+)", text.strip().lower())
    if parts is None or parts[2] not in units or float(parts[1]) == 0:
        raise ConfigError(f"{key}={text} is not a number with its unit.", f"{key}={example}")
    return float(parts[1]) * units[parts[2]]


def described(device: Device, given: Mapping[str, str], dtype_bytes: int) -> Device:
    """The device with its figures replaced by those in `given` (by the keys of UNITS)."""
    amounts = {key: quantity(key, text) for key, text in given.items()}
    if (memory := amounts.get("device.memory")) is not None:
        device = replace(device, capacity_bytes=int(memory))
    if (flops := amounts.get("device.flops")) is not None:
        if dtype_bytes == 4:
            device = replace(device, flops_32=flops)
        else:
            device = replace(device, flops_16=flops)
    return replace(device, bandwidth=amounts.get("device.bandwidth", device.bandwidth))


def given_of(config: RunConfig) -> dict[str, str]:
    """The device figures that a run configures, by the keys of UNITS."""
    values = {key: getattr(config.device, key.removeprefix("device.")) for key in UNITS}
    return {key: text for key, text in values.items() if text is not None}


def settle_machine(config: RunConfig, given: Collection[str]) -> None:
    """Set `config.devices` from `machine`; ConfigError for invalid device figures or a contradictory `devices`."""
    described(CPU, given_of(config), config.precision.products.num_bytes)
    if config.link is not None:
        known_link(config.link)
    if config.machine is None:
        return
    number, _ = machine_of(config.machine)
    if "devices" in given and config.devices != number:
        fact = f"devices={config.devices} is not the number of devices of machine={config.machine}."
        raise ConfigError(fact, f"devices={number}")
    config.devices = number


def other_machine(config: RunConfig) -> tuple[Device, Link] | None:
    """The device and the usual link of `machine`; None if the run is planned for this machine."""
    if config.machine is None:
        return None
    _, name = machine_of(config.machine)
    return known_device(name), usual_link(name)


def how_to_know_rates(config: RunConfig) -> str:
    """The command or key that provides the missing rates for the ceilings of a run."""
    if config.num_nodes > 1 and config.link is None:
        return "link= sets the link between the nodes, as link=infiniband_hdr"
    if config.machine is not None or config.launch.name == "slurm":
        return "device.bandwidth= and device.flops= give them, as device.bandwidth=768GB/s device.flops=154.8TFLOP/s"
    return f"python -m launcher.probe devices={config.devices} accelerator={config.accelerator.name}"
