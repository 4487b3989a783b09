"""Output and exit of every command: on a terminal, into a file or a pipe, and on Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import TYPE_CHECKING, Any, NoReturn

from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT
PIPE_BROKEN = 128 + signal.SIGPIPE


class Parser(ArgumentParser):
    """An argument parser that raises ConfigError, accepts no abbreviations, and prints its description unchanged."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.", f"{self.prog} --help")


def run_command(main: Callable[[], int]) -> int:
    """Run `main` and return its exit code, with at most one line on stderr if it fails; PYTHONINSPECT is ignored."""
    code = _run(main)
    if os.environ.get("PYTHONINSPECT"):
        os._exit(code)  # a normal exit would print a traceback of SystemExit, and wait for input
    return code


def _run(main: Callable[[], int]) -> int:
    """The exit code of `main`; neither Ctrl-C nor a closed output gives a traceback.

    Characters that an output cannot encode are replaced. If an output cannot be written to: 2, with a line on stderr.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: keep the next opened file from getting this number
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        return _ended("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of the output, for example `head`, has ended
        return _ended("", PIPE_BROKEN)
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):  # rich exits so on a broken pipe
            raise
        return _ended("", PIPE_BROKEN)
    except OSError as error:
        if error.filename is not None:
            hint = "see that it is there, and yours to read and write"
            return _ended(f"{error.filename} cannot be used: {error.strerror}. HINT: {hint}", 2)
        return _ended(f"Cannot write: {error.strerror}. HINT: make room, or let the output go elsewhere", 2)
    return code


def _ended(line: str, code: int) -> int:
    """Print a last line on stderr, drop buffered output if it has no reader, and return `code`."""
    if line:
        line += "\n"
    for stream, last in ((sys.stdout, ""), (sys.stderr, line)):
        try:
            if stream is not None:  # None if it was closed at start
                print(last, end="", file=stream, flush=True)
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


@contextlib.contextmanager
def redirected_output(path: Path) -> Iterator[None]:
    """A context in which all output of this process and its children goes to `path`, including that of native code."""
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
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None if it was closed at start
            stream.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)
