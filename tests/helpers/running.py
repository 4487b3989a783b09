"""Starting real processes in tests: always with a time-out that ends the whole tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil
from warm import Template, is_forkable

from launcher.system.processes import MARK, end_run
from shards.machine.shared_memory import shared_memory_files, shared_memory_of

ROOT = Path(__file__).resolve().parents[2]
is_warm = False  # with pytest's option --warm
templates: list[Template] = []


@dataclass(frozen=True)
class Ended:
    """A process that has ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def last_json(self) -> Any:
        """The last line of stdout, parsed."""
        return json.loads(self.out.strip().splitlines()[-1])


def environment(**extra: str) -> dict[str, str]:
    """A child's environment: our packages importable, one thread, no GPUs, nothing of a surrounding launcher."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", MARK)
    kept = {key: value for key, value in os.environ.items() if key not in drop and not key.startswith("SLURM_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def run(command: list[str], timeout: float = 120, cwd: Path = ROOT, **extra: str) -> Ended:
    """Run a command to its end; on a time-out its whole tree is killed and the test fails."""
    mark = uuid.uuid4().hex
    environ = environment(**{MARK: mark, **extra})
    if is_warm and (template := template_for(command, environ)):
        return _run_fork(template, command, timeout, cwd, environ)
    process = subprocess.Popen(
        command, cwd=cwd, env=environ, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end_run(mark)
        out, err = process.communicate()
        raise AssertionError(f"{command} took over {timeout} s\n{out[-2000:]}\n{err[-2000:]}") from None
    return Ended(process.returncode, out, err)


def template_for(command: list[str], environ: dict[str, str]) -> Template | None:
    """The interpreter of which the command can be a fork: one that would have read the same environment."""
    if not is_forkable(command):
        return None
    common = {key: value for key, value in environ.items() if key not in (MARK, "PYTEST_CURRENT_TEST", "PYTHONPATH")}
    if not templates:
        templates.append(Template(common | {"PYTHONPATH": str(ROOT)}))
    [template] = templates
    return template if template.environ == common | {"PYTHONPATH": str(ROOT)} else None


def _run_fork(template: Template, command: list[str], timeout: float, cwd: Path, environ: dict[str, str]) -> Ended:
    with TemporaryFile() as out, TemporaryFile() as err:
        with template.start(command, cwd, environ, out.fileno(), err.fileno()) as code:
            code.settimeout(timeout)
            try:
                ended = code.recv(10)
            except TimeoutError:
                end_run(environ[MARK])
                ended = b""
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        assert ended, f"{command} took over {timeout} s\n{texts[0][-2000:]}\n{texts[1][-2000:]}"
        return Ended(int(ended), *texts)


def wait_until_ended(pids: list[int], seconds: float) -> None:
    """Wait for processes of others; one that nobody has reaped has ended."""
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
    """New files in /dev/shm that no process uses: those of tests that run beside this one are in use, or soon gone."""
    end = time.monotonic() + seconds
    while left := [p for p in shared_memory_files() - before - shared_memory_of(psutil.pids()) if p.exists()]:
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    return sorted(path.name for path in left)


def launcher(*overrides: str, timeout: float = 120, cwd: Path = ROOT, **extra: str) -> Ended:
    """`python -m launcher ...` in a process of its own."""
    return run([sys.executable, "-m", "launcher", *overrides], timeout, cwd, **extra)


def torchrun(ranks: int, *arguments: str, timeout: float = 120, **extra: str) -> Ended:
    """`torchrun --standalone --nproc-per-node RANKS ...`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    return run(command, timeout, **extra)


def ranks_of(program: str, ranks: int, *arguments: str, timeout: float = 120, **extra: str) -> Ended:
    """A program of tests/programs as one rank or several, which are forks of one process as in a run."""
    path = str(ROOT / "tests" / "programs" / program)
    if ranks == 1:
        return run([sys.executable, path, *arguments], timeout, **extra)
    command = [sys.executable, "-m", "launcher.launch.forks", str(ranks), "forked", json.dumps([path, *arguments])]
    return run(command, timeout, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests" / "programs")]), **extra)
