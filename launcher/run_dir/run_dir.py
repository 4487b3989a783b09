"""The directory of a run: the only place that knows the names of its files, and how each is written and read.

run.json               the description of the run         plan.json      its plan
config.yaml            its configuration, for people      prompts.jsonl  its prompts as token ids
record.json            the record                         completions.jsonl
command.sh             makes the same run again           launch.log     output of what starts the ranks
attempt.json           the number of the newest attempt, and the command that started its ranks
notes.json             what was to be noted of the devices before the ranks of the newest attempt began
saved.json             what the attempts before the newest have finished
attempt_N/             the files of attempt N, once a later one has begun: a directory of the same form
rank_N.*, stacks_rank_N.txt                               of rank N: see rank_files.py
submit.sbatch, slurm.log, slurm_job                       of a job of SLURM
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
    """A newer attempt has begun: this process is late and must not write."""


@dataclass(frozen=True, slots=True)
class CurrentAttempt:
    """The newest attempt, and the command that started its ranks where the launcher did."""

    attempt: int
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunDir:
    """One run directory, or the folder in it of an earlier attempt. Methods that read give None for a missing file.

    UserError in one line for a file that cannot be read, or whose values have other types than a run writes.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    # The run: written when the directory is made, by run_dir/lifecycle.py.

    def has_run(self) -> bool:
        """True if a run was begun here."""
        return (self.path / RUN).is_file()

    def read_run(self) -> RunDescription:
        """The checked description of the run; UserError where none was begun here."""
        run = read_value(self.path / RUN, RunDescription.from_plain)
        if run is None:
            raise UserError(f"{self.path} has no {RUN}: no run was begun there.", "python -m launcher.status runs")
        return run

    def write_run(self, run: RunDescription) -> None:
        write_typed(self.path / RUN, run)

    def write_config(self, text: str) -> None:
        """The configuration for people, as YAML; `read_run` has it for programs."""
        write_text(self.path / "config.yaml", text)

    def read_plan(self) -> Plan | None:
        return read_value(self.path / "plan.json", Plan.from_dict)

    def write_plan(self, plan: Plan | None) -> None:
        """Without a plan (the memory of the engine is not known) there is no such file."""
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
        """The script that makes the same run once more, in a directory of its own."""
        write_text(self.path / "command.sh", text)

    # The end of a run: written by run_dir/gathering.py.

    def has_record(self) -> bool:
        """True if there is a record, of whatever status."""
        return (self.path / RECORD).exists()

    def read_record(self) -> Record | None:
        """The checked record, of this or an older version."""
        return read_value(self.path / RECORD, read_record)

    def write_record(self, record: Record) -> Record:
        """Write it with the hashes of the other files as they are now; gives it so."""
        record = sealed(record, self.path)
        write_typed(self.path / RECORD, record)
        return record

    def is_done(self) -> bool:
        """True if the run has ended well; False also if its record cannot be read."""
        with contextlib.suppress(UserError):
            record = self.read_record()
            return record is not None and record.status == "ok"
        return False

    def read_completions(self) -> list[ReportedCompletion]:
        return list(read_typed_lines(self.path / COMPLETIONS, ReportedCompletion))

    def write_completions(self, completions: Sequence[ReportedCompletion]) -> None:
        write_text(self.path / COMPLETIONS, lines_of(completions, ensure_ascii=False))

    # Attempts: which is the newest, and what those before it have left.

    def read_attempt(self) -> int:
        """The number of the newest attempt, 0 before the first."""
        current = read_typed(self.path / "attempt.json", CurrentAttempt)
        return current.attempt if current else 0

    def write_attempt(self, attempt: int, command: Sequence[str] = ()) -> None:
        write_typed(self.path / "attempt.json", CurrentAttempt(attempt, tuple(command)))

    def check_attempt(self, attempt: int) -> None:
        """SupersededError where a newer attempt than this one has begun."""
        if (newest := self.read_attempt()) > attempt:
            raise SupersededError(f"attempt {newest} has begun, and this process belongs to attempt {attempt}")

    def earlier_attempts(self) -> list[tuple[int, RunDir]]:
        """Number and folder of each attempt before the newest, in order."""
        folders = [path for path in self.path.glob("attempt_*") if re.fullmatch(r"attempt_\d{1,9}", path.name)]
        numbered = [(int(path.name.removeprefix("attempt_")), RunDir(path)) for path in folders if path.is_dir()]
        return sorted(numbered, key=lambda item: item[0])

    def set_aside(self, attempt: int) -> None:
        """Move the files of an attempt that is over into its folder, and remove half-written ones."""
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
        """The value in the environment of every process of the run; a copy of this directory has another one."""
        status = self.path.stat()
        return f"{self.read_run().mark}-{status.st_dev:x}-{status.st_ino:x}"

    def lock(self) -> AbstractContextManager[None]:
        """Only one process at a time launches the run; UserError where another does. Ends with the process."""
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
        """The completions that ranks have saved, up to each one's last whole line."""
        for rank in ranks:
            yield from self.rank(rank).read_completions()

    def read_repeats(self, ranks: Iterable[int]) -> dict[int, list[Repeat]]:
        """The repeats that all of `ranks` have finished, by number: each rank's measurements."""
        by_rank = [{repeat.number: repeat for repeat in self.rank(rank).read_repeats()} for rank in ranks]
        numbers = sorted(set.intersection(*map(set, by_rank)))
        return {number: [repeats[number] for repeats in by_rank] for number in numbers}

    def has_saved_work(self) -> bool:
        """True if some rank has saved a completion or a repeat."""
        return any(path.stat().st_size for pattern in SAVED_WORK for path in self.path.glob(pattern))

    def read_progress(self, count: int) -> tuple[Progress | None, ...]:
        """The progress of each rank, None of one that has not begun."""
        return tuple(self.rank(rank).read_progress() for rank in range(count))

    # The job of SLURM that the newest attempt runs in.

    @property
    def slurm_log(self) -> Path:
        return self.path / SLURM_LOG

    def read_job(self) -> str | None:
        """The number of the job that runs, or ran, this directory; None for a run that no SLURM has seen."""
        return read_word(self.path / SLURM_JOB, r"\d+(_\d+)?")

    def write_job(self, job: str) -> None:
        write_text(self.path / SLURM_JOB, job + "\n")

    def write_slurm_script(self, text: str) -> None:
        write_text(self.path / SLURM_SCRIPT, text)


def run_dirs_in(folder: Path) -> list[RunDir]:
    """The run directories in a folder, those of refused points too, by name."""
    paths = {absolute(path.parent) for name in (RUN, RECORD) for path in folder.glob(f"*/{name}")}
    return [RunDir(path) for path in sorted(paths)]
