"""A run whose ranks somebody else started: torchrun, srun, mpirun, deepspeed, accelerate. This process is one rank."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.launch import resume
from launcher.rank.worker import EXIT_CODES, redirected_output, run_rank
from launcher.results.record import finish
from launcher.run_dir import attempts
from launcher.system.files import read_json, writing_in
from shards.errors import UserError
from shards.machine.hardware import count_as_nvml
from shards.machine.process_group import connect, device_of, disconnect, from_rank_0

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.run_dir.run import Run
    from shards.machine.world import World

OTHERS_S = 60.0  # how long rank 0 waits for the last words of the others


def join(run: Run, world: World, report: Callable[[dict[str, Any]], None]) -> int:
    """Be this rank of the run; rank 0 makes the run directory and reports. Gives the exit code of this process.

    What keeps rank 0 from making it is raised on all ranks.
    """
    count_as_nvml(os.environ)
    connect(world, device_of(world, run.config.accelerator.value))
    begun = from_rank_0(_begin(run) if world.rank == 0 else None)
    if isinstance(begun, Exception):
        disconnect()
        raise begun
    run_dir, attempt = begun
    if attempt is None:
        if world.rank == 0:
            report(read_json(run_dir / "record.json"))
        return 0
    os.environ[attempts.ATTEMPT] = str(attempt)
    with redirected_output(run_dir / f"rank_{world.rank}.log"):
        status = run_rank(run_dir, world, parent=None)
    if world.rank == 0:
        _wait_for(run_dir, world.world_size)
        report(finish(run_dir))
    return EXIT_CODES.get(status, 1)


def _begin(run: Run) -> tuple[Path, int | None] | UserError | OSError:
    """The directory of the run and the number of this attempt, None where nothing is left to do; or why there is none.

    The others wait for what is found here: an error that leaves it would be theirs as a broken connection.
    """
    try:
        with writing_in(Path(run.config.output_dir)):
            run_dir, is_done = resume.directory_of(run)
            return run_dir, None if is_done else attempts.begin(run_dir)
    except (UserError, OSError) as error:
        return error


def _wait_for(run_dir: Path, world_size: int) -> None:
    deadline = time.monotonic() + OTHERS_S
    while time.monotonic() < deadline:
        if all((run_dir / f"rank_{rank}.json").exists() for rank in range(world_size)):
            return
        time.sleep(0.05)
