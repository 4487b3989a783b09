"""The process of one rank: load, generate, keep every result as it comes, and a last word whatever ends it.

Started as `python -m launcher.rank.worker RUN_DIR`.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends.base import TimedBackend
from launcher.config.engines import resolve
from launcher.config.schema import Accelerator
from launcher.rank import guard
from launcher.rank.failures import explain
from launcher.rank.loop import Loop
from launcher.rank.meter import Meter
from launcher.rank.watchdog import Watchdog, waits
from launcher.results.completions import SavedCompletion
from launcher.results.cost import LOAD, REPEATS, WARM_UP
from launcher.results.quality import Quality
from launcher.results.rank_result import RankResult
from launcher.results.record import RunError
from launcher.run_dir.attempts import ATTEMPT
from launcher.run_dir.gathering import finish
from launcher.run_dir.run_dir import RunDir, SupersededError
from launcher.system.environment import describe
from launcher.system.terminal import redirected_output
from shards.errors import UserError
from shards.machine.cards import count_as_nvml
from shards.machine.network import choose_interface, network_of
from shards.machine.world import World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.backends.base import Backend, Compilation, Completion, DeviceMemory, LoadTimes
    from launcher.config.schema import RunConfig
    from launcher.results.cost import RankCost
    from launcher.results.measured import Repeat, RequestFailure
    from launcher.results.verdict import Outcome
    from launcher.system.environment import Environment
    from shards.machine.network import Network

PARENT = "LAUNCHER_PARENT"  # process id of the launching process, where there is one on this node
WATCH = "LAUNCHER_WATCH"  # set where the parent does not look at the ranks' progress: they do
EXIT_CODES = {"ok": 0, "refused": 2, "interrupted": guard.EXIT_CODES["interrupted"]}
WORTH_WAITING = ("repeat", "memory", "close", "end")  # stages in which something is about to be saved
LAST_WORD_S, OTHERS_S = 5.0, 0.3


def enter_world(world: World) -> None:
    """Set this process's environment, once: the variables of its world, CUDA's numbers of cards like NVML's, and the
    interface to other nodes."""
    os.environ.update(world.environ())
    count_as_nvml(os.environ)
    if world.num_nodes > 1:
        choose_interface(world, os.environ)


class InterruptionError(Exception):
    """The rank was asked to end, and all it did is saved."""


class Rank:
    """This process as one rank of attempt `attempt` at the run in `run_dir`; whatever ends it, its last word says so.

    The guard's thread calls `interrupt` and `end`; the rest is the main thread's.
    """

    def __init__(self, run_dir: RunDir, world: World, attempt: int) -> None:
        self.run_dir, self.world, self.attempt = run_dir, world, attempt
        run_dir.check_attempt(attempt)
        self.progress = run_dir.progress_writer(world.rank)
        run = run_dir.read_run()
        self.config: RunConfig = run.run_config
        self.config.model.path = run.model_folder or self.config.model.path
        self.config.run_dir = str(run_dir)
        self.answers = world.rank in run.answering_ranks
        self.interruption: str | None = None
        self.repeats: list[Repeat] = []
        self.load_s: float | None = None
        self.load_times: LoadTimes | None = None
        self.compilation: Compilation | None = None
        self.devices: tuple[DeviceMemory, ...] = ()
        self.environment: Environment | None = None
        self.waits = False  # for other ranks, where this one hangs
        self.network: Network | None = None  # to other nodes
        self.meter = Meter(self.config, world)
        self.cost: RankCost | None = None
        self.quality: Quality | None = None
        self.quality_windows = run.quality_windows
        self._result: RankResult | None = None
        self._writing = threading.Lock()
        self._is_ending = False

    def run(self) -> str:
        """Do the work and leave the rank's last word; gives the status. An error is recorded, never raised."""
        status = self._work()
        self._give_way()
        return status

    def _work(self) -> str:
        try:
            self._load_and_generate()
        except InterruptionError as error:
            return self._interrupted(str(error))
        except BaseException as error:
            traceback.print_exc()
            rank, stage = self.world.rank, self.progress.progress.stage
            status, explained = explain(error, self.run_dir.rank_log(rank), rank, stage)
            if self.interruption is not None and status != "refused":
                return self._interrupted(self.interruption)  # thrown off by another rank that has gone first
            return self._write(status, explained)
        self.progress.enter("end")
        return self._write("ok")

    def _load_and_generate(self) -> None:
        config, world, progress = self.config, self.world, self.progress
        progress.enter("import")
        if world.num_nodes > 1:
            self.network = network_of(world, os.environ, config.accelerator.value)
        if config.launch.nccl_debug:
            os.environ["NCCL_DEBUG"] = "INFO"
        try:
            backend: Backend = resolve(config.backend.implementation)(config)
        except ImportError as error:
            hint = f"{config.backend.install_hint()}, or backend.python=INTERPRETER"
            raise UserError(f"backend={config.backend.name} cannot be imported: {error}.", hint) from error
        progress.enter("load")
        self.meter.enter(LOAD)
        start = time.perf_counter()
        backend.load(self.run_dir.read_plan(), world, progress.advance)
        self.load_s = time.perf_counter() - start
        self.load_times = backend.load_times() if isinstance(backend, TimedBackend) else None
        loop = Loop(backend, config, world, progress, self)
        prompts = self.run_dir.read_prompts()
        self.meter.enter(WARM_UP)
        self.compilation = loop.warm_up(prompts)
        self.meter.enter(REPEATS)
        loop.run(prompts, self.run_dir.read_saved())
        self.cost = self.meter.end()
        self.quality = loop.score(self.quality_windows)
        steps = config.measure.profile
        if steps is not None and (trace := loop.trace(prompts, steps, world.rank == 0)) is not None:
            trace.write(self.run_dir.trace(world.rank))
        progress.enter("memory")
        self.devices = tuple(backend.memory())
        self.environment = describe()
        progress.enter("close")
        backend.close()

    def save(self, completions: Sequence[Completion], failures: Sequence[RequestFailure] = ()) -> None:
        """Append to this rank's completions."""
        saved = [
            SavedCompletion(c.index, c.token_ids, c.finish_reason, c.top2_gaps, c.text, c.num_tokens)
            for c in completions
        ]
        saved += [SavedCompletion(f.index, (), "failed", failure=f"{f.kind}: {f.message}") for f in failures]
        with self._writing:
            if self._may_save():
                self.run_dir.append_completions(self.world.rank, saved)
        self._give_way()

    def save_repeat(self, repeat: Repeat) -> None:
        """Append to this rank's measurements."""
        self.repeats.append(repeat)
        with self._writing:
            if self._may_save():
                self.run_dir.append_repeat(self.world.rank, repeat)
        self._give_way()

    def _may_save(self) -> bool:
        """True if what is saved now will be in the record: not after the rank's last word."""
        if self._is_ending or not self.answers:
            return False
        self.run_dir.check_attempt(self.attempt)
        return True

    def between_batches(self) -> None:
        """End here if the rank was asked to."""
        if self.interruption is not None:
            raise InterruptionError(self.interruption)

    def interrupt(self, reason: str) -> bool:
        """Ask the main thread to end after its batch; whether there is something worth waiting for."""
        self.interruption = reason
        return self.progress.progress.stage.startswith(WORTH_WAITING)

    def end(self, outcome: Outcome) -> str:
        """Leave a word before the process ends, unless the rank has already had its last; gives the status."""
        self._is_ending = True
        stage = self.progress.progress.stage
        return self._write(outcome.status, RunError(self.world.rank, stage, "Ended", outcome.message, ""))

    def _give_way(self) -> None:
        """Do nothing any more where the guard is about to end the process."""
        while self._is_ending:
            time.sleep(LAST_WORD_S)

    def _interrupted(self, reason: str) -> str:
        stage, hint = self.progress.progress.stage, "resume=true goes on with it"
        return self._write("interrupted", RunError(self.world.rank, stage, "Ended", reason, hint))

    def _write(self, status: str, error: RunError | None = None) -> str:
        """Write the rank's last word once, and not if a newer attempt has begun; gives the status that counts."""
        if not self._writing.acquire(timeout=LAST_WORD_S):
            return status
        try:
            if self._result is None:
                self.run_dir.check_attempt(self.attempt)
                result = RankResult(
                    rank=self.world.rank,
                    attempt=self.attempt,
                    status=status,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    answers=self.answers,
                    last_step_at=self.progress.progress.time,
                    ended_at=time.time(),
                    error=error,
                    load_s=self.load_s,
                    load_times=self.load_times,
                    compilation=self.compilation,
                    repeats=tuple(self.repeats),
                    devices=self.devices,
                    environment=self.environment,
                    waits=self.waits,
                    network=self.network,
                    cost=self.cost,
                    quality=self.quality,
                )
                self.run_dir.write_rank(result)
                self._result = result
            return self._result.status
        except SupersededError:
            return "superseded"
        finally:
            self._writing.release()


