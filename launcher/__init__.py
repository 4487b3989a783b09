"""One run: configuration, processes, prompts, the generation loop, measures, the record and its report."""

from __future__ import annotations

import os
import sys
from typing import Any

__version__ = "0.1.0"


def _without_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C while a command is still importing is one line, as it is later (launcher.system.terminal)."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if sys.argv[:1] == ["-m"]:  # which it is while Python looks for a command of ours, and for no one who imports us
    sys.excepthook = _without_traceback
