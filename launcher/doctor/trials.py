"""Run operations that may raise, crash or hang in separate processes. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.config import engines
from launcher.config.schema import ConfigError
from launcher.doctor.host import find_tool
from shards.machine.interpreter import python_path
from shards.machine.orphans import before_exec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shards.untrusted_files import JsonObject

NVML_S = 20.0
QUERY = (
    "index", "name", "uuid", "driver_version", "memory.total", "memory.reserved", "memory.free", "compute_cap",
    "pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current", "pcie.link.width.max", "mig.mode.current",
    "ecc.mode.current", "ecc.errors.uncorrected.volatile.total", "persistence_mode", "compute_mode",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Engine:
    """The result of importing an engine; `error` is None if it can be imported."""

    name: str
    versions: dict[str, str | None]
    error: str | None = None
    missing: tuple[str, ...] = ()
    cuda: str | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A finished trial: its lines on stdout, its last output on stderr, and its exit code (None: it timed out)."""

    out: list[str]
    last_words: str
    code: int | None


def attempt(module: str, arguments: Sequence[str], timeout_s: float) -> Ended:
    """Run a module of this package in its own process; it and its children are killed after the time limit."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": python_path(os.environ)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=before_exec(signal.SIGTERM),  # noqa: PLW1509 - two system calls
    )
    code = None
    try:
        out, err = process.communicate(timeout=timeout_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    words = ["", *(line.strip() for line in err.splitlines() if line.strip())]
    return Ended(out.splitlines(), words[-1], code)


def engine(name: str, timeout_s: float) -> Engine:
    """Try to import the packages of an engine."""
    try:
        packages = engines.load_engine(name).packages
    except ConfigError as error:
        return Engine(name, {}, error.fact)
    if not packages:
        return Engine(name, {})
    ended = attempt("launcher.doctor.importing", packages, timeout_s)
    rows = _objects(ended.out)
    done = {row["module"]: row for row in rows if "version" in row}
    versions = {module: row["version"] for module, row in done.items()}
    cuda = next((row["cuda"] for row in done.values() if row["cuda"]), None)
    last: JsonObject = next(reversed(rows), {})
    if last.get("missing"):
        return Engine(name, versions, f"{last['module']} is not installed", (last["module"],), cuda)
    if "error" in last:
        return Engine(name, versions, f"{last['module']}: {last['error']}", (), cuda)
    if len(done) < len(packages):
        return Engine(
            name, versions, f"importing {last.get('importing', packages[0])} {_end(ended, timeout_s)}", (), cuda
        )
    return Engine(name, versions, None, (), cuda)


def _objects(lines: Sequence[str]) -> list[JsonObject]:
    checks = []
    for line in lines:
        with contextlib.suppress(ValueError):
            checks.append(json.loads(line))
    return [row for row in checks if isinstance(row, dict)]


def _end(ended: Ended, timeout_s: float) -> str:
    """A description of how a process ended that printed no result."""
    if ended.code is None:
        return f"took more than {timeout_s:g} s"
    if ended.code < 0:
        return f"crashed: {signal.Signals(-ended.code).name}"
    return f"ended with exit code {ended.code}: {ended.last_words}"


def nvml() -> tuple[JsonObject | None, str]:
    """The GPUs as reported by NVML, or None with the reason. Without pynvml, nvidia-smi gives part of the values."""
    ended = attempt("shards.machine.nvml", (), NVML_S)
    reports = _objects(ended.out)
    if ended.code == 0 and reports:
        return reports[-1], ""
    if "No module named 'pynvml'" in ended.last_words and (shown := nvidia_smi()) is not None:
        return shown, ""
    if ended.code == 1:
        return None, ended.last_words
    return None, f"NVML {_end(ended, NVML_S)}"


def nvidia_smi() -> JsonObject | None:
    """The GPUs as reported by nvidia-smi, in the form of shards.machine.nvml; None if it does not run."""
    program = find_tool("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=NVML_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [dict(zip(QUERY, map(str.strip, line.split(",")), strict=False)) for line in out.splitlines()]
    gpus = [_gpu(row) for row in rows if row.get("index", "").isdigit()]
    driver = next((row.get("driver_version") for row in rows), None)
    return {"driver": driver, "cuda_driver": None, "gpus": gpus, "links": []}


def _gpu(row: dict[str, str]) -> JsonObject:
    def number(key: str) -> int | None:
        if row.get(key, "").isdigit():
            return int(row[key])
        return None

    def memory(key: str) -> int | None:
        mebibytes = number(f"memory.{key}")
        if mebibytes is None:
            return None
        return mebibytes << 20

    def switch(key: str) -> bool | None:
        return {"Enabled": True, "Disabled": False}.get(row.get(key, ""))

    total, reserved = memory("total"), memory("reserved")
    if total is not None:
        total -= reserved or 0
    return {
        "index": number("index"),
        "name": row.get("name"),
        "uuid": row.get("uuid"),
        "memory_bytes": total,
        "reserved_bytes": reserved,
        "free_bytes": memory("free"),
        "compute_capability": row.get("compute_cap"),
        "pcie_generation": number("pcie.link.gen.current"),
        "pcie_generation_max": number("pcie.link.gen.max"),
        "pcie_width": number("pcie.link.width.current"),
        "pcie_width_max": number("pcie.link.width.max"),
        "nvlinks": None,
        "mig": switch("mig.mode.current"),
        "ecc": switch("ecc.mode.current"),
        "ecc_errors": number("ecc.errors.uncorrected.volatile.total"),
        "persistence": switch("persistence_mode"),
        "compute_mode": row.get("compute_mode", "").lower().replace("_", " ") or None,
        "processes": [],
    }
