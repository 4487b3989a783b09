"""Run directory -> processes on this machine, watched to their end. Command lines are values."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launcher.rank.watchdog import Watchdog, blame, write_stacks
from launcher.rank.worker import PARENT
from launcher.results.verdict import Outcome
from launcher.run_dir.attempts import ATTEMPT, begin
from launcher.run_dir.finish import finish
from launcher.system import processes
from launcher.system.gpu_users import neighbours
from shards.machine.interpreter import python_path
from shards.machine.orphans import before_exec
from shards.machine.shared_memory import SharedMemoryWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from launcher.results.record import Record
    from launcher.run_dir.progress import Progress
    from launcher.run_dir.run import RunDescription
    from launcher.run_dir.run_dir import RunDir

    Show = Callable[[Sequence[Progress | None]], None]

POLL_S = 0.1
LOOK_EVERY = 10  # polls between looks at shared memory


class Terminated(KeyboardInterrupt):
    """This process received SIGTERM."""


def worker_command(
    argument: str, processes: int, python: str | None, module: str = "launcher.rank.worker"
) -> tuple[str, ...]:
    """The command that starts ranks on this machine, a run's (`argument` is its directory) or those of another module.

    It is torchrun's own for several, a plain one for one.
    """
    interpreter = python or sys.executable
    if processes == 1:
        return (interpreter, "-m", module, argument)
    return (
        interpreter, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "--max-restarts=0", "-m", module, argument,
    )  # fmt: skip


def rank_environment(environ: Mapping[str, str], processes: int, on_cuda: bool) -> dict[str, str]:
    """The environment of the ranks of this node: our packages on the path, the cores shared out between them."""
    threads = max(len(os.sched_getaffinity(0)) // processes, 1)
    common = {"PYTHONPATH": python_path(environ), "TOKENIZERS_PARALLELISM": "false"}
    hidden = {} if on_cuda else {"CUDA_VISIBLE_DEVICES": ""}
    return {"OMP_NUM_THREADS": str(threads), **environ, **common, **hidden}


def run_local(run_dir: RunDir, show: Show) -> Record:
    """Make the next attempt at the run in `run_dir`: start its ranks, watch them to their end, leave nothing behind.

    Gives the record. SIGUSR1 to this process is passed on to the ranks: they save what they have, and the run can go on
    later. SIGINT and SIGTERM end it at once; all after the first are passed over, until the record is written.
    UserError where another process has the run in hand.
    """
    with run_dir.lock():
        run = replace(run_dir.read_run(), mark=run_dir.mark)
        processes.end_run(run.mark)  # what is left of an attempt whose launching process was killed
        return _attempt(run_dir, run, begin(run_dir), show)


def _attempt(run_dir: RunDir, run: RunDescription, attempt: int, show: Show) -> Record:
    config = run.run_config
    if run.on_cuda and (notes := neighbours(os.environ, config.devices)):
        run_dir.write_notes(notes)
    command = worker_command(str(run_dir), run.world_size, config.backend.python)
    run_dir.write_attempt(attempt, command)
    if run.script is not None:
        run_dir.write_script(run.script)
    memory = SharedMemoryWatch()
    variables = {processes.MARK: run.mark, PARENT: str(os.getpid()), ATTEMPT: str(attempt)}
    outcome: Outcome | None = None
    process: subprocess.Popen[bytes] | None = None
    with run_dir.launch_log.open("wb") as log, _signals(run_dir, run) as ending:
        try:
            process = subprocess.Popen(
                command,
                env=rank_environment(os.environ, run.world_size, run.on_cuda) | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # One that is stopped goes on, and its guard sees to its end.
                preexec_fn=before_exec(signal.SIGCONT),  # noqa: PLW1509 - two system calls
            )
            outcome = _watch(process, run_dir, run, Watchdog(config), memory, show)
            ending.begun = True
        except KeyboardInterrupt as error:
            by = "received SIGTERM" if isinstance(error, Terminated) else "interrupted from the keyboard"
            outcome = Outcome("cancelled", by)
        finally:
            ending.begun = True
            memory.look([item.pid for item in processes.of_run(run.mark)])
            processes.end_run(run.mark)
            if process is not None:
                process.wait()
            memory.remove()
            processes.remove_scratch(run.mark)
        return finish(run_dir, outcome)


def _watch(
    process: subprocess.Popen[bytes],
    run_dir: RunDir,
    run: RunDescription,
    watchdog: Watchdog,
    memory: SharedMemoryWatch,
    show: Show,
) -> Outcome | None:
    """Poll until the started process ends, or has to be ended; how it did where it was not well."""
    polls = 0
    while process.poll() is None:
        ranks = run_dir.read_progress(run.world_size)
        if polls % LOOK_EVERY == 0:
            memory.look([item.pid for item in processes.of_run(run.mark)])
        show(ranks)
        if outcome := watchdog.look(ranks):
            return blame(outcome, ranks, write_stacks(run_dir, living(ranks, run.mark)), run.on_cuda)
        polls += 1
        time.sleep(POLL_S)
    if process.returncode == 0:
        return None
    return Outcome("failed", f"the process that starts the ranks ended with exit code {process.returncode}")


def living(ranks: Sequence[Progress | None], mark: str) -> dict[int, int]:
    """The process ids of the ranks that live, by rank; a number that another run's process has by now is not one."""
    pids = {process.pid for process in processes.of_run(mark)}
    return {number: rank.pid for number, rank in enumerate(ranks) if rank and rank.pid in pids}


@dataclass(slots=True)
class _Ending:
    """Whether the end of the run has begun: a signal must not leave half of it undone."""

    begun: bool = False


@contextlib.contextmanager
def _signals(run_dir: RunDir, run: RunDescription) -> Iterator[_Ending]:
    """In here SIGUSR1 goes to the ranks; the first SIGINT or SIGTERM raises, unless the end has begun."""
    ending = _Ending()
    if threading.current_thread() is not threading.main_thread():
        yield ending  # only the main thread may set handlers: a caller in Python sees to its own signals
        return

    def pass_on(number: int, _: object) -> None:
        for pid in living(run_dir.read_progress(run.world_size), run.mark).values():
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    def end(number: int, _: object) -> None:
        if not ending.begun:
            ending.begun = True
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    handlers = {signal.SIGUSR1: pass_on, signal.SIGTERM: end}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is for what a script has put in the background
        handlers[signal.SIGINT] = end
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
