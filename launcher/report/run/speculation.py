"""The row of a report about speculative decoding, and the cell in a table of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.report.units import percent, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.results.measured import Speculation
    from launcher.results.record import Record
    from shards.plan.plan import Plan

COLUMN = "accepted guesses"


def speculation_rows(speculation: Speculation | None) -> list[list[str]]:
    """The share of accepted draft tokens, the tokens per row and step, and the share of time spent on drafting."""
    if speculation is None:
        return []
    accepted = speculation.acceptance
    parts = [_tokens(speculation)]
    if speculation.guessing.median is not None:
        parts.append(f"guessing takes {percent(speculation.guessing.median)}")
    return [[COLUMN, percent(accepted.median), percent(accepted.min), percent(accepted.max), ", ".join(parts)]]


def draft_facts(plan: Plan) -> dict[str, str]:
    """Labelled facts about the draft model of a plan; empty without one."""
    first = plan.devices[0]
    if not first.draft_parameter_bytes:
        return {}
    parts = f"{size(first.draft_parameter_bytes)} parameters, {size(first.draft_cache_bytes)} KV cache"
    return {"draft model": f"{parts} in each process, on its first device"}


def has_guesses(records: Sequence[Record]) -> bool:
    """True if a table of runs needs a column for speculative decoding."""
    return any(record.metrics is not None and record.metrics.speculation is not None for record in records)


def cell(record: Record) -> str:
    """The share of accepted draft tokens in a run, and the tokens per row and step."""
    if record.metrics is None or record.metrics.speculation is None:
        return "-"
    speculation = record.metrics.speculation
    return f"{percent(speculation.acceptance.median)}, {_tokens(speculation)}"


def _tokens(speculation: Speculation) -> str:
    tokens = speculation.tokens_per_step.median
    if tokens is None:
        return "no step"
    return f"{tokens:.2f} tokens a step"
