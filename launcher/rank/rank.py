"""One rank of a run: load, generate, keep every result as it comes, and a last word whatever ends it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from launcher.backends.base import backend_class
from launcher.config.values import from_dict
from launcher.prompts.prompts import read_prompts
from launcher.rank.failures import explain
from launcher.rank.loop import Loop
from launcher.run_dir import attempts
from launcher.run_dir.progress import ProgressWriter
from launcher.system.environment import describe
from launcher.system.files import read_json, write_json
from shards.errors import UserError
from shards.plan.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from launcher.backends.base import Backend, Completion
    from launcher.config.schema import RunConfig
    from launcher.rank.loop import Repeat
    from launcher.results.verdict import Outcome
    from shards.machine.world import World

WORTH_WAITING = ("repeat", "memory", "close", "end")  # stages in which something is about to be saved
LAST_WORD_S = 5.0


class InterruptionError(Exception):
    """The rank was asked to end, and all it did is saved."""


class Rank:
    """This process as one rank of attempt `attempt` at the run in `run_dir`; whatever ends it, its rank file says so.

    The guard's thread calls `interrupt` and `end`; the rest is the main thread's.
    """

    def __init__(self, run_dir: Path, world: World, attempt: int) -> None:
        self.run_dir, self.world, self.attempt = run_dir, world, attempt
        attempts.check(run_dir, attempt)
        self.progress = ProgressWriter(run_dir / f"rank_{world.rank}.progress")
        run = read_json(run_dir / "run.json")
        self.config: RunConfig = from_dict(run["config"])
        self.config.model.path = run["model_folder"] or self.config.model.path
        self.answers = world.rank in attempts.answering(run)
        self.interruption: str | None = None
        self.repeats: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {
            "rank": world.rank,
            "attempt": attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "answers": self.answers,
            "repeats": self.repeats,
        }
        self._writing = threading.Lock()
        self._is_ending = False

    def run(self) -> str:
        """Do the work and write the rank file; gives the status. An error is recorded, never raised."""
        status = self._work()
        self._give_way()
        return status

    def _work(self) -> str:
        try:
            backend = self._load()
            self._generate(backend)
            self.progress.enter("close")
            backend.close()
        except InterruptionError as error:
            return self._interrupted(str(error))
        except BaseException as error:
            traceback.print_exc()
            return self._fail(error)
        self.progress.enter("end")
        return self._write("ok")

    def _load(self) -> Backend:
        self.progress.enter("import")
        backend = _backend(self.config)
        self.progress.enter("load")
        start = time.perf_counter()
        backend.load(Plan.from_dict(read_json(self.run_dir / "plan.json")), self.world, self.progress.advance)
        self.result["load_s"] = time.perf_counter() - start
        return backend

    def _generate(self, backend: Backend) -> None:
        prompts = read_prompts(self.run_dir / "prompts.jsonl")
        Loop(backend, self.config, self.world, self.progress, self).run(prompts, attempts.saved(self.run_dir))
        self.progress.enter("memory")
        self.result["devices"] = [asdict(device) for device in backend.memory()]
        self.result["environment"] = describe()

    def save(self, completions: Sequence[Completion]) -> None:
        """Append to this rank's completions: a line is whole or cut off at the end of the file."""
        names = ("index", "token_ids", "finish_reason", "top2_gaps")
        self._append("completions", [{name: getattr(item, name) for name in names} for item in completions])

    def save_repeat(self, repeat: Repeat) -> None:
        """Append to this rank's measures."""
        self.repeats.append(asdict(repeat))
        self._append("repeats", [self.repeats[-1]])

    def _append(self, kind: str, rows: Sequence[dict[str, Any]]) -> None:
        if not self.answers:
            return
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path = self.run_dir / f"rank_{self.world.rank}.{kind}.jsonl"
        with self._writing:
            if not self._is_ending:  # what is saved after the rank's last word would be in no record
                attempts.check(self.run_dir, self.attempt)
                with path.open("a", encoding="utf-8") as file:
                    file.write(text)
        self._give_way()

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
        return self._write(outcome.status, self._error(type="Ended", message=outcome.message, hint=""))

    def _give_way(self) -> None:
        """Do nothing any more where the guard is about to end the process."""
        while self._is_ending:
            time.sleep(LAST_WORD_S)

    def _fail(self, error: BaseException) -> str:
        status, said = explain(error, self.run_dir / f"rank_{self.world.rank}.log")
        if self.interruption is not None and status != "refused":
            return self._interrupted(self.interruption)  # thrown off by another rank that has gone first
        return self._write(status, self._error(**said))

    def _interrupted(self, reason: str) -> str:
        return self._write("interrupted", self._error(type="Ended", message=reason, hint="resume=true goes on with it"))

    def _error(self, **said: Any) -> dict[str, Any]:
        return {"stage": self.progress.progress.stage, **said}

    def _write(self, status: str, error: dict[str, Any] | None = None) -> str:
        """Write the rank file once, and not if a newer attempt has begun; gives the status that counts."""
        if not self._writing.acquire(timeout=LAST_WORD_S):
            return status
        try:
            if "status" not in self.result:
                attempts.check(self.run_dir, self.attempt)
                last_step = {"last_step_at": self.progress.progress.time, "ended_at": time.time()}
                result = self.result | last_step | {"status": status} | ({"error": error} if error else {})
                write_json(self.run_dir / f"rank_{self.world.rank}.json", result)
                self.result = result
            return str(self.result["status"])
        except attempts.SupersededError:
            return "superseded"
        finally:
            self._writing.release()


def _backend(config: RunConfig) -> Backend:
    name = config.backend.name
    try:
        return backend_class(name)(config)
    except ImportError as error:
        raise UserError(
            f"backend={name} cannot be imported: {error}.", f'pip install -e ".[{name}]", or backend.python=INTERPRETER'
        ) from error
