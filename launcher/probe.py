"""`python -m launcher.probe [devices=N] [accelerator=cpu|cuda]`: measure this machine, for the ceilings of plans.

Memory bandwidth, matmul rate, and the link between N ranks; a few seconds. The figures are kept in the cache folder of
the user and taken by every later plan of as many devices.
"""

from __future__ import annotations

from launcher.system.interrupts import end_quietly_when_interrupted

if __name__ == "__main__":  # first, because the imports below take seconds
    end_quietly_when_interrupted()

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING

from launcher.config.keys import nearest, wrong_value
from launcher.config.schema import Accelerator, ConfigError
from launcher.launch.ranks import rank_environment, worker_command
from launcher.system import processes
from launcher.system.terminal import Parser, run_command
from shards.errors import UserError, WorldError
from shards.machine.cards import cuda_devices
from shards.machine.orphans import before_exec
from shards.machine.rates import Measured, save

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shards.machine.hardware import Device

TIMEOUT_S = 180
ARGUMENTS = {"devices": "2", "accelerator": "cpu"}


def main(argv: Sequence[str]) -> int:
    """Measure, print and store the figures; returns 0, or 2 with one line on stderr for an error."""
    parser = Parser(prog="python -m launcher.probe", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="devices=N, accelerator=cpu|cuda")
    try:
        arguments, unknown = parser.parse_known_intermixed_args(argv)
        devices, accelerator = parse([*unknown, *arguments.words])
        measured = measure(devices, accelerator)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in lines(measured):
        print(line)
    try:
        print(f"kept in {save(os.environ, measured)}")
    except OSError as error:
        print(f"error: The figures cannot be kept: {error}. HINT: export XDG_CACHE_HOME=$PWD/.cache", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str]) -> tuple[int, str]:
    """The number of devices and the accelerator in the arguments; by default all CUDA devices of this machine, or one
    CPU rank. ConfigError for mistakes."""
    values = dict(item.partition("=")[::2] for item in argv)
    if unknown := set(values) - set(ARGUMENTS):
        word = min(unknown)
        bare = word.lstrip("-")
        near = nearest(bare, ARGUMENTS) or "devices"
        if bare in Accelerator.__members__:
            hint = f"accelerator={bare}"
        else:
            hint = f"{near}={values[word] or ARGUMENTS[near]}"
        raise ConfigError(f"{word!r} is not an argument of the probe.", hint)
    accelerator = values.get("accelerator", "auto")
    if accelerator not in Accelerator.__members__:
        raise wrong_value("accelerator", accelerator, Accelerator)
    cards: Sequence[Device] = ()
    if accelerator != "cpu":
        cards = cuda_devices(os.environ)
    if accelerator == "cuda" and not cards:
        raise ConfigError("accelerator=cuda, and no CUDA device can be seen.", "accelerator=cpu")
    if accelerator == "auto" and cards:
        accelerator = "cuda"
    elif accelerator == "auto":
        accelerator = "cpu"
    devices = values.get("devices", "1")
    if accelerator == "cuda":
        devices = values.get("devices", str(len(cards)))
    if not devices.isascii() or not devices.isdigit() or int(devices) < 1:
        raise ConfigError(f"devices={devices} is not a whole number above 0.", "devices=2")
    if accelerator == "cuda" and int(devices) > len(cards):
        fewer = f"devices={len(cards)}, or accelerator=cpu"
        raise ConfigError(f"devices={devices}, and {len(cards)} CUDA devices can be seen.", fewer)
    return int(devices), accelerator


def measure(devices: int, accelerator: str) -> Measured:
    """Measure with one rank per device, then end all ranks; returns rank 0's figures. WorldError if a rank fails."""
    command, mark = worker_command("shards.parallel.probe", accelerator, devices, None), uuid.uuid4().hex
    environ = rank_environment(os.environ, devices, accelerator == "cuda") | {processes.MARK: mark}
    try:
        done = subprocess.run(
            command,
            env=environ,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            preexec_fn=before_exec(signal.SIGTERM),
        )
    except subprocess.TimeoutExpired:
        raise WorldError(f"The probe of {devices} devices took longer than {TIMEOUT_S} s.", "devices=1") from None
    finally:
        processes.end_run(mark)
    if done.returncode != 0 or not done.stdout.strip():
        raise WorldError(f"The probe failed: {reason(done.stderr)}.", f"to see it whole: {shlex.join(command)}")
    return Measured.from_dict(json.loads(done.stdout.splitlines()[-1]))


def reason(stderr: str) -> str:
    """The reason for the failure of ranks, from their stderr: the first rank that was killed, or the first error."""
    error = re.search(r"^(?:\[rank\d+\]: *)?([\w.]*(?:Error|Exception): .+)", stderr, re.MULTILINE)
    ended = re.search(r"^rank \d+ ended with exit code (-?\d+)", stderr, re.MULTILINE)
    if ended and (error is None or ended[1] != "1"):
        return ended[0]
    if error:
        return error[1]
    return (stderr.strip().splitlines() or ["no message"])[-1]


def lines(measured: Measured) -> list[str]:
    """The figures as lines of text."""
    device, link = measured.device, measured.link
    rates = (device.bandwidth or 0, device.flops_16 or 0, device.flops_32 or 0)
    rows = [
        f"{measured.num_devices} x {device.name}, all at once",
        f"memory: {rates[0] / 1e9:,.1f} GB/s",
        f"matmul: {rates[1] / 1e12:,.2f} TFLOP/s in bfloat16, {rates[2] / 1e12:,.2f} in float32",
    ]
    if link is not None:
        rows.append(f"link, {link.name}: {link.bandwidth / 1e9:,.2f} GB/s, all-reduce {link.latency_s * 1e6:,.0f} us")
    return rows


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
