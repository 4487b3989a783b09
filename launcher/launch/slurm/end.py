"""The last step of a batch script: decide whether to requeue the job, or write the record.

`python -m launcher.launch.slurm.end RUN_DIR CODE [HOW]`

CODE is the exit code of srun; HOW is `1` if the script received SIGTERM (scancel, time limit, requeue), `final` if the
job cannot be requeued, otherwise empty. Exit code: 75 requeue the job, 0 ok, 2 refused, 1 otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.launch.slurm.script import AGAIN
from launcher.results.verdict import Outcome
from launcher.run_dir.gathering import finish
from launcher.run_dir.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STOPPED = (AGAIN, 143, 138)  # ranks that saved their work; ranks killed by SIGTERM or SIGUSR1 before they began
EXIT_CODES = {"ok": 0, "refused": 2}


def main(arguments: Sequence[str]) -> int:
    """Decide how the batch script ends, and write the record unless it is requeued; returns the exit code."""
    run_dir, code, how = RunDir(Path(arguments[0])), int(arguments[1]), (*arguments[2:], "")[0]
    count = run_dir.read_run().world_size
    ranks: list[str | None] = []
    for rank, progress in zip(run_dir.read_ranks(count), run_dir.read_progress(count), strict=True):
        if rank is not None:
            ranks.append(rank.status)
        elif progress is not None:
            ranks.append("silent")  # it had begun, but wrote no result
        else:
            ranks.append(None)
    was_ended = how == "1"
    if not how and _may_go_on(run_dir, os.environ) and is_stopped(ranks, code):
        return AGAIN
    outcome = None
    if was_ended and _at_time_limit(os.environ):
        outcome = Outcome("timeout", "the time limit of the job")
    elif was_ended:
        outcome = Outcome("cancelled", "SLURM ended the job")
    elif is_stopped(ranks, code):
        outcome = Outcome("cancelled", "SLURM stopped the job")
    elif code:
        outcome = Outcome("failed", f"srun ended with exit code {code}")
    record = finish(run_dir, outcome)
    return EXIT_CODES.get(record.status, 1)


def is_stopped(ranks: Sequence[str | None], code: int) -> bool:
    """True if the ranks were stopped from outside: none of them failed by itself, and not all had finished."""
    if not set(ranks) <= {"ok", "interrupted", "cancelled", None} or all(rank == "ok" for rank in ranks):
        return False
    return "interrupted" in ranks or code in STOPPED


def _may_go_on(run_dir: RunDir, environ: Mapping[str, str]) -> bool:
    """True if the job may be requeued: the settings allow it, and one of its last two attempts saved work."""
    cluster = run_dir.read_run().run_config.cluster
    if not cluster.requeue or int(environ.get("SLURM_RESTART_COUNT", 0)) >= cluster.max_requeues:
        return False
    earlier = run_dir.earlier_attempts()
    return not earlier or run_dir.has_saved_work() or earlier[-1][1].has_saved_work()


def _at_time_limit(environ: Mapping[str, str]) -> bool:
    """True if SLURM reports that the job has used up its time; False if SLURM does not answer."""
    command = ["squeue", "-h", "-j", environ.get("SLURM_JOB_ID", ""), "-o", "%L"]
    try:
        left = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return False
    return left in ("0:00", "INVALID")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
