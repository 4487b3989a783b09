"""Who is to blame: the words of the ranks, and of who watched them -> the status of the run and its error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.run_dir.progress import Progress, read_progress
from launcher.system.files import read_end

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

STATUSES = ("ok", "oom", "timeout", "hang", "failed", "refused", "cancelled")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the processes of a run ended, as their watcher saw it, with the rank to blame and its stage if it knows.

    If a rank reported its own error, that is used instead. `interrupted` is for ranks only; the run's record then says
    `cancelled` and can be resumed.
    """

    status: str
    message: str = ""
    rank: int | None = None
    stage: str = "start"


def verdict(
    run_dir: Path, ranks: Sequence[dict[str, Any] | None], outcome: Outcome | None
) -> tuple[str, dict[str, Any] | None]:
    """The status of the run and the error that explains it: of the rank that failed first, in its own words if any."""
    if all(rank is not None and rank["status"] == "ok" for rank in ranks):
        return "ok", None
    first = _first([rank for rank in ranks if rank is not None and rank["status"] not in ("ok", "cancelled")])
    own_words = {"rank": first["rank"], **first["error"]} if first else None
    silent = _silent(run_dir, ranks)
    if first and first["status"] == "interrupted" and not (silent and outcome and outcome.status == "failed"):
        return ("timeout" if outcome and outcome.status == "timeout" else "cancelled"), own_words
    if outcome is not None and outcome.rank is not None:
        # The watcher ended the ranks for it: that some of them are silent is the consequence.
        if first and first["status"] == "hang" and first.get("waits") and silent:
            number, progress = min(silent, key=lambda item: item[1].time)
            return "hang", said(number, progress.stage, "Ended", f"{outcome.message}; it does not answer")
        blamed = said(outcome.rank, outcome.stage, "Ended", outcome.message)
        return (first["status"], own_words) if first else (outcome.status, blamed)
    if silent:
        # A rank that vanished is the cause; what the others then saw (a broken connection) is the consequence.
        number, progress = min(silent, key=lambda item: item[1].time)
        seen = f"; rank {first['rank']} then saw {first['error']['type']}" if first else ""
        message = f"rank {number} ended without a word: {_death(run_dir / f'rank_{number}.log')}{seen}"
        if outcome is None or outcome.status == "failed":
            return "failed", said(number, progress.stage, "ProcessDied", message)
        return outcome.status, said(number, progress.stage, "Ended", outcome.message)
    if first:
        return first["status"], own_words
    cancelled = next((rank for rank in ranks if rank is not None and rank["status"] == "cancelled"), None)
    ended = outcome or Outcome("failed", "the processes ended before any rank began")
    if cancelled:
        message = ended.message or cancelled["error"]["message"]
        return ended.status, said(cancelled["rank"], cancelled["error"]["stage"], "Ended", message)
    return ended.status, said(None, "start", "Ended", ended.message)


def _first(told: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The rank that failed first; of ranks that hang, which notice it at the same time, one that waits for no other."""
    first = min(told, key=lambda rank: rank["ended_at"], default=None)
    if first is None or first["status"] != "hang":
        return first
    hung = (rank for rank in told if rank["status"] == "hang")
    return min(hung, key=lambda rank: (rank.get("waits", False), rank["last_step_at"]))


def _silent(run_dir: Path, ranks: Sequence[dict[str, Any] | None]) -> list[tuple[int, Progress]]:
    """The ranks that had begun and left no last word, with where they were."""
    mute = [number for number, rank in enumerate(ranks) if rank is None]
    found = [(number, read_progress(run_dir / f"rank_{number}.progress")) for number in mute]
    return [(number, progress) for number, progress in found if progress is not None]


def _death(log: Path) -> str:
    """How a rank ended that left no word, as far as the last of its log tells."""
    if "Fatal Python error: Bus error" in read_end(log):
        return "a file that was its memory was cut short under it, or cannot be read (SIGBUS)"
    return "killed, or crashed in native code"


def said(rank: int | None, stage: str, kind: str, message: str, hint: str = "") -> dict[str, Any]:
    """An error as a record keeps it."""
    return {"rank": rank, "stage": stage, "type": kind, "message": message, "hint": hint}
