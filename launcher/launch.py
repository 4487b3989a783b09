"""Run directory -> processes on this machine -> record. Command lines are values; nothing is started to make one."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import processes
from launcher.files import read_json, write_text
from launcher.progress import read_progress
from launcher.record import Outcome, finish
from launcher.worker import PARENT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.prepare import Run
    from launcher.progress import Progress

POLL_S = 0.1
LOOK_EVERY = 10  # polls between looks at shared memory


def worker_command(run_dir: str, processes: int, python: str | None) -> tuple[str, ...]:
    """The command that starts the ranks of a run on this machine: torchrun's own for several, a plain one for one."""
    interpreter = python or sys.executable
    if processes == 1:
        return (interpreter, "-m", "launcher.worker", run_dir)
    return (
        interpreter, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "--max-restarts=0", "-m", "launcher.worker", run_dir,
    )  # fmt: skip


def worker_environment(environ: dict[str, str], run: Run, mark: str) -> dict[str, str]:
    """The environment of the ranks: this one's, our packages on the path, threads shared out between the ranks."""
    root = str(Path(__file__).resolve().parents[1])
    path = [root, *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    own = {
        "PYTHONPATH": os.pathsep.join(path),
        processes.MARK: mark,
        PARENT: str(os.getpid()),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if "OMP_NUM_THREADS" not in environ:
        own["OMP_NUM_THREADS"] = str(max(len(os.sched_getaffinity(0)) // max(run.processes, 1), 1))
    if not run.on_cuda:
        own["CUDA_VISIBLE_DEVICES"] = ""
    return {**environ, **own}


def write_command(run_dir: Path, command: Sequence[str]) -> None:
    """`command.sh`: what was started, to read and to start again by hand."""
    write_text(run_dir / "command.sh", f"#!/bin/sh\nexec {shlex.join(command)}\n")


def run_local(run: Run, run_dir: Path, show: Callable[[Sequence[Progress | None]], None]) -> dict[str, Any]:
    """Start the ranks, watch them to their end, leave nothing behind, and return the record."""
    mark = read_json(run_dir / "run.json")["mark"]
    command = worker_command(str(run_dir), run.processes, run.config.backend.python)
    write_command(run_dir, command)
    memory = processes.SharedMemoryWatch()
    outcome: Outcome | None = None
    with (run_dir / "launch.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=worker_environment(dict(os.environ), run, mark),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = _watch(process, run_dir, run.processes, mark, memory, show)
        if code != 0:
            outcome = Outcome("failed", f"the process that starts the ranks ended with exit code {code}")
    except KeyboardInterrupt:
        outcome = Outcome("cancelled", "interrupted from the keyboard")
    finally:
        memory.look([item.pid for item in processes.of_run(mark)])
        processes.end_run(mark)
        process.wait()
        memory.remove()
    return finish(run_dir, outcome)


def _watch(
    process: subprocess.Popen[bytes],
    run_dir: Path,
    count: int,
    mark: str,
    memory: processes.SharedMemoryWatch,
    show: Callable[[Sequence[Progress | None]], None],
) -> int:
    """Poll until the started process ends; its exit code."""
    polls = 0
    while process.poll() is None:
        ranks = tuple(read_progress(run_dir / f"rank_{rank}.progress") for rank in range(count))
        if polls % LOOK_EVERY == 0:
            memory.look([item.pid for item in processes.of_run(mark)])
        show(ranks)
        polls += 1
        time.sleep(POLL_S)
    return process.returncode
