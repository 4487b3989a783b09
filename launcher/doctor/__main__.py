"""`python -m launcher.doctor`: check which engines work on this machine, on which devices, and how to fix the rest.

Checks that may crash run in their own processes, so that a broken engine or driver is only a line of the table. Only
the standard library is required; rich draws the table if it can be imported.
"""

from __future__ import annotations

from launcher.system.interrupts import end_quietly_when_interrupted

if __name__ == "__main__":  # first, because the imports below take seconds
    end_quietly_when_interrupted()

import json
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING

import launcher
from launcher.config import engines as registry
from launcher.config.schema import ConfigError
from launcher.doctor import host
from launcher.doctor.cards import check_cards, check_compiler, check_cuda
from launcher.doctor.checks import Check, State, size
from launcher.doctor.trials import Engine, engine, nvml
from launcher.system.terminal import Parser, run_command
from shards.machine.interpreter import ROOT

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except Exception:  # missing or broken
    Console = None  # type: ignore[assignment, misc]

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from shards.untrusted_files import JsonObject

AT_ONCE = 2  # engines imported at the same time: imports take much CPU time and memory


def check_engine(one: Engine, on_gpus: bool) -> Check:
    """The check of one engine; a CPU build on a machine with GPUs is a warning."""
    versions = ", ".join(f"{module} {version or '?'}" for module, version in one.versions.items())
    if one.error is not None:
        state: State = "broken"
        if one.missing:
            state = "missing"
        fact = one.error
        if versions:
            fact += f" (with {versions})"
        return Check("backends", one.name, state, fact, _mend_engine(one, on_gpus))
    if on_gpus and one.versions and one.cuda is None:
        fact = f"{versions}: a CPU build, and there are GPUs"
        return Check("backends", one.name, "warning", fact, "LAUNCHER_FLAVOR=cuda bash scripts/setup.sh")
    return Check("backends", one.name, "ok", versions or "needs nothing")


def _mend_engine(one: Engine, on_gpus: bool) -> str:
    """The command that fixes an engine; preferably scripts/setup.sh, whose locked versions work together, and which is
    the only way to install vLLM's CPU build."""
    try:
        kind = registry.load_engine(one.name)
    except ConfigError as error:
        return error.hint
    by_lock = kind.pip_extra is not None and (ROOT / "scripts" / "setup.sh").is_file()
    if by_lock and (not one.missing or not (kind.pip_finds_cpu_build or on_gpus)):
        return "bash scripts/setup.sh && .venv/bin/python -m launcher.doctor"
    return kind.install_hint()


def check_devices(found: JsonObject | None, reason: str, machine: host.Host) -> list[Check]:
    """The GPUs and their links, then the CPU."""
    parts = [machine.cpu or platform.machine(), f"{machine.cores} cores for this process"]
    if machine.numa_nodes == 1:
        parts.append("1 NUMA node")
    elif machine.numa_nodes:
        parts.append(f"{machine.numa_nodes} NUMA nodes")
    if machine.instructions:
        parts.append(" ".join(machine.instructions))
    processor = Check("devices", "processor", "ok", "; ".join(parts))
    return [*check_cards(found, reason), processor, check_memory(machine)]


def check_memory(machine: host.Host) -> Check:
    """The memory of the machine, and the limit of the container if it is lower."""
    memory = f"{size(machine.memory_bytes)}, {size(machine.memory_available_bytes)} available"
    limit = machine.memory_limit_bytes
    if limit is not None and (machine.memory_bytes is None or limit < machine.memory_bytes):
        memory += f"; this container may use {size(limit)}"
    return Check("devices", "memory", "ok", memory)


