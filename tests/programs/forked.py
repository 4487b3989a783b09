"""A rank that runs another program. It imports the modules that most programs need before the ranks are forked."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import launcher.backends.module  # noqa: F401 - what takes seconds to import


def main(command: str) -> None:
    """Run the program of a command line, given as a list in JSON."""
    sys.argv = json.loads(command)
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
