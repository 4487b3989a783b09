"""The process of one rank: `python -m launcher.rank.worker RUN_DIR`."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.schema import Accelerator
from launcher.rank import guard
from launcher.rank.rank import Rank
from launcher.rank.watchdog import Watchdog, waits
from launcher.run_dir.attempts import ATTEMPT
from launcher.run_dir.gathering import finish
from launcher.run_dir.run_dir import RunDir, SupersededError
from launcher.system.terminal import redirected_output
from shards.machine.cards import count_as_nvml
from shards.machine.network import choose_interface
from shards.machine.world import World

if TYPE_CHECKING:
    from launcher.results.verdict import Outcome

PARENT = "LAUNCHER_PARENT"  # process id of the launching process, if there is one on this node
WATCH = "LAUNCHER_WATCH"  # set if the ranks run the watchdog, because the parent does not
EXIT_CODES = {"ok": 0, "refused": 2, "interrupted": guard.EXIT_CODES["interrupted"]}
OTHERS_S = 0.3


def enter_world(world: World) -> None:
    """Set this process's environment: the variables of its world, CUDA's numbering of GPUs (as in NVML), and the
    network interface to other nodes."""
    os.environ.update(world.environ())
    count_as_nvml(os.environ)
    if world.num_nodes > 1:
        choose_interface(world, os.environ)


def run_rank(run_dir: RunDir, world: World, parent: int | None, starter: int | None = None) -> str:
    """Run one rank to its end, supervised by a guard; returns its status.

    `parent` is the process that supervises the run on this node and writes its record. If there is none, or it has
    ended, a rank that is made to end writes the record itself. `starter` is a process that only started the rank, such
    as torchrun's agent; the rank ends with it. SIGUSR2 prints all stacks on stderr.
    """
    attempt = int(os.environ.get(ATTEMPT) or run_dir.read_attempt())
    try:
        rank = Rank(run_dir, world, attempt)
    except SupersededError:
        return "superseded"
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)

    def end(outcome: Outcome, parent_is_gone: bool) -> None:
        if outcome.status in ("hang", "timeout"):
            stacks = rank.files.stacks
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            rank.waits = waits(stacks.read_text(), rank.config.accelerator is Accelerator.cuda)
        if rank.end(outcome) != "superseded" and (parent is None or parent_is_gone):
            time.sleep(OTHERS_S + (watched.look_s if watched.look else 0))  # let the others write their results
            finish(run_dir, outcome)

    watched = guard.Watched(rank.interrupt, end)
    if parent is None or WATCH in os.environ:
        watchdog = Watchdog(rank.config)
        watched = replace(
            watched, look=lambda: watchdog.look(run_dir.read_progress(world.world_size)), look_s=watchdog.look_s
        )
    guard.start(parent or starter, watched, term_interrupts=os.environ.get(guard.ON_TERM) == "interrupt")
    return rank.run()


def main(folder: str) -> None:
    """The entry point of a started rank. Exit code: 0 ok, 2 refused, 75 interrupted (can be resumed), 1 otherwise."""
    parent = int(os.environ[PARENT]) if PARENT in os.environ else None
    run_dir, world = RunDir(Path(folder)), World.from_env(os.environ)
    enter_world(world)
    with redirected_output(run_dir.rank(world.rank).log):
        status = run_rank(run_dir, world, parent)
    # Engines leave threads and handlers behind that can abort or hang a normal interpreter exit.
    os._exit(EXIT_CODES.get(status, 1))


if __name__ == "__main__":
    main(sys.argv[1])
