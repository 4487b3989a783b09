"""A server that is started for a run: its processes, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Self

from launcher.config.schema import ConfigError
from launcher.system.files import read_end
from launcher.system.processes import end_run, of_run
from shards.machine.shared_memory import SharedMemoryWatch

if TYPE_CHECKING:
    from launcher.backends.endpoint.commands import ServerCommand

SERVER = "LAUNCHER_SERVER"  # environment variable that every process of a server inherits
GRACE_S = 20.0  # seconds for a server to end its own workers; then they are killed
LAST_LINES = 5


class ServerEndedError(RuntimeError):
    """The started server has ended by itself."""


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class StartedServer:
    """The processes of a server, from its start to the end of a context. They write to `log`."""

    def __init__(self, command: ServerCommand, log: Path) -> None:
        self.command, self.log = command, log
        self.mark = uuid.uuid4().hex
        self._memory = SharedMemoryWatch()

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self) -> None:
        """Start the server; ConfigError if its program is missing."""
        with self.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    self.command.words,
                    env=os.environ | self.command.environment | {SERVER: self.mark},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                fact = f"Cannot start {self.command.words[0]}: {error.strerror}."
                raise ConfigError(fact, f"server.python={sys.executable}, or PATH with its folder") from None

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """ServerEndedError, with its last output, if the server has ended. To be called regularly."""
        self._memory.look(self.pids())
        if (code := self._process.poll()) is not None:
            lines = [line for line in read_end(self.log).splitlines() if line.strip()]
            tail = " | ".join(line.strip() for line in lines[-LAST_LINES:]) or "nothing"
            raise ServerEndedError(f"the server ended with exit code {code}; its last lines: {tail}")

    def pids(self) -> list[int]:
        """The processes of the server: the started one, its children and theirs, whatever their session."""
        return [process.pid for process in of_run(self.mark, SERVER)]

    def anonymous_bytes(self) -> int:
        """Anonymous resident memory of all its processes."""
        total = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):  # the process has ended meanwhile
                match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
                if match is not None:
                    total += int(match.group(1)) * 1024
        return total

    def close(self) -> None:
        """End every process of the server, and remove what they leave in shared memory."""
        self._memory.look(self.pids())
        end_run(self.mark, SERVER, GRACE_S)
        self._process.wait()
        self._memory.remove()
        if self.command.after:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(self.command.after, capture_output=True, timeout=GRACE_S, check=False)
