"""Runs side by side: answers, speed, and the memory of each device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from launcher.report.memory_table import MEMORY, phase_table
from launcher.report.units import rate, size
from launcher.results.comparison import Comparison, Divergence, FinishedRun, compare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

COMPARED_MEMORY = (
    "parameter_bytes", "kv_cache_bytes", "kv_cache_reserved_bytes", "peak_allocated_bytes", "peak_reserved_bytes",
    "fragmented_bytes", "step_growth_bytes", "nvml_used_bytes", "host_anonymous_bytes",
)  # fmt: skip


def show(runs: Sequence[FinishedRun], out: Console) -> list[Comparison]:
    """Print the first run against each other one, and the memory of all their devices; the comparisons."""
    comparisons = [compare(runs[0], other) for other in runs[1:]]
    out.print(table(comparisons, runs))
    for comparison, run in zip(comparisons, runs[1:], strict=True):
        for difference in comparison.differences:
            line = f"[yellow]note:[/] {run.label} against {runs[0].label}: {escape(difference)}"
            out.print(line, soft_wrap=True)
    out.print(devices(runs))
    if (phases := phase_table([run.record for run in runs])) is not None:
        out.print(phases)
    return comparisons


def table(comparisons: Sequence[Comparison], runs: Sequence[FinishedRun]) -> Table:
    """The base, and a row for each other run against it."""
    table = Table(
        "run", "same tokens", "first divergence", "top-2 gap", "repeats itself", "new tokens/s", "of base", "min … max"
    )
    base = runs[0]
    degenerate = _repeats(comparisons[0].base_degenerate, len(base.prompts))
    table.add_row(f"{base.label} (base)", "", "", "", degenerate, rate(base.record.new_tokens_per_s), "", "")
    for comparison, run in zip(comparisons, runs[1:], strict=True):
        first = comparison.divergences[0] if comparison.divergences else None
        table.add_row(
            run.label,
            f"{comparison.matching}/{comparison.prompts} ({comparison.match:.0%})",
            f"prompt {first.prompt}, token {first.position}" if first else "none",
            _gap(first),
            _repeats(comparison.other_degenerate, comparison.prompts),
            rate(run.record.new_tokens_per_s),
            f"{comparison.speed.median:,.3f}",
            f"{comparison.speed.min:,.3f} … {comparison.speed.max:,.3f}",
        )
    return table


def _gap(divergence: Divergence | None) -> str:
    """The difference of the two largest logits where the answers part."""
    if divergence is None:
        return "-"
    return "not known" if divergence.gap is None else f"{divergence.gap:.3g}"


def _repeats(degenerate: Sequence[int], prompts: int) -> str:
    return f"[red]{len(degenerate)} of {prompts}[/]" if degenerate else "no"


def devices(runs: Sequence[FinishedRun]) -> Table:
    """The memory of each device of each run; "-" is not known, and the record says why."""
    rows = [(run, device) for run in runs for device in run.record.devices]
    named = [name for name in COMPARED_MEMORY if any(getattr(device, name) is not None for _, device in rows)]
    table = Table("run", "rank", "device", *(MEMORY[name] for name in named))
    for run, device in rows:
        label = f"{device.device} {device.device_name}".strip()
        table.add_row(run.label, str(device.rank), label, *(size(getattr(device, name)) for name in named))
    return table
