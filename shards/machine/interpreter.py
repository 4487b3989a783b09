"""Other Python processes that are to find these packages, whatever interpreter runs them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[2]  # the folder that both packages are in


def python_path(environ: Mapping[str, str]) -> str:
    """PYTHONPATH for such a process: our packages come before all that `environ` has on it."""
    return os.pathsep.join([str(ROOT), *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))])
