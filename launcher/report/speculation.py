"""The row of a report about guessed tokens, and the cell of a table of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.report.units import percent, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.results.measured import Speculation
    from launcher.results.record import Record
    from shards.plan.plan import Plan

COLUMN = "accepted guesses"


def speculation_rows(found: Speculation | None) -> list[list[str]]:
    """The share of guesses that held, what a step gave a row by it, and the share of time that guessing took."""
    if found is None:
        return []
    held = found.acceptance
    parts = [_tokens(found)]
    if found.guessing.median is not None:
        parts.append(f"guessing takes {percent(found.guessing.median)}")
    return [[COLUMN, percent(held.median), percent(held.min), percent(held.max), ", ".join(parts)]]


def draft_facts(plan: Plan) -> dict[str, str]:
    """The draft model of a plan that has one."""
    first = plan.devices[0]
    if not first.draft_parameter_bytes:
        return {}
    parts = f"{size(first.draft_parameter_bytes)} parameters, {size(first.draft_cache_bytes)} KV cache"
    return {"draft model": f"{parts} in each process, on its first device"}


def has_guesses(records: Sequence[Record]) -> bool:
    """True if a table of runs has a column for it."""
    return any(record.metrics is not None and record.metrics.speculation is not None for record in records)


def cell(record: Record) -> str:
    """The share of guesses that held in a run, and what a step gave a row."""
    found = record.metrics.speculation if record.metrics else None
    return "-" if found is None else f"{percent(found.acceptance.median)}, {_tokens(found)}"


def _tokens(found: Speculation) -> str:
    tokens = found.tokens_per_step.median
    return "no step" if tokens is None else f"{tokens:.2f} tokens a step"
