"""Starting real processes in tests, always with a time-out that ends the whole process tree."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import psutil
from warm import ForkedCommand, Template, kind_of

from launcher.__main__ import main
from launcher.system.processes import MARK, end_run
from launcher.system.terminal import run_command
from shards.machine.shared_memory import shared_memory_files, shared_memory_of
from shards.machine.world import World

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]
WITH_PROGRAMS = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "programs")])
READ_LATE = {
    *World().environ(), "TORCHELASTIC_RUN_ID", "PATH", "SLURM_CONF", "PYTEST_CURRENT_TEST", "PYTHONPATH", MARK,
}  # fmt: skip
"""Environment variables that no package reads on import, so a fork may have other values than its template."""

is_warm = False  # True with pytest's option --warm
templates: dict[str, Template] = {}  # started by this process, by kind of command
starting = threading.Lock()

Process = subprocess.Popen[str] | ForkedCommand


@dataclass(frozen=True)
class Ended:
    """The exit code and output of a process that has ended."""

    code: int
    out: str
    err: str

    @property
    def last_json(self) -> Any:
        """The last line of stdout, parsed."""
        return json.loads(self.out.strip().splitlines()[-1])


def environment(**extra: str) -> dict[str, str]:
    """A child's environment: our packages importable, one thread, no GPUs, no variables of a surrounding launcher."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", MARK)
    kept = {key: value for key, value in os.environ.items() if key not in drop and not key.startswith("SLURM_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def start(command: Sequence[str], cwd: Path = ROOT, forks: bool = True, **extra: str) -> Process:
    """Start a command in a new session, with its output in pipes or files.

    With `--warm` it is a fork of a template if `forks` is true, there is a template for this kind of command, and the
    environment differs from the template's only in variables that no import reads.
    """
    environ = environment(**extra)
    kind = kind_of(command)
    if is_warm and forks and kind is not None and environ["PYTHONPATH"] in (str(ROOT), WITH_PROGRAMS):
        with starting:
            if kind not in templates:
                templates[kind] = Template(kind, environment())
        template = templates[kind]
        differing = {name for name, _ in environ.items() ^ template.environ.items()}
        if differing <= READ_LATE:
            return template.start(command, cwd, environ)
    return subprocess.Popen(
        command, cwd=cwd, env=environ, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def run(command: list[str], timeout: float = 120, cwd: Path = ROOT, forks: bool = True, **extra: str) -> Ended:
    """Run a command to its end; on a time-out its whole tree is killed and the test fails."""
    mark = uuid.uuid4().hex
    process = start(command, cwd, forks, **{MARK: mark, **extra})
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end_run(mark)
        out, err = process.communicate()
        raise AssertionError(f"{command} took over {timeout} s\n{out[-2000:]}\n{err[-2000:]}") from None
    assert process.returncode is not None
    return Ended(process.returncode, out, err)


def wait_until_ended(pids: list[int], seconds: float) -> None:
    """Wait until processes, not necessarily children, have ended. Zombies count as ended."""
    deadline = time.monotonic() + seconds
    while living := [pid for pid in pids if _lives(pid)]:
        assert time.monotonic() < deadline, f"{living} live"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def left_in_shared_memory(before: set[Path], seconds: float = 10) -> list[str]:
    """New files in /dev/shm that no process uses. Files of concurrent tests are in use, or removed within `seconds`."""
    end = time.monotonic() + seconds
    while left := [p for p in shared_memory_files() - before - shared_memory_of(psutil.pids()) if p.exists()]:
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    return sorted(path.name for path in left)


def launcher(*overrides: str, timeout: float = 120, cwd: Path = ROOT, **extra: str) -> Ended:
    """Run `python -m launcher ...` in a separate process."""
    return run([sys.executable, "-m", "launcher", *overrides], timeout, cwd, **extra)


def command_line(*overrides: str, **extra: str) -> Ended:
    """Run `python -m launcher ...` in this process, for commands that start no ranks: refusals and dry runs."""
    out, err = io.StringIO(), io.StringIO()
    environ = patch.dict(os.environ, environment(**extra), clear=True)
    with environ, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(lambda: main(list(overrides)))
    return Ended(code, out.getvalue(), err.getvalue())


def torchrun(ranks: int, *arguments: str, timeout: float = 120, **extra: str) -> Ended:
    """Run `torchrun --standalone --nproc-per-node RANKS ...`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    return run(command, timeout, **extra)


def ranks_of(program: str, ranks: int, *arguments: str, timeout: float = 120, **extra: str) -> Ended:
    """Run a program of tests/programs as one or several ranks, which are forks of one process as in a run."""
    path = str(ROOT / "tests" / "programs" / program)
    if ranks == 1:
        return run([sys.executable, path, *arguments], timeout, **extra)
    command = [sys.executable, "-m", "launcher.launch.forks", str(ranks), "forked", json.dumps([path, *arguments])]
    return run(command, timeout, PYTHONPATH=WITH_PROGRAMS, **extra)
