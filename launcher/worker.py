"""One rank of a run: run directory -> load -> generate -> rank file. `python -m launcher.worker RUN_DIR`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import guard
from launcher.backend import backend_class
from launcher.config import from_dict
from launcher.environment import describe
from launcher.files import read_json, write_json
from launcher.generate import Loop
from launcher.progress import ProgressWriter
from launcher.prompts import read_prompts
from launcher.record import Outcome, finish
from shards.errors import UserError
from shards.world import World

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from launcher.backend import Backend, Completion
    from launcher.config import RunConfig

PARENT = "LAUNCHER_PARENT"  # process id of the launching process, where there is one on this node
EXIT_CODES = {"ok": 0, "refused": 2}


class Rank:
    """This process as one rank of the run in `run_dir`; whatever ends it, its rank file says so."""

    def __init__(self, run_dir: Path, world: World) -> None:
        self.run_dir, self.world = run_dir, world
        self.progress = ProgressWriter(run_dir / f"rank_{world.rank}.progress")
        run = read_json(run_dir / "run.json")
        self.config: RunConfig = from_dict(run["config"])
        self.config.model.path = run["model_folder"] or self.config.model.path
        self.answers = world.rank == 0 or self.config.backend.data_parallel
        self.result: dict[str, Any] = {
            "rank": world.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "answers": self.answers,
        }

    def run(self) -> str:
        """Do the work and write the rank file; gives the status. An error is recorded, never raised."""
        backend = None
        try:
            backend = self._load()
            self._generate(backend)
            self.progress.enter("close")
            backend.close()
        except BaseException as error:
            self._fail(error)
            return str(self.result["status"])
        self._write("ok")
        return "ok"

    def _load(self) -> Backend:
        self.progress.enter("import")
        backend = _backend(self.config)
        self.progress.enter("load")
        start = time.perf_counter()
        backend.load(read_json(self.run_dir / "plan.json"), self.world, self.progress.advance)
        self.result["load_s"] = time.perf_counter() - start
        return backend

    def _generate(self, backend: Backend) -> None:
        prompts = read_prompts(self.run_dir / "prompts.jsonl")
        repeats = Loop(backend, self.config, self.world, self.progress, self._save).run(prompts)
        self.progress.enter("memory")
        self.result["repeats"] = [asdict(repeat) for repeat in repeats]
        self.result["devices"] = [asdict(device) for device in backend.memory()]
        self.result["environment"] = describe()

    def _save(self, completions: Sequence[Completion]) -> None:
        """Append to this rank's completions: a line is whole or cut off at the end of the file."""
        if not self.answers:
            return
        names = ("index", "token_ids", "finish_reason", "top2_gaps")
        lines = [json.dumps({name: getattr(item, name) for name in names}) + "\n" for item in completions]
        with (self.run_dir / f"rank_{self.world.rank}.completions.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def _fail(self, error: BaseException) -> None:
        status = "refused" if isinstance(error, UserError) else "oom" if _is_oom(error) else "failed"
        text = str(error.fact if isinstance(error, UserError) else error).strip()
        self.result["error"] = {
            "stage": self.progress.progress.stage,
            "type": type(error).__name__,
            "message": text.splitlines()[0] if text else type(error).__name__,
            "hint": error.hint if isinstance(error, UserError) else "",
            "traceback": traceback.format_exc(),
        }
        traceback.print_exc()
        self._write(status)

    def cancel(self, reason: str) -> None:
        """What the guard does before the process ends: leave a word, unless the rank has already had its last."""
        if "status" not in self.result:
            stage = self.progress.progress.stage
            self.result["error"] = {"stage": stage, "type": "Cancelled", "message": reason, "hint": ""}
            self._write("cancelled")

    def _write(self, status: str) -> None:
        self.result |= {"status": status, "ended_at": time.time()}
        write_json(self.run_dir / f"rank_{self.world.rank}.json", self.result)


def _backend(config: RunConfig) -> Backend:
    name = config.backend.name
    try:
        return backend_class(name)(config)
    except ImportError as error:
        raise UserError(
            f"backend={name} cannot be imported: {error}.", f'pip install -e ".[{name}]", or backend.python=INTERPRETER'
        ) from error


def _is_oom(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)


@contextlib.contextmanager
def redirected_output(path: Path) -> Iterator[None]:
    """All that this process and its children print goes to `path`, native code's words too."""
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    saved = os.dup(1), os.dup(2)
    _point_output(log, log)
    try:
        yield
    finally:
        _point_output(*saved)
        for file in (log, *saved):
            os.close(file)


def _point_output(out: int, err: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)


def run_rank(run_dir: Path, world: World, parent: int | None) -> str:
    """Be one rank from here to its end, watched over by a guard; gives the status of the rank.

    `parent` is the process that watches the run from this node and writes its record; without one, or once it is
    gone, the rank that is told to end writes the record itself.
    """
    os.environ.update(world.environ())
    rank = Rank(run_dir, world)

    def on_end(reason: str, parent_is_gone: bool) -> None:
        rank.cancel(reason)
        if parent is None or parent_is_gone:
            finish(run_dir, Outcome("failed" if parent_is_gone else "cancelled", reason))

    guard.start(parent, on_end)
    return rank.run()


def main() -> None:
    """The entry point of a started rank. Exit code 0 ok, 2 refused, 1 anything else."""
    parent = int(os.environ[PARENT]) if PARENT in os.environ else None
    run_dir, world = Path(sys.argv[1]), World.from_env(os.environ)
    with redirected_output(run_dir / f"rank_{world.rank}.log"):
        status = run_rank(run_dir, world, parent)
    # Engines leave threads and handlers behind that can abort or hang a normal interpreter exit.
    os._exit(EXIT_CODES.get(status, 1))


if __name__ == "__main__":
    main()
