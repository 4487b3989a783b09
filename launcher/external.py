"""A run whose ranks somebody else started: torchrun, srun, mpirun, deepspeed, accelerate. This process is one rank."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.prepare import create_run_dir
from launcher.record import finish
from launcher.worker import EXIT_CODES, redirected_output, run_rank
from shards.process_group import connect, device_of, from_rank_0

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.prepare import Run
    from shards.world import World

OTHERS_S = 60.0  # how long rank 0 waits for the last words of the others


def join(run: Run, world: World, report: Callable[[dict[str, Any]], None]) -> int:
    """Be this rank of the run; rank 0 makes the run directory and reports. Gives the exit code of this process."""
    connect(world, device_of(world, "auto" if run.on_cuda else "cpu"))
    run_dir = Path(from_rank_0(str(create_run_dir(run)) if world.rank == 0 else ""))
    with redirected_output(run_dir / f"rank_{world.rank}.log"):
        status = run_rank(run_dir, world, parent=None)
    if world.rank == 0:
        _wait_for(run_dir, world.world_size)
        report(finish(run_dir))
    return EXIT_CODES.get(status, 1)


def _wait_for(run_dir: Path, world_size: int) -> None:
    deadline = time.monotonic() + OTHERS_S
    while time.monotonic() < deadline:
        if all((run_dir / f"rank_{rank}.json").exists() for rank in range(world_size)):
            return
        time.sleep(0.05)


def leave(code: int) -> None:
    """End this rank without the interpreter's own exit, which engines' threads can hang."""
    os._exit(code)
