"""The files of one rank in a run directory; only this module knows their names and formats.

rank_N.json                its result, written once at its end
rank_N.log                 its output; rank_0.server.log is that of the server that it started
rank_N.progress            its current stage and step
rank_N.completions.jsonl   the completions that it has saved so far
rank_N.repeats.jsonl       the measurements of the repeats that it has finished
rank_N.trace.json          the steps that measure.profile traced
stacks_rank_N.txt          its stacks if it hung
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.results.completions import SavedCompletion
from launcher.results.measured import Repeat
from launcher.results.rank_result import RankResult
from launcher.run_dir.progress import Progress, ProgressWriter, read_progress
from launcher.run_dir.typed_files import lines_of, read_typed, read_typed_lines, write_typed
from launcher.system.files import read_end

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RANK_FILES = ("rank_*", "stacks_rank_*")
RANK_LOGS = "rank_*.log"
SAVED_WORK = ("rank_*.completions.jsonl", "rank_*.repeats.jsonl")


@dataclass(frozen=True, slots=True)
class RankFiles:
    """The files of rank `rank` in `folder`. For a missing file, readers return None or no items."""

    folder: Path
    rank: int

    @property
    def result(self) -> Path:
        return self._file("json")

    @property
    def log(self) -> Path:
        return self._file("log")

    @property
    def server_log(self) -> Path:
        return self._file("server.log")

    @property
    def trace(self) -> Path:
        return self._file("trace.json")

    @property
    def stacks(self) -> Path:
        return self.folder / f"stacks_rank_{self.rank}.txt"

    def _file(self, suffix: str) -> Path:
        return self.folder / f"rank_{self.rank}.{suffix}"

    def log_end(self) -> str:
        """The last 256 KiB of its output."""
        return read_end(self.log)

    def read_result(self) -> RankResult | None:
        return read_typed(self.result, RankResult)

    def write_result(self, result: RankResult) -> None:
        write_typed(self.result, result)

    def append_completions(self, completions: Sequence[SavedCompletion]) -> None:
        """Append completions; if the process is killed, only the last line of the file can be incomplete."""
        with self._file("completions.jsonl").open("a", encoding="utf-8") as file:
            file.write(lines_of(completions))

    def read_completions(self) -> Iterator[SavedCompletion]:
        """The saved completions, up to the last complete line."""
        return read_typed_lines(self._file("completions.jsonl"), SavedCompletion)

    def append_repeat(self, repeat: Repeat) -> None:
        with self._file("repeats.jsonl").open("a", encoding="utf-8") as file:
            file.write(lines_of([repeat]))

    def read_repeats(self) -> Iterator[Repeat]:
        """The measurements of finished repeats, up to the last complete line."""
        return read_typed_lines(self._file("repeats.jsonl"), Repeat)

    def progress_writer(self) -> ProgressWriter:
        return ProgressWriter(self._file("progress"))

    def read_progress(self) -> Progress | None:
        return read_progress(self._file("progress"))
