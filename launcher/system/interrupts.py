"""Handle Ctrl-C while a command is still importing: print one line, as launcher.system.terminal does later."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType


def end_quietly_when_interrupted() -> None:
    """From now on, an uncaught KeyboardInterrupt prints one line and gives exit code 130."""
    sys.excepthook = _without_traceback


def _without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)
