"""Run as one rank of several that another launcher has started: torchrun, srun, mpirun, deepspeed or accelerate."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.prepare.node import check_node
from launcher.prepare.prepare import prepare
from launcher.rank.worker import EXIT_CODES, enter_world, run_rank
from launcher.run_dir.attempts import ATTEMPT, begin
from launcher.run_dir.gathering import finish
from launcher.run_dir.lifecycle import directory_of
from launcher.run_dir.run_dir import RunDir
from launcher.system.files import writing_in
from launcher.system.terminal import redirected_output
from shards.errors import UserError
from shards.machine.process_group import connect, device_of, disconnect, from_rank_0
from shards.machine.starter import starter_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.config.schema import RunConfig
    from launcher.results.record import Record
    from shards.machine.world import World

OTHERS_S = 60.0  # seconds that rank 0 waits for the results of the other ranks, at most


@dataclass(frozen=True, slots=True)
class _Begun:
    """What rank 0 sends to all ranks: the run directory, and the number of the attempt (None: the run is done)."""

    run_dir: RunDir
    attempt: int | None


def join(config: RunConfig, command: tuple[str, ...], world: World, report: Callable[[Record], None]) -> int:
    """Run this rank, and return the exit code of this process; rank 0 also prepares the run, creates the run directory
    and reports.

    An error of rank 0 is raised on all ranks. Each node checks its own devices and packages.
    """
    starter = starter_of(os.environ)
    kind = "cpu"
    if check_node(config):
        kind = "cuda"
    enter_world(world)
    connect(world, device_of(world, kind), config.join_s)
    result: _Begun | UserError | OSError | None = None
    if world.rank == 0:
        try:
            run = replace(prepare(config, command), world_size=world.world_size)
            with writing_in(Path(config.output_dir)):
                run_dir = directory_of(run)
                result = _Begun(run_dir, None)
                if not run_dir.is_done():
                    result = _Begun(run_dir, begin(run_dir))
        except (UserError, OSError) as error:
            result = error  # sent to the other ranks: raised here, they would only see a broken connection
    begun = from_rank_0(result)
    if isinstance(begun, Exception):
        disconnect()
        raise begun
    run_dir, attempt = begun.run_dir, begun.attempt
    if attempt is None:
        if world.rank == 0 and (record := run_dir.read_record()):
            report(record)
        return 0
    os.environ[ATTEMPT] = str(attempt)
    with redirected_output(run_dir.rank(world.rank).log):
        status = run_rank(run_dir, world, parent=None, starter=starter)
    if world.rank == 0:
        deadline = time.monotonic() + OTHERS_S
        while time.monotonic() < deadline and not run_dir.has_all_results(world.world_size):
            time.sleep(0.05)
        report(finish(run_dir))
    return EXIT_CODES.get(status, 1)
