"""Settings for processes of other Python interpreters that must import this project."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[2]  # the folder that contains both packages


def pip_install(extra: str) -> str:
    """The command that installs an extra of this project, in a checkout or next to the installed package."""
    if (ROOT / "pyproject.toml").is_file():
        return f'pip install -e ".[{extra}]"'
    return f'pip install "multi-gpu-launcher[{extra}]"'


def python_path(environ: Mapping[str, str]) -> str:
    """PYTHONPATH for such a process: this project before everything in `environ`."""
    return os.pathsep.join([str(ROOT), *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))])
