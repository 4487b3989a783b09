"""Checks of whether the figures of a run are reliable, one for each known source of error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.system.gpu_users import is_of_a_neighbour

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from launcher.results.comparison import Comparison
    from launcher.results.record import Record

STEADY = 1.2
"""The largest factor between the fastest and the slowest repeat of a steady measurement."""

LEAST_REPEATS = 3
CACHE_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Check:
    """One check. `is_met` is None if it could not be made; `text` has the observation, or the reason."""

    name: str
    is_met: bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Validity:
    """All checks of a run. It is valid if none has failed; checks that could not be made do not count against it."""

    checks: tuple[Check, ...]

    @property
    def is_valid(self) -> bool:
        return not self.reasons

    @property
    def reasons(self) -> list[str]:
        """The failed checks."""
        return [check.text for check in self.checks if check.is_met is False]

    @property
    def badge(self) -> str:
        """VALID, or INVALID with the number of reasons."""
        if self.is_valid:
            return "VALID"
        return f"INVALID ({len(self.reasons)})"

    @property
    def line(self) -> str:
        """The badge and the reasons in one line."""
        if self.is_valid:
            return "VALID"
        return f"INVALID: {'; '.join(self.reasons)}"


def of_the_record(record: Record, parameter_tolerance: float) -> list[Check]:
    """The checks that need only the record; `parameter_tolerance` is the tolerance of the planned parameter bytes."""
    return [
        check_status(record),
        check_warm_up(record),
        check_repeats(record),
        check_tokens(record),
        check_memory(record, parameter_tolerance),
        check_ceilings(record),
        check_neighbours(record),
        check_clocks(record),
    ]


def check_status(record: Record) -> Check:
    if record.status != "ok":
        return Check("status", False, f"the run did not end well: {record.status}")
    if record.partial is not None:
        return Check(
            "status", False, f"only {record.partial.prompts} of {record.partial.of} prompts were measured at once"
        )
    return Check("status", True, "the run ended well")


def check_warm_up(record: Record) -> Check:
    warmup = record.config.get("measure", {}).get("warmup")
    if not warmup:
        return Check("warm-up", False, "there was no warm-up: measure.warmup=1")
    return Check("warm-up", True, f"{warmup} before the clocks started")


def check_repeats(record: Record) -> Check:
    """Check that there are enough repeats, and that their speeds are close to each other."""
    spread = record.speed
    if spread is None or not spread.min or not spread.max:
        return Check("repeats", False, "no repeat was measured")
    if len(spread.values) < LEAST_REPEATS:
        return Check("repeats", False, f"{len(spread.values)} of at least {LEAST_REPEATS} repeats: measure.repeats=3")
    factor = spread.max / spread.min
    if factor > STEADY:
        return Check(
            "repeats", False, f"new tokens/s of the repeats differ by a factor of {factor:.3g}, above {STEADY}"
        )
    return Check("repeats", True, f"{len(spread.values)}, which differ by a factor of {factor:.3g}")


def check_tokens(record: Record) -> Check:
    if record.totals is None:
        return Check("tokens", None, "no tokens were measured")
    if not record.totals.same_tokens_every_repeat:
        return Check("tokens", False, "the repeats gave different tokens")
    return Check("tokens", True, "the same in all repeats")


def check_memory(record: Record, parameter_tolerance: float) -> Check:
    """Check that parameters take the planned memory, and that the cache is no larger than planned."""
    planned = record.planned_devices
    num_devices = 0
    for device in record.devices:
        plan = planned.get(device.rank)
        if plan is None or device.parameter_bytes is None:
            continue
        num_devices += 1
        measured_bytes = device.parameter_bytes + device.draft_parameter_bytes
        planned_bytes = plan.parameter_bytes + plan.draft_parameter_bytes
        if abs(measured_bytes - planned_bytes) > parameter_tolerance * planned_bytes:
            fact = f"{measured_bytes:,} bytes of parameters, and {planned_bytes:,} were planned"
            return Check("memory", False, f"rank {device.rank} held {fact}")
        cache = max(device.kv_cache_bytes or 0, device.kv_cache_reserved_bytes or 0) + device.draft_cache_bytes
        most = max(plan.kv_cache_bytes, plan.kv_cache_reserved_bytes) + plan.draft_cache_bytes
        if cache > (1 + CACHE_TOLERANCE) * most:
            return Check(
                "memory", False, f"rank {device.rank} had {cache:,} bytes of KV cache, and {most:,} were planned"
            )
    if not num_devices:
        return Check("memory", None, "not planned, or not measured")
    return Check("memory", True, f"as planned on {num_devices} devices")


def check_ceilings(record: Record) -> Check:
    """Check that no figure exceeds 100 % of its ceiling."""
    shares = {"decode ceiling": record.ceiling, "memory bandwidth": record.mbu}
    known = {name: part.share for name, part in shares.items() if part is not None and part.share is not None}
    for name, share in known.items():
        if share > 1:
            return Check("ceilings", False, f"{share:.0%} of the {name}: a figure, or a rate of the machine, is wrong")
    if not known:
        return Check("ceilings", None, "no ceiling is known")
    return Check("ceilings", True, ", ".join(f"{share:.1%} of the {name}" for name, share in known.items()))


def check_neighbours(record: Record) -> Check:
    notes = [note for note in record.notes if is_of_a_neighbour(note)]
    if notes:
        return Check("neighbours", False, notes[0])
    if record.environment is None or record.environment.gpus is None:
        return Check("neighbours", None, "no driver reports other processes on the devices")
    return Check("neighbours", True, "none on the devices")


def check_clocks(record: Record) -> Check:
    """Check that clocks were not lowered because of heat or the power supply."""
    if record.cost is None or not record.cost.samples:
        reason = record.cost and record.cost.samples_reason
        return Check("clocks", None, reason or "they were not sampled")
    if record.cost.slowed_by:
        return Check("clocks", False, f"the clocks were slowed: {', '.join(record.cost.slowed_by)}")
    return Check("clocks", True, "not slowed by heat or power supply in any sample")


def check_reference(comparisons: Sequence[Comparison], names: Iterable[str]) -> Check:
    """Check that the tokens are the same as in each run of the reference engine."""
    for comparison, name in zip(comparisons, names, strict=True):
        if comparison.divergences:
            different = comparison.prompts - comparison.matching
            fact = f"{different} of {comparison.prompts} answers differ from the reference's"
            return Check("reference", False, f"{fact} ({name})")
    if not comparisons:
        return Check("reference", None, "there is no reference run to compare with")
    return Check("reference", True, f"the tokens of {', '.join(names)}")
