"""The directory of a run; only this module and rank_files.py know the names and formats of its files.

run.json               the description of the run         plan.json      its plan
config.yaml            its configuration, for people      prompts.jsonl  its prompts as token ids
record.json            the record                         completions.jsonl
command.sh             repeats the run                    launch.log     output of the process that starts the ranks
attempt.json           the number of the newest attempt, and the command that started its ranks
notes.json             notes on the devices, made before the ranks of the newest attempt began
saved.json             completions and repeats of the attempts before the newest
attempt_N/             the files of attempt N after a later one has begun: a directory of the same form
rank_N.*, stacks_rank_N.txt                               files of rank N: see rank_files.py
submit.sbatch, slurm.log, slurm_job                       files of a SLURM job
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.prompts.prompts import read_prompts, write_prompts
from launcher.results.completions import ReportedCompletion, Saved
from launcher.results.record import Record, read_record
from launcher.run_dir.lock import locked
from launcher.run_dir.rank_files import RANK_FILES, SAVED_WORK, RankFiles
from launcher.run_dir.run import RunDescription
from launcher.run_dir.seal import sealed
from launcher.run_dir.typed_files import (
    AGAIN,
    MALFORMED,
    lines_of,
    read_typed,
    read_typed_lines,
    read_value,
    read_word,
    unreadable,
    write_typed,
)
from launcher.system.files import absolute, write_json, write_text
from shards.errors import UserError
from shards.plan.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from launcher.backends.base import Prompt
    from launcher.results.completions import SavedCompletion
    from launcher.results.measured import Repeat
    from launcher.results.rank_result import RankResult
    from launcher.run_dir.progress import Progress

RUN, RECORD, COMPLETIONS = "run.json", "record.json", "completions.jsonl"
SLURM_SCRIPT, SLURM_LOG, SLURM_JOB = "submit.sbatch", "slurm.log", "slurm_job"
OF_AN_ATTEMPT = (*RANK_FILES, RECORD, "notes.json", "launch.log")


class SupersededError(Exception):
    """A newer attempt has begun, so this process must not write any more."""


@dataclass(frozen=True, slots=True)
class CurrentAttempt:
    """The newest attempt, and the command that started its ranks (empty if another launcher started them)."""

    attempt: int
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunDir:
    """One run directory, or the folder of an earlier attempt inside it. Readers return None or an empty value for a
    missing file.

    UserError for a file that cannot be read, or whose values have wrong types.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    # The run: written by run_dir/lifecycle.py when it creates the directory.

    def has_run(self) -> bool:
        """True if a run was begun here."""
        return (self.path / RUN).is_file()

    def read_run(self) -> RunDescription:
        """The checked description of the run; UserError if there is none."""
        run = read_value(self.path / RUN, RunDescription.from_plain)
        if run is None:
            raise UserError(f"{self.path} has no {RUN}: no run was begun there.", "python -m launcher.status runs")
        return run

    def write_run(self, run: RunDescription) -> None:
        write_typed(self.path / RUN, run)

    def write_config(self, text: str) -> None:
        """Write the configuration as YAML, for people; programs use `read_run`."""
        write_text(self.path / "config.yaml", text)

    def read_plan(self) -> Plan | None:
        return read_value(self.path / "plan.json", Plan.from_dict)

    def write_plan(self, plan: Plan | None) -> None:
        """Write the plan; no file for None (the engine's memory use is not modelled)."""
        if plan is not None:
            write_json(self.path / "plan.json", plan.to_dict())

    def read_prompts(self) -> list[Prompt]:
        path = self.path / "prompts.jsonl"
        try:
            return read_prompts(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.", AGAIN) from None
        except MALFORMED as error:
            raise unreadable(path, error) from None

    def write_prompts(self, prompts: Sequence[Prompt]) -> None:
        write_prompts(self.path / "prompts.jsonl", prompts)

    def write_script(self, text: str) -> None:
        """Write the script that repeats the run in a new directory."""
        write_text(self.path / "command.sh", text)

    # The end of a run: written by run_dir/gathering.py.

    def has_record(self) -> bool:
        """True if there is a record, of whatever status."""
        return (self.path / RECORD).exists()

    def read_record(self) -> Record | None:
        """The checked record, of this or an older version."""
        return read_value(self.path / RECORD, read_record)

    def write_record(self, record: Record) -> Record:
        """Write the record with the current hashes of the other files; returns it with these hashes."""
        record = sealed(record, self.path)
        write_typed(self.path / RECORD, record)
        return record

    def is_done(self) -> bool:
        """True if the run succeeded; False also if its record cannot be read."""
        with contextlib.suppress(UserError):
            record = self.read_record()
            return record is not None and record.status == "ok"
        return False

    def read_completions(self) -> list[ReportedCompletion]:
        return list(read_typed_lines(self.path / COMPLETIONS, ReportedCompletion))

    def write_completions(self, completions: Sequence[ReportedCompletion]) -> None:
        write_text(self.path / COMPLETIONS, lines_of(completions, ensure_ascii=False))

    # Attempts: the number of the newest, and the files of earlier ones.

    def read_attempt(self) -> int:
        """The number of the newest attempt, 0 before the first."""
        current = read_typed(self.path / "attempt.json", CurrentAttempt)
        return current.attempt if current else 0

    def write_attempt(self, attempt: int, command: Sequence[str] = ()) -> None:
        write_typed(self.path / "attempt.json", CurrentAttempt(attempt, tuple(command)))

    def check_attempt(self, attempt: int) -> None:
        """Raise SupersededError if a newer attempt than this one has begun."""
        if (newest := self.read_attempt()) > attempt:
            raise SupersededError(f"attempt {newest} has begun, and this process belongs to attempt {attempt}")

    def earlier_attempts(self) -> list[tuple[int, RunDir]]:
        """Number and folder of each attempt before the newest, in order."""
        folders = [path for path in self.path.glob("attempt_*") if re.fullmatch(r"attempt_\d{1,9}", path.name)]
        numbered = [(int(path.name.removeprefix("attempt_")), RunDir(path)) for path in folders if path.is_dir()]
        return sorted(numbered, key=lambda item: item[0])

    def set_aside(self, attempt: int) -> None:
        """Move the files of a finished attempt into its folder, and remove temporary files."""
        paths = [path for pattern in OF_AN_ATTEMPT for path in self.path.glob(pattern)]
        folder = self.path / f"attempt_{attempt}"
        if paths:
            folder.mkdir(exist_ok=True)
        for path in paths:
            path.rename(folder / path.name)
        for path in self.path.glob(".*.*"):
            path.unlink(missing_ok=True)

    def read_saved(self) -> Saved:
        return read_typed(self.path / "saved.json", Saved) or Saved()

    def write_saved(self, saved: Saved) -> None:
        write_typed(self.path / "saved.json", saved)

    def read_notes(self) -> list[str]:
        return read_typed(self.path / "notes.json", list[str]) or []

    def write_notes(self, notes: Sequence[str]) -> None:
        write_json(self.path / "notes.json", list(notes))

    @property
    def mark(self) -> str:
        """The value that marks the processes of the run in their environment; a copy of this directory has another."""
        status = self.path.stat()
        return f"{self.read_run().mark}-{status.st_dev:x}-{status.st_ino:x}"

    def lock(self) -> AbstractContextManager[None]:
        """A context in which no other process can launch the run; UserError if another process holds the lock. The lock
        also ends with the process."""
        return locked(self.path)

    @property
    def launch_log(self) -> Path:
        return self.path / "launch.log"

    # The ranks.

    def rank(self, rank: int) -> RankFiles:
        return RankFiles(self.path, rank)

    def read_ranks(self, count: int) -> list[RankResult | None]:
        """The result of each of the first `count` ranks."""
        return [self.rank(rank).read_result() for rank in range(count)]

    def has_all_results(self, count: int) -> bool:
        """True if each of the first `count` ranks has written its result."""
        return all(self.rank(rank).result.exists() for rank in range(count))

    def read_rank_completions(self, ranks: Iterable[int]) -> Iterator[SavedCompletion]:
        """The completions that the ranks have saved, up to the last complete line of each file."""
        for rank in ranks:
            yield from self.rank(rank).read_completions()

    def read_repeats(self, ranks: Iterable[int]) -> dict[int, list[Repeat]]:
        """The measurements of each rank in the repeats that all of `ranks` have finished, by number."""
        by_rank = [{repeat.number: repeat for repeat in self.rank(rank).read_repeats()} for rank in ranks]
        numbers = sorted(set.intersection(*map(set, by_rank)))
        return {number: [repeats[number] for repeats in by_rank] for number in numbers}

    def has_saved_work(self) -> bool:
        """True if a rank has saved a completion or a repeat."""
        return any(path.stat().st_size for pattern in SAVED_WORK for path in self.path.glob(pattern))

    def read_progress(self, count: int) -> tuple[Progress | None, ...]:
        """The progress of each rank, None for a rank that has not begun."""
        return tuple(self.rank(rank).read_progress() for rank in range(count))

    # The SLURM job of the newest attempt.

    @property
    def slurm_log(self) -> Path:
        return self.path / SLURM_LOG

    def read_job(self) -> str | None:
        """The number of the last job of this run; None for a run that was never submitted to SLURM."""
        return read_word(self.path / SLURM_JOB, r"\d+(_\d+)?")

    def write_job(self, job: str) -> None:
        write_text(self.path / SLURM_JOB, job + "\n")

    def write_slurm_script(self, text: str) -> None:
        write_text(self.path / SLURM_SCRIPT, text)


def run_dirs_in(folder: Path) -> list[RunDir]:
    """The run directories in a folder, including those of refused points, by name."""
    paths = {absolute(path.parent) for name in (RUN, RECORD) for path in folder.glob(f"*/{name}")}
    return [RunDir(path) for path in sorted(paths)]
