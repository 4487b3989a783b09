"""One rank of a run: load the model, generate, save each result immediately, and always record how the rank ended."""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from typing import TYPE_CHECKING

from launcher.backends.base import TimedBackend
from launcher.config.engines import resolve
from launcher.rank.failures import explain
from launcher.rank.loop import Loop
from launcher.rank.meter import Meter
from launcher.results.completions import SavedCompletion
from launcher.results.figures.cost import LOAD, REPEATS, WARM_UP
from launcher.results.rank_result import RankResult
from launcher.results.record import RunError
from launcher.run_dir.run_dir import SupersededError
from launcher.system.environment import describe
from shards.errors import UserError
from shards.machine.network import network_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.backends.base import Backend, Compilation, Completion, DeviceMemory, LoadTimes
    from launcher.config.schema import RunConfig
    from launcher.results.figures.cost import RankCost
    from launcher.results.figures.quality import Quality
    from launcher.results.measured import Repeat, RequestFailure
    from launcher.results.verdict import Outcome
    from launcher.run_dir.run_dir import RunDir
    from launcher.system.environment import Environment
    from shards.machine.network import Network
    from shards.machine.world import World

WORTH_WAITING = ("repeat", "memory", "close", "end")  # prefixes of stages that save results soon
LAST_WORD_S = 5.0


class InterruptionError(Exception):
    """The rank was asked to end, and its work so far is saved."""


class Rank:
    """This process as one rank of an attempt at the run in `run_dir`. It writes a result, whatever ends it.

    The guard's thread calls `interrupt` and `end`; all other methods run in the main thread.
    """

    def __init__(self, run_dir: RunDir, world: World, attempt: int) -> None:
        self.run_dir, self.world, self.attempt = run_dir, world, attempt
        run_dir.check_attempt(attempt)
        self.files = run_dir.rank(world.rank)
        self.progress = self.files.progress_writer()
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
        self.waits = False  # True: this rank hangs because it waits for another one
        self.network: Network | None = None  # interface to other nodes
        self.meter = Meter(self.config, world)
        self.cost: RankCost | None = None
        self.quality: Quality | None = None
        self.quality_windows = run.quality_windows
        self._result: RankResult | None = None
        self._writing = threading.Lock()
        self._is_ending = False

    def run(self) -> str:
        """Do the work and write the rank's result; returns the status. Errors are recorded, never raised."""
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
            status, explained = explain(error, self.files.log, rank, stage)
            if self.interruption is not None and status != "refused":
                return self._interrupted(self.interruption)  # the error is a consequence: other ranks already left
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
            trace.write(self.files.trace)
        progress.enter("memory")
        self.devices = tuple(backend.memory())
        self.environment = describe()
        progress.enter("close")
        backend.close()

    def save(self, completions: Sequence[Completion], failures: Sequence[RequestFailure] = ()) -> None:
        """Append completions and failures to this rank's completions file."""
        saved = [
            SavedCompletion(c.index, c.token_ids, c.finish_reason, c.top2_gaps, c.text, c.num_tokens)
            for c in completions
        ]
        saved += [SavedCompletion(f.index, (), "failed", failure=f"{f.kind}: {f.message}") for f in failures]
        with self._writing:
            if self._may_save():
                self.files.append_completions(saved)
        self._give_way()

    def save_repeat(self, repeat: Repeat) -> None:
        """Append a repeat to this rank's measurements."""
        self.repeats.append(repeat)
        with self._writing:
            if self._may_save():
                self.files.append_repeat(repeat)
        self._give_way()

    def _may_save(self) -> bool:
        """True if this rank saves answers and is not ending: work saved after its result would miss the record.

        SupersededError if a newer attempt has begun.
        """
        if self._is_ending or not self.answers:
            return False
        self.run_dir.check_attempt(self.attempt)
        return True

    def between_batches(self) -> None:
        """Raise InterruptionError if the rank was asked to end."""
        if self.interruption is not None:
            raise InterruptionError(self.interruption)

    def interrupt(self, reason: str) -> bool:
        """Ask the main thread to end after its batch; True if it will save results that are worth waiting for."""
        self.interruption = reason
        return self.progress.progress.stage.startswith(WORTH_WAITING)

    def end(self, outcome: Outcome) -> str:
        """Write the rank's result unless it is already written; the process then ends. Returns the recorded status."""
        self._is_ending = True
        stage = self.progress.progress.stage
        return self._write(outcome.status, RunError(self.world.rank, stage, "Ended", outcome.message, ""))

    def _give_way(self) -> None:
        """Block for good if the guard is ending the process."""
        while self._is_ending:
            time.sleep(LAST_WORD_S)

    def _interrupted(self, reason: str) -> str:
        stage, hint = self.progress.progress.stage, "resume=true continues it"
        return self._write("interrupted", RunError(self.world.rank, stage, "Ended", reason, hint))

    def _write(self, status: str, error: RunError | None = None) -> str:
        """Write the rank's result, once and only if no newer attempt has begun; returns the recorded status."""
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
                self.files.write_result(result)
                self._result = result
            return self._result.status
        except SupersededError:
            return "superseded"
        finally:
            self._writing.release()
