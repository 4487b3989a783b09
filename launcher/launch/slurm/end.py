"""The end of a batch script: goes on later, or writes the record.

`python -m launcher.launch.slurm.end RUN_DIR CODE [HOW]`

CODE is what srun ended with; HOW is `1` where the script itself was told to end (scancel, time limit, requeue), `final`
where the job cannot be queued again, else empty. Exit code 75: queue the job again; else 0 ok, 2 refused, 1 otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.launch.slurm.script import AGAIN
from launcher.results.record import finish
from launcher.results.verdict import Outcome
from launcher.run_dir import attempts
from launcher.run_dir.progress import read_progress
from launcher.system.files import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STOPPED = (AGAIN, 143, 138)  # ranks that saved what they had; ranks killed by SIGTERM or SIGUSR1 before they began
EXIT_CODES = {"ok": 0, "refused": 2}


def main(arguments: Sequence[str]) -> int:
    """The exit code of the batch script."""
    run_dir, code, how = Path(arguments[0]), int(arguments[1]), (*arguments[2:], "")[0]
    ranks = _ranks(run_dir)
    told = how == "1"
    if not how and _may_go_on(run_dir, os.environ) and is_stopped(ranks, code):
        return AGAIN
    outcome = Outcome("failed", f"srun ended with exit code {code}") if code else None
    if told and _at_time_limit(os.environ):
        outcome = Outcome("timeout", "the time limit of the job")
    elif told or is_stopped(ranks, code):
        outcome = Outcome("cancelled", "SLURM ended the job" if told else "SLURM stopped the job")
    record = finish(run_dir, outcome)
    return EXIT_CODES.get(record["status"], 1)


def _ranks(run_dir: Path) -> list[str | None]:
    """The status of each rank; `silent` of one that had begun and left no word, None of one that never began."""
    count = read_json(run_dir / "run.json")["processes"]
    found = [read_json(run_dir / f"rank_{rank}.json") for rank in range(count)]
    begun = [read_progress(run_dir / f"rank_{rank}.progress") is not None for rank in range(count)]
    return [rank["status"] if rank else "silent" if some else None for rank, some in zip(found, begun, strict=True)]


def is_stopped(ranks: Sequence[str | None], code: int) -> bool:
    """Whether the ranks were stopped from outside: none of them is to blame, and not all had finished."""
    if not set(ranks) <= {"ok", "interrupted", "cancelled", None} or all(rank == "ok" for rank in ranks):
        return False
    return "interrupted" in ranks or code in STOPPED


def _may_go_on(run_dir: Path, environ: Mapping[str, str]) -> bool:
    """Whether the job may be queued again: it is allowed to, and of its last two attempts one made some progress."""
    cluster = read_json(run_dir / "run.json")["config"]["cluster"]
    if not cluster["requeue"] or int(environ.get("SLURM_RESTART_COUNT", 0)) >= cluster["max_requeues"]:
        return False
    earlier = attempts.folders(run_dir)
    return not earlier or any(_made_progress(folder) for folder in (run_dir, earlier[-1][1]))


def _made_progress(folder: Path) -> bool:
    return any(
        path.stat().st_size > 0 for kind in ("completions", "repeats") for path in folder.glob(f"*.{kind}.jsonl")
    )


def _at_time_limit(environ: Mapping[str, str]) -> bool:
    """Whether the job has used up its time, as SLURM says; False where it does not answer."""
    command = ["squeue", "-h", "-j", environ.get("SLURM_JOB_ID", ""), "-o", "%L"]
    try:
        said: Any = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return False
    return said in ("0:00", "INVALID")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