def run_rank(run_dir: RunDir, world: World, parent: int | None, starter: int | None = None) -> str:
    """Be one rank from here to its end, watched over by a guard; gives the status of the rank.

    `parent` is the process that watches the run from this node and writes its record; without one, or once it is
    gone, the rank that is told to end writes the record itself. So it does where a `starter` that does neither is gone.
    SIGUSR2 puts all stacks on stderr.
    """
    attempt = int(os.environ.get(ATTEMPT) or run_dir.read_attempt())
    try:
        rank = Rank(run_dir, world, attempt)
    except SupersededError:
        return "superseded"
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)

    def end(outcome: Outcome, parent_is_gone: bool) -> None:
        if outcome.status in ("hang", "timeout"):
            stacks = run_dir.stacks(world.rank)
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            rank.waits = waits(stacks.read_text(), rank.config.accelerator is Accelerator.cuda)
        if rank.end(outcome) != "superseded" and (parent is None or parent_is_gone):
            time.sleep(OTHERS_S + (watched.look_s if watched.look else 0))  # the others end for the same reason now
            finish(run_dir, outcome)

    watched = guard.Watched(rank.interrupt, end)
    if parent is None or WATCH in os.environ:
        watchdog = Watchdog(rank.config)
        watched = replace(
            watched, look=lambda: watchdog.look(run_dir.read_progress(world.world_size)), look_s=watchdog.look_s
        )
    guard.start(parent or starter, watched, term_interrupts=os.environ.get(guard.ON_TERM) == "interrupt")
    return rank.run()


def main(folder: str) -> None:
    """The entry point of a started rank. Exit code 0 ok, 2 refused, 75 interrupted (go on later), 1 anything else."""
    parent = int(os.environ[PARENT]) if PARENT in os.environ else None
    run_dir, world = RunDir(Path(folder)), World.from_env(os.environ)
    enter_world(world)
    with redirected_output(run_dir.rank_log(world.rank)):
        status = run_rank(run_dir, world, parent)
    # Engines leave threads and handlers behind that can abort or hang a normal interpreter exit.
    os._exit(EXIT_CODES.get(status, 1))


if __name__ == "__main__":
    main(sys.argv[1])
