"""The attempts at a run: what each has left is kept, the next goes on from it, and only the newest may write.

`python -m launcher.run_dir.attempts RUN_DIR` begins the next attempt and prints its number: for a batch
script, before it starts the ranks.

    attempt.json    the number of the newest attempt, and what started its ranks where that was the launcher
    notes.json      what was found on the devices before the ranks of the newest attempt began, if anything
    attempt_N/      the files of the ranks, the record, the notes and the log of attempt N, once a later one has begun
    saved.json      what the attempts before this one have finished, as all ranks of this one read it
"""

from __future__ import annotations

import contextlib
import fcntl
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.schema import BACKENDS
from launcher.system.files import read_json, read_lines, write_json
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ATTEMPT = "LAUNCHER_ATTEMPT"  # the number of the attempt that a rank belongs to, where its starter has told it
NOTES = "notes.json"
SET_ASIDE = ("rank_*", "stacks_rank_*", "record.json", NOTES, "launch.log")


class SupersededError(Exception):
    """A newer attempt has begun: this process is late and must not write."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What earlier attempts have finished: `rows` as ranks save completions, and by number the repeats of the set."""

    rows: tuple[dict[str, Any], ...] = ()
    repeats: tuple[int, ...] = ()


def begin(run_dir: Path) -> int:
    """Open the next attempt at the run in `run_dir`; its number, from 1.

    Killed at any moment, it can be called again: files are moved, never removed, and what is saved is gathered from
    all attempts before it.
    """
    number = newest(run_dir) + 1
    write_json(run_dir / "attempt.json", {"attempt": number})  # from here on late ranks of older attempts are mute
    _set_aside(run_dir, run_dir / f"attempt_{number - 1}")
    saved = _gather(run_dir)
    write_json(run_dir / "saved.json", {"rows": list(saved.rows), "repeats": list(saved.repeats)})
    return number


def newest(run_dir: Path) -> int:
    """The number of the newest attempt, 0 before the first."""
    found = read_json(run_dir / "attempt.json")
    return int(found["attempt"]) if found else 0


def check(run_dir: Path, attempt: int) -> None:
    """SupersededError where a newer attempt than this one has begun."""
    if (current := newest(run_dir)) > attempt:
        raise SupersededError(f"attempt {current} has begun, and this process belongs to attempt {attempt}")


def saved(run_dir: Path) -> Saved:
    """What the attempts before the newest have finished."""
    found = read_json(run_dir / "saved.json") or {"rows": (), "repeats": ()}
    return Saved(tuple(found["rows"]), tuple(found["repeats"]))


def folders(run_dir: Path) -> list[tuple[int, Path]]:
    """The folders of the earlier attempts, in order."""
    found = ((int(path.name.removeprefix("attempt_")), path) for path in run_dir.glob("attempt_*") if path.is_dir())
    return sorted(found)


def answering(run: dict[str, Any]) -> range:
    """The ranks that answer prompts of their own; of ranks that answer together, the first stands for all."""
    data_parallel = BACKENDS[run["config"]["backend"]["name"]].data_parallel
    return range(run["processes"] if data_parallel else 1)


def repeats_in(folder: Path, ranks: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """The repeats that all of `ranks` have finished in one attempt, by number: each rank's measures."""
    by_rank = [{row["number"]: row for row in read_lines(folder / f"rank_{rank}.repeats.jsonl")} for rank in ranks]
    numbers = sorted(set.intersection(*map(set, by_rank)))
    return {number: [rows[number] for rows in by_rank] for number in numbers}


def completions_in(folder: Path, ranks: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What the ranks of one attempt have saved, up to each one's last whole line."""
    for rank in ranks:
        yield from read_lines(folder / f"rank_{rank}.completions.jsonl")


def _gather(run_dir: Path) -> Saved:
    ranks = answering(read_json(run_dir / "run.json"))
    rows: dict[int, dict[str, Any]] = {}
    repeats: set[int] = set()
    for _, folder in folders(run_dir):
        for row in completions_in(folder, ranks):
            rows.setdefault(row["index"], row)
        repeats |= repeats_in(folder, ranks).keys()
    return Saved(tuple(rows[index] for index in sorted(rows)), tuple(sorted(repeats)))


def _set_aside(run_dir: Path, folder: Path) -> None:
    found = [path for pattern in SET_ASIDE for path in run_dir.glob(pattern)]
    if found:
        folder.mkdir(exist_ok=True)
    for path in found:
        path.rename(folder / path.name)
    for path in run_dir.glob(".*.*"):  # half-written files of processes that were killed
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Only one process at a time launches the run in `run_dir`; UserError where another does. Ends with the process."""
    with (run_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir} is running: another process has launched it.", "wait for its end") from None
        except OSError:
            pass  # a file system without locks
        yield


if __name__ == "__main__":
    print(begin(Path(sys.argv[1])))
