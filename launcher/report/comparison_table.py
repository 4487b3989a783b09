"""Runs side by side: answers, speed, and the memory of each device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.report.layout import fitted
from launcher.report.run.memory_table import LEAST_WANTED, MEMORY, phase_table
from launcher.report.run.speculation import COLUMN, cell, has_guesses
from launcher.report.units import rate, size
from launcher.results.comparison import Comparison, FinishedRun, compare, labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

COMPARED_MEMORY = (
    "parameter_bytes", "kv_cache_bytes", "kv_cache_reserved_bytes", "peak_allocated_bytes", "peak_reserved_bytes",
    "fragmented_bytes", "step_growth_bytes", "nvml_used_bytes", "host_anonymous_bytes",
)  # fmt: skip


def show(runs: Sequence[FinishedRun], out: Console) -> list[Comparison]:
    """Print each run compared with the first one, and the memory of all devices; returns the comparisons."""
    comparisons = [compare(runs[0], other) for other in runs[1:]]
    base, *others = names = labels(runs)
    out.print(table(comparisons, runs, names, out))
    for comparison, other in zip(comparisons, others, strict=True):
        for setting in comparison.differences:
            line = f"{other} has {setting.key}={setting.other}, {base} has {setting.key}={setting.base}"
            out.print(f"[yellow]note:[/] {escape(line)}", soft_wrap=True)
        for note in comparison.notes:
            out.print(f"[yellow]note:[/] {escape(f'{other} and {base}: {note}')}", soft_wrap=True)
        if comparison.agreement is not None:
            out.print(escape(f"{other} against {base}: {_quality(runs[0], runs[names.index(other)], comparison)}"))
        if (cost := comparison.serving_cost) is not None:
            line = f"serving (HTTP, the server's scheduler, the client) costs {cost:.1%} of the engine's tokens/s"
            if cost < 0:
                line = f"behind the server the engine is {-cost:.1%} faster than in process"
            out.print(escape(f"{other} against {base}: {line}"), soft_wrap=True)
    for name, run in zip(names, runs, strict=True):
        if has_guesses([run.record]):
            out.print(escape(f"{name}: {COLUMN} {cell(run.record)}"), soft_wrap=True)
    if any(run.record.devices for run in runs):
        out.print(devices(runs, names, out))
    if (phases := phase_table([run.record for run in runs], out, names)) is not None:
        out.print(phases)
    return comparisons


def table(comparisons: Sequence[Comparison], runs: Sequence[FinishedRun], names: Sequence[str], out: Console) -> Table:
    """A row for the base, and one for each other run compared with it."""
    base = runs[0]
    degenerate = _degenerate(comparisons[0].base_degenerate, len(base.prompts))
    rows = [[f"{escape(names[0])} (base)", "", "", "", degenerate, rate(base.record.new_tokens_per_s), "", ""]]
    for comparison, run, name in zip(comparisons, runs[1:], names[1:], strict=True):
        first, gap = "none", "-"  # position of the first difference, and the gap of the two best logits there
        for divergence in comparison.divergences[:1]:
            unit, gap = "token", "not known"
            if divergence.is_of_texts:
                unit = "letter"
            if divergence.gap is not None:
                gap = f"{divergence.gap:.3g}"
            first = f"prompt {divergence.prompt}, {unit} {divergence.position}"
        rows.append(
            [
                escape(name),
                f"{comparison.matching}/{comparison.prompts} ({comparison.match:.0%})",
                first,
                gap,
                _degenerate(comparison.other_degenerate, comparison.prompts),
                rate(run.record.new_tokens_per_s),
                f"{comparison.speed.median:,.3f}",
                f"{comparison.speed.min:,.3f} … {comparison.speed.max:,.3f}",
            ]
        )
    columns = (
        "run", "same tokens", "first divergence", "logit gap there", "degenerate (loops)", "new tokens/s",
        "speed vs base", "min … max",
    )  # fmt: skip
    return fitted(out, columns, rows, texts=("run",), optional=("min … max", "logit gap there", "first divergence"))


def _quality(base: FinishedRun, other: FinishedRun, comparison: Comparison) -> str:
    """The perplexities of two runs on the same text, and their agreement."""
    left, right = base.record.quality, other.record.quality
    assert left is not None
    assert right is not None
    shown = (
        f"perplexity {right.perplexity:,.4g} after {left.perplexity:,.4g}; the most likely token is the same for"
        f" {comparison.agreement:.1%} of {left.tokens:,} tokens of {left.text}"
    )
    if comparison.kl_divergence is None:
        return f"{shown}; no KL divergence, since a record is from before it had one"
    return f"{shown}; KL divergence at least {comparison.kl_divergence:.3g} nats a token"


def _degenerate(indices: Sequence[int], prompts: int) -> str:
    if indices:
        return f"[red]{len(indices)} of {prompts}[/]"
    return "no"


def devices(runs: Sequence[FinishedRun], names: Sequence[str], out: Console) -> Table:
    """The memory of each device of each run; "-" means not known, with the reason in the record."""
    rows = [(name, device) for run, name in zip(runs, names, strict=True) for device in run.record.devices]
    figures = [figure for figure in COMPARED_MEMORY if any(getattr(device, figure) is not None for _, device in rows)]
    cells = []
    for name, device in rows:
        label = f"{device.device} {device.device_name}".strip()
        sizes = (size(getattr(device, figure)) for figure in figures)
        cells.append([escape(name), str(device.rank), label, *sizes])
    columns = ["run", "rank", "device", *(MEMORY[figure] for figure in figures)]
    return fitted(out, columns, cells, texts=("run", "device"), optional=LEAST_WANTED)
