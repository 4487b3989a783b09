"""The status of a run and the error that explains it, from the results of its ranks and the process that watched
them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launcher.results.record import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from launcher.results.rank_result import RankResult

STATUSES = ("ok", "oom", "timeout", "hang", "failed", "refused", "cancelled")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run's processes as their watcher saw it, with the rank to blame and its stage if known.

    If a rank reported its own error, that is used instead. `interrupted` is a status of ranks only; the run's record
    then says `cancelled`, and the run can be resumed.
    """

    status: str
    message: str = ""
    rank: int | None = None
    stage: str = "start"


@dataclass(frozen=True, slots=True)
class LastStep:
    """The stage and the time of the last step of a rank that wrote no result."""

    stage: str
    time: float


def verdict(
    ranks: Sequence[RankResult | None],
    silent: Mapping[int, LastStep],
    outcome: Outcome | None,
    log_end: Callable[[int], str],
) -> tuple[str, RunError | None]:
    """The status of the run and the error that explains it: that of the rank that failed first, preferably as reported
    by the rank itself.

    `silent` are the ranks that had begun but wrote no result; `log_end` returns the end of a rank's log.
    """
    if all(rank is not None and rank.status == "ok" for rank in ranks):
        return "ok", None
    failures = [rank for rank in ranks if rank is not None and rank.status not in ("ok", "cancelled")]
    first = min(failures, key=lambda rank: rank.ended_at, default=None)
    if first is not None and first.status == "hang":  # all report it together: prefer one that does not wait for others
        hanging = (rank for rank in failures if rank.status == "hang")
        first = min(hanging, key=lambda rank: (rank.waits, rank.last_step_at))
    if first and first.status == "interrupted" and not (silent and outcome and outcome.status == "failed"):
        if outcome and outcome.status == "timeout":
            return "timeout", first.error
        return "cancelled", first.error
    if outcome is not None and outcome.rank is not None:
        # The watcher ended the ranks because of this outcome, so silent ranks are a consequence.
        if first and first.status == "hang" and first.waits and silent:
            number = _earliest(silent)
            message = f"{outcome.message}; it does not answer"
            return "hang", RunError(number, silent[number].stage, "Ended", message)
        if first:
            return first.status, first.error
        return outcome.status, RunError(outcome.rank, outcome.stage, "Ended", outcome.message)
    if silent:
        # The rank that vanished is the cause; errors of other ranks (broken connections) are consequences.
        number = _earliest(silent)
        if outcome is not None and outcome.status != "failed":
            return outcome.status, RunError(number, silent[number].stage, "Ended", outcome.message)
        death = "killed, or crashed in native code"
        if "Fatal Python error: Bus error" in log_end(number):
            death = "a mapped file was truncated or cannot be read (SIGBUS)"
        message = f"rank {number} ended without a result: {death}"
        if first and first.error:
            message += f"; rank {first.rank} then saw {first.error.type}"
        return "failed", RunError(number, silent[number].stage, "ProcessDied", message)
    if first:
        return first.status, first.error
    ended = outcome or Outcome("failed", "the processes ended before any rank began")
    cancelled = next((rank for rank in ranks if rank is not None and rank.status == "cancelled"), None)
    if cancelled and cancelled.error:
        return ended.status, replace(cancelled.error, message=ended.message or cancelled.error.message, hint="")
    return ended.status, RunError(None, "start", "Ended", ended.message)


def _earliest(silent: Mapping[int, LastStep]) -> int:
    return min(silent, key=lambda number: silent[number].time)
