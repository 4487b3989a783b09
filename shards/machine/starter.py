"""The process that started the ranks of this node."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping

MARKS = (
    "TORCHELASTIC_RUN_ID", "CROSS_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID",
)  # fmt: skip
"""Variables that a launcher sets for its ranks, and does not have itself."""


def starter_of(environ: Mapping[str, str]) -> int | None:
    """The process that started the ranks of this node, such as torchrun's agent; None if no launcher is known.

    Shells between it and this rank are skipped: they would outlive the launcher.
    """
    marks = {name: environ[name] for name in MARKS if name in environ}
    if not marks:
        return None
    pid = os.getppid()
    with contextlib.suppress(psutil.Error):
        while marks.items() <= psutil.Process(pid).environ().items():
            pid = psutil.Process(pid).ppid()
    return pid