def check_system(machine: host.Host) -> list[Check]:
    """Check what engines and clusters need besides Python packages."""
    tools = [path for path in map(host.find_tool, ("sbatch", "srun", "squeue")) if path]
    slurm = Check("system", "SLURM client", "note", ", ".join(tools) or "none; only launching on a cluster needs it")
    if len(tools) == 3:
        slurm = Check("system", "SLURM client", "ok", tools[0])
    return [
        Check("system", "python", "ok", f"{platform.python_version()}, {sys.executable}"),
        *check_compiler(),
        _tool("g++", "builds DeepSpeed's CPU operation", "apt-get install g++"),
        _tool("ninja", "builds DeepSpeed's CPU operation", "pip install ninja"),
        check_shared_memory(machine),
        check_locked_memory(machine),
        Check("system", "InfiniBand", "note", ", ".join(machine.infiniband) or "none"),
        slurm,
    ]


def check_shared_memory(machine: host.Host) -> Check:
    """The space in which ranks of one machine exchange tensors."""
    shared = machine.shared_memory_bytes
    fact = f"{size(shared)}, {size(machine.shared_memory_free_bytes)} free"
    if shared is None or shared < host.SHARED_MEMORY_WANTED:
        mend = "mount -o remount,size=8g /dev/shm (docker run --shm-size=8g)"
        return Check("system", "/dev/shm", "warning", fact, mend)
    return Check("system", "/dev/shm", "ok", fact)


def check_locked_memory(machine: host.Host) -> Check:
    """The limit of memory that InfiniBand may access directly."""
    locked = machine.locked_memory_bytes
    if locked is None:
        return Check("system", "locked memory", "ok", "unlimited")
    if machine.infiniband:
        mend = "ulimit -l unlimited (docker run --ulimit memlock=-1)"
        return Check("system", "locked memory", "warning", f"{size(locked)}; InfiniBand needs more", mend)
    return Check("system", "locked memory", "ok", size(locked))


def _tool(name: str, purpose: str, mend: str) -> Check:
    path = host.find_tool(name)
    if path is None:
        return Check("system", name, "missing", f"not found; it {purpose}", mend)
    return Check("system", name, "ok", path)


def examine(timeout_s: float) -> JsonObject:
    """Run all checks; returns plain JSON values. Takes as long as importing the engines."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = pool.submit(nvml)
        engines = list(pool.map(lambda name: engine(name, timeout_s), registry.names()))
        cards, reason = asked.result()
    machine = host.describe()
    on_gpus = bool(cards and cards["gpus"])
    checks = [
        *(check_engine(one, on_gpus) for one in engines),
        *check_devices(cards, reason, machine),
        *check_system(machine),
        *check_cuda(cards, [one.cuda for one in engines if one.cuda]),
    ]
    return {
        "launcher": launcher.__version__,
        "engines": [asdict(one) for one in engines],
        "gpus": cards,
        "host": asdict(machine),
        "checks": [asdict(check) for check in checks],
    }


def show(found: JsonObject) -> None:
    """Print the table, or plain lines without rich."""
    if Console is None:
        for check in found["checks"]:
            line = f"{check['state']:<8} {check['name']:<14} {check['found']}"
            if check["mend"]:
                line += f"  MEND: {check['mend']}"
            print(line)
        return
    colors = {"ok": "green", "note": "dim", "warning": "yellow", "missing": "red", "broken": "red"}
    console = Console(highlight=False)
    table = Table("", "what", "found", "to mend it", title=f"launcher {found['launcher']}")
    section = ""
    for check in found["checks"]:
        if section not in ("", check["section"]):
            table.add_section()
        section = check["section"]
        state = f"[{colors[check['state']]}]{check['state']}[/]"
        table.add_row(state, check["name"], escape(check["found"]), escape(check["mend"]))
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)


def parse(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line; ConfigError for mistakes."""
    parser = Parser(
        prog="python -m launcher.doctor", description="Check what works on this machine, and how to fix the rest."
    )
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for the import of one engine")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, even with problems, which are lines of the table; 2 for an invalid argument."""
    try:
        arguments = parse(argv)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    checks = examine(arguments.timeout)
    if arguments.json:
        print(json.dumps(checks), flush=True)
    else:
        show(checks)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
