"""Two runs compared figure by figure, with a verdict on each, and all other differences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.report.layout import fitted
from launcher.report.units import count, figure, rate, seconds, size
from launcher.results.changes import MEMORY, SPEEDS
from launcher.results.figures.metrics import COUNTERS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console
    from rich.table import Table

    from launcher.results.changes import Changes, FigureChange, Values
    from launcher.results.comparison import Difference

NAMES = {
    "new_tokens_per_s": "new tokens/s",
    "prefill_tokens_per_s": "prefill tokens/s",
    "decode_tokens_per_s": "decode tokens/s",
    "ttft_s": "time to first token",
    "itl_s": "inter-token latency",
    "tpot_s": "time per token after it",
    "e2el_s": "time to last token",
    "load_s": "load",
    "parameter_bytes": "parameters",
    "kv_cache_bytes": "KV cache",
    "kv_cache_reserved_bytes": "KV cache reserved",
    "peak_allocated_bytes": "peak allocated",
    "peak_reserved_bytes": "peak reserved",
    "nvml_used_bytes": "NVML",
    "host_anonymous_bytes": "host anonymous",
    **COUNTERS,
}


def show_changes(parts: Sequence[Changes], names: Sequence[str], out: Console) -> None:
    """Print each run compared with the base, figure by figure; the first of `names` is that of the base."""
    for name, part in zip(names[1:], parts, strict=True):
        pair = (f"{names[0]} (base)", name)
        out.print(changes_table(part.figures, pair, out))
        if part.circumstances:
            out.print(differences_table(part.circumstances, pair, out))


def changes_table(changes: Sequence[FigureChange], names: Sequence[str], out: Console) -> Table:
    """A row for each figure; `names` are those of the base and the new run."""
    rows = []
    for change in changes:
        label, verdict = NAMES[change.name], change.verdict
        if change.rank is not None:
            label += f", rank {change.rank}"
        if change.is_different:
            verdict = f"[bold]{verdict}[/]"
        values = (shown(change.name, change.base), shown(change.name, change.new))
        rows.append([label, *values, figure(change.ratio, ",.3f"), verdict])
    columns = ("figure", *map(escape, names), "new/base", "verdict")
    return fitted(out, columns, rows, texts=("figure", "verdict", *columns[1:3]))


def shown(name: str, values: Values) -> str:
    """A value with its unit, and the minimum and maximum of its repeats."""
    unit: Callable[[float], str] = seconds
    if name in SPEEDS:
        unit = rate
    if name in COUNTERS:
        unit = count
    if name in MEMORY:
        return size(int(values.median))
    middle = unit(values.median)
    if values.repeats < 2:
        return middle
    return f"{middle} ({unit(values.min)} … {unit(values.max)})"


def differences_table(differences: Sequence[Difference], names: Sequence[str], out: Console) -> Table:
    """A table of the settings in which two runs differ."""
    rows = [[escape(one.key), escape(str(one.base)), escape(str(one.other))] for one in differences]
    columns = ("what differs", *map(escape, names))
    return fitted(out, columns, rows, texts=columns)
