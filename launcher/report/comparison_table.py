"""Runs side by side: answers, speed, and the memory of each device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from launcher.report.tables import rate, size
from launcher.results.comparison import Comparison, FinishedRun, compare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

HELD = {
    "parameter_bytes": "parameters",
    "kv_cache_bytes": "KV cache",
    "kv_cache_reserved_bytes": "KV reserved",
    "peak_allocated_bytes": "peak allocated",
    "host_anonymous_bytes": "host anonymous",
}


def show(runs: Sequence[FinishedRun], out: Console) -> list[Comparison]:
    """Print the first run against each other one, and the memory of all their devices; the comparisons."""
    comparisons = [compare(runs[0], other) for other in runs[1:]]
    out.print(table(comparisons, runs))
    for comparison, run in zip(comparisons, runs[1:], strict=True):
        for difference in comparison.differences:
            line = f"[yellow]note:[/] {run.label} against {runs[0].label}: {escape(difference)}"
            out.print(line, soft_wrap=True)
    out.print(devices(runs))
    return comparisons


def table(comparisons: Sequence[Comparison], runs: Sequence[FinishedRun]) -> Table:
    """The base, and a row for each other run against it."""
    made = Table(
        "run", "same tokens", "first divergence", "top-2 gap", "repeats itself", "new tokens/s", "of base", "min … max"
    )
    base = runs[0]
    degenerate = _repeats(comparisons[0].base_degenerate, len(base.prompts))
    made.add_row(f"{base.label} (base)", "", "", "", degenerate, rate(base.record["new_tokens_per_s"]), "", "")
    for comparison, run in zip(comparisons, runs[1:], strict=True):
        first = comparison.divergences[0] if comparison.divergences else None
        made.add_row(
            run.label,
            f"{comparison.matching}/{comparison.prompts} ({comparison.match:.0%})",
            f"prompt {first.prompt}, token {first.position}" if first else "none",
            "-" if first is None else "not known" if first.gap is None else f"{first.gap:.3g}",
            _repeats(comparison.other_degenerate, comparison.prompts),
            rate(run.record["new_tokens_per_s"]),
            f"{comparison.speed.median:,.3f}",
            f"{comparison.speed.min:,.3f} … {comparison.speed.max:,.3f}",
        )
    return made


def _repeats(degenerate: Sequence[int], prompts: int) -> str:
    return f"[red]{len(degenerate)} of {prompts}[/]" if degenerate else "no"


def devices(runs: Sequence[FinishedRun]) -> Table:
    """What each device of each run held; "-" is not known, and the record says why."""
    rows = [(run, device) for run in runs for device in run.record["devices"]]
    shown = [name for name in HELD if any(device[name] is not None for _, device in rows)]
    made = Table("run", "rank", "device", *(HELD[name] for name in shown))
    for run, device in rows:
        where = f"{device['device']} {device['device_name']}".strip()
        made.add_row(run.label, str(device["rank"]), where, *(size(device[name]) for name in shown))
    return made
