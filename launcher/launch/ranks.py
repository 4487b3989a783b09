"""Start the ranks of this node as child processes, and clean up all of their processes and shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.rank.worker import PARENT
from launcher.system import processes
from shards.machine.interpreter import python_path
from shards.machine.orphans import before_exec
from shards.machine.shared_memory import SharedMemoryWatch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from launcher.run_dir.progress import Progress
    from launcher.run_dir.run import RunDescription
    from launcher.run_dir.run_dir import RunDir


class Terminated(KeyboardInterrupt):
    """This process received SIGTERM."""


def worker_command(module: str, argument: str, processes: int, python: str | None) -> tuple[str, ...]:
    """The command that starts `processes` ranks of a module on this machine; several ranks are forks of one process.

    Each rank is called with `argument`, the run directory for a run.
    """
    interpreter = python or sys.executable
    if processes == 1:
        return (interpreter, "-m", module, argument)
    return (interpreter, "-m", "launcher.launch.forks", str(processes), module, argument)


def rank_command(run_dir: RunDir, run: RunDescription) -> tuple[str, ...]:
    """The command that starts the ranks of a run on this machine."""
    return worker_command("launcher.rank.worker", str(run_dir), run.world_size, run.run_config.backend.python)


def rank_environment(environ: Mapping[str, str], processes: int, on_cuda: bool) -> dict[str, str]:
    """The environment of the ranks of this node: PYTHONPATH with this project, and CPU threads divided among them."""
    threads = max(len(os.sched_getaffinity(0)) // processes, 1)
    common = {"PYTHONPATH": python_path(environ), "TOKENIZERS_PARALLELISM": "false"}
    hidden = {} if on_cuda else {"CUDA_VISIBLE_DEVICES": ""}
    return {"OMP_NUM_THREADS": str(threads), **environ, **common, **hidden}


@dataclass(frozen=True, slots=True)
class StartedRanks:
    """The process that started the ranks of a run, and the shared memory that they have opened."""

    process: subprocess.Popen[bytes]
    mark: str
    memory: SharedMemoryWatch

    def look_at_memory(self) -> None:
        """Record the shared memory segments that the processes of the run have open, to remove them at the end."""
        self.memory.look([item.pid for item in processes.of_run(self.mark)])


@dataclass(slots=True)
class Signals:
    """The state of the signal handlers: once the end of a run has begun, signals are ignored."""

    is_ending: bool = False


@contextlib.contextmanager
def started_ranks(
    run_dir: RunDir, run: RunDescription, command: Sequence[str], variables: Mapping[str, str], signals: Signals
) -> Iterator[StartedRanks]:
    """Start the ranks of a run with `command`; at the end of the block, also after an exception, end all their
    processes and remove their shared memory and scratch folders.

    `variables` are added to their environment.
    """
    memory = SharedMemoryWatch()
    process: subprocess.Popen[bytes] | None = None
    environ = rank_environment(os.environ, run.world_size, run.on_cuda)
    environ |= {processes.MARK: run.mark, PARENT: str(os.getpid()), **variables}
    with run_dir.launch_log.open("wb") as log:
        try:
            process = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # If this process dies: SIGCONT wakes a stopped rank, so that its guard can end it.
                preexec_fn=before_exec(signal.SIGCONT),  # noqa: PLW1509 - two system calls
            )
            yield StartedRanks(process, run.mark, memory)
        finally:
            signals.is_ending = True
            memory.look([item.pid for item in processes.of_run(run.mark)])
            processes.end_run(run.mark)
            if process is not None:
                process.wait()
            memory.remove()
            processes.remove_scratch(run.mark)


def living(ranks: Sequence[Progress | None], mark: str) -> dict[int, int]:
    """The process ids of the living ranks, by rank; a process id that another run has reused does not count."""
    pids = {process.pid for process in processes.of_run(mark)}
    return {number: rank.pid for number, rank in enumerate(ranks) if rank and rank.pid in pids}


@contextlib.contextmanager
def handled_signals(run_dir: RunDir, run: RunDescription) -> Iterator[Signals]:
    """Forward SIGUSR1 to the ranks; raise KeyboardInterrupt or Terminated at the first SIGINT or SIGTERM, unless the
    run is already ending."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals  # only the main thread may set signal handlers
        return

    def pass_on(number: int, _: object) -> None:
        for pid in living(run_dir.read_progress(run.world_size), run.mark).values():
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    def end(number: int, _: object) -> None:
        if not signals.is_ending:
            signals.is_ending = True
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    handlers = {signal.SIGUSR1: pass_on, signal.SIGTERM: end}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a script's background jobs ignore it
        handlers[signal.SIGINT] = end
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
