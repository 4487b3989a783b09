"""The attempts at a run: the results of each are kept, the next one continues, and only the newest may write.

`python -m launcher.run_dir.attempts RUN_DIR` begins the next attempt and prints its number: for a batch script, before
it starts the ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.results.completions import Saved, SavedCompletion
from launcher.run_dir.run_dir import RunDir

ATTEMPT = "LAUNCHER_ATTEMPT"  # the number of the attempt that a rank belongs to, where its starter has told it


def begin(run_dir: RunDir) -> int:
    """Begin the next attempt at the run in `run_dir`; returns its number, from 1.

    If it is killed at any moment it can be called again: files are moved, never removed, and saved results are gathered
    from all earlier attempts.
    """
    number = run_dir.read_attempt() + 1
    run_dir.write_attempt(number)  # from here on late ranks of older attempts are mute
    run_dir.set_aside(number - 1)
    ranks = run_dir.read_run().answering_ranks
    completions: dict[int, SavedCompletion] = {}
    repeats: set[int] = set()
    for _, attempt in run_dir.earlier_attempts():
        for completion in attempt.read_rank_completions(ranks):
            completions.setdefault(completion.index, completion)  # of a prompt that was answered twice the first answer
        repeats |= attempt.read_repeats(ranks).keys()
    run_dir.write_saved(Saved(tuple(completions[index] for index in sorted(completions)), tuple(sorted(repeats))))
    return number


if __name__ == "__main__":
    print(begin(RunDir(Path(sys.argv[1]))))
