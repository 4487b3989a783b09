"""Begin attempts at a run: each continues the earlier ones, whose results are kept, and only the newest may write.

A batch script calls `python -m launcher.run_dir.attempts RUN_DIR` before it starts the ranks: it begins the next
attempt and prints its number.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.results.completions import Saved, SavedCompletion
from launcher.run_dir.run_dir import RunDir

ATTEMPT = "LAUNCHER_ATTEMPT"  # environment variable: the number of a rank's attempt, if its starter sets it


def begin(run_dir: RunDir) -> int:
    """Begin the next attempt at the run in `run_dir`; returns its number, from 1.

    It can be called again if it was killed: files of results are moved, never removed, and saved results are gathered
    from all earlier attempts.
    """
    number = run_dir.read_attempt() + 1
    run_dir.write_attempt(number)  # from here on, ranks of older attempts must not write
    run_dir.set_aside(number - 1)
    ranks = run_dir.read_run().answering_ranks
    completions: dict[int, SavedCompletion] = {}
    repeats: set[int] = set()
    for _, attempt in run_dir.earlier_attempts():
        for completion in attempt.read_rank_completions(ranks):
            completions.setdefault(completion.index, completion)  # the first answer to a prompt counts
        repeats |= attempt.read_repeats(ranks).keys()
    run_dir.write_saved(Saved(tuple(completions[index] for index in sorted(completions)), tuple(sorted(repeats))))
    return number


if __name__ == "__main__":
    print(begin(RunDir(Path(sys.argv[1]))))
