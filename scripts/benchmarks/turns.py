"""The processes of one contestant of benchmark_engines.py, which run in turns with those of the other contestants."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
from ranks import free_port

from shards.machine.shared_memory import SharedMemoryWatch

PROGRAM = Path(__file__).with_name("contestant.py")
LIMIT_S = 900
ENDING_S = 20


class Group:
    """The processes of one contestant, stopped by SIGSTOP except during their turn."""

    def __init__(self, name: str, job: dict[str, Any], processes: int, log: Path) -> None:
        self.name, self.job, self.processes, self.log = name, job, processes, log
        self.connections: list[Connection] = []
        self.children: list[subprocess.Popen[bytes]] = []
        self.failure: str | None = None
        self.load_s: float | None = None
        self.shared_memory = SharedMemoryWatch()

    def start(self) -> None:
        """Start the processes, wait until they have loaded the model, and stop them."""
        cores = len(os.sched_getaffinity(0))
        port = free_port()
        with self.log.open("wb") as log:
            for rank in range(self.processes):
                world: dict[str, Any] = {}
                if self.processes > 1:
                    world = {
                        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes, "MASTER_ADDR": "127.0.0.1",
                        "LOCAL_WORLD_SIZE": self.processes, "MASTER_PORT": port,
                    }  # fmt: skip
                connection, theirs = Pipe()
                threads = str(max(1, cores // self.processes))
                own = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
                child = subprocess.Popen(
                    [self.job.get("python") or sys.executable, str(PROGRAM), str(theirs.fileno())],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    pass_fds=(theirs.fileno(),),
                    env={**os.environ, **{name: str(value) for name, value in world.items()}, **own},
                )  # fmt: skip
                theirs.close()  # so that reading reports EOF when the process has ended
                self.children.append(child)
                self.connections.append(connection)
                with contextlib.suppress(BrokenPipeError):
                    connection.send(self.job)
        loaded = self._answers()
        self._look()
        self._signal(signal.SIGSTOP)
        if loaded:
            self.load_s = max(one["load_s"] for one in loaded)

    def turn(self) -> list[dict[str, Any]] | None:
        """Answer all prompts once: one message per process. None on an error, with the reason in `failure`."""
        self._signal(signal.SIGCONT)
        try:
            for connection in self.connections:
                connection.send("go")
            return self._answers()
        except OSError as error:
            self.failure = f"ended: {error}"
            return None
        finally:
            self._signal(signal.SIGSTOP)

    def _answers(self) -> list[dict[str, Any]] | None:
        end, answers = time.monotonic() + LIMIT_S, []
        try:
            waiting = list(self.connections)
            while waiting:  # in any order: if one process has ended, the others may hang waiting for it
                ready = wait(waiting, max(0, end - time.monotonic()))
                if not ready:
                    self.failure = f"no answer within {LIMIT_S} s"
                    return None
                for connection in ready:
                    waiting.remove(connection)
                    answers.append(connection.recv())
        except (EOFError, ConnectionResetError):
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["without a word"]
            self.failure = lines[-1][:200]
            return None
        return answers

    def _look(self) -> None:
        """Record the files of the processes in shared memory: killed engines, and some that exit normally, leave them
        behind."""
        pids = [child.pid for child in self.children]
        with contextlib.suppress(psutil.NoSuchProcess):
            pids += [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]
        self.shared_memory.look(pids)

    def _signal(self, number: int) -> None:
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)

    def end(self) -> None:
        """End the processes, and remove the files that they have left in shared memory."""
        self._signal(signal.SIGCONT)
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send("end")
        last = time.monotonic() + ENDING_S
        while any(child.poll() is None for child in self.children) and time.monotonic() < last:
            self._look()
            time.sleep(0.1)
        self._signal(signal.SIGKILL)
        for child in self.children:
            child.wait()
        self.shared_memory.remove()
