"""The table of `launcher.plan`, for people and as Markdown."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from launcher.config.engines import NO_PLAN
from launcher.report.layout import console, fitted
from launcher.report.units import figure, rate, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shards.model.shape import ModelShape
    from shards.plan.plan import Plan

COLUMNS = (
    "machine",
    "backend",
    "weights",
    "KV cache",
    "other",
    "free",
    "batch",
    "tokens/s, one prompt",
    "tokens/s, largest batch",
    "bound by",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One choice: its plan for the requested batch and for the largest that fits, or the reason why there is none."""

    machine: str
    engine: str
    link: str
    quantization: str = ""  # empty if none was requested
    plan: Plan | None = None
    full: Plan | None = None
    problem: str = ""

    @property
    def pace(self) -> float:
        """Tokens/s for one sequence at the requested batch size; 0 if not known."""
        if self.plan and self.plan.limit:
            return 1 / self.plan.limit.seconds
        return 0.0


def cells(row: Row) -> list[str]:
    """The cells of a row, for its fullest device; dashes if there is no plan."""
    names = [row.machine, row.engine]
    if row.quantization:
        names.append(row.quantization)
    if row.plan is None:
        state = "impossible"
        if row.problem == NO_PLAN:
            state = "not known"
        return [*names, *["-"] * (len(COLUMNS) - 3), state]
    device = max(row.plan.devices, key=lambda device: device.used_bytes)
    cache = max(device.kv_cache_bytes, device.kv_cache_reserved_bytes)
    other = device.activation_bytes + device.buffer_bytes + device.overhead_bytes
    sizes = [device.parameter_bytes, cache, other, device.free_bytes]
    full = None
    if row.full and row.full.limit:
        full = row.full.limit.tokens_per_s
    bound = "-"
    if row.plan.limit:
        bound = row.plan.limit.bound
    batch = figure(row.plan.largest_batch, "d")
    return [*names, *map(size, sizes), batch, rate(row.pace or None), rate(full), bound]


def fastest(rows: Sequence[Row]) -> set[int]:
    """The indices of rows whose ceiling for one prompt is within 1 % of the highest on that machine.

    Rows are compared with those of the same quantization.
    """
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row.machine, row.quantization)
        best[key] = max(row.pace, best.get(key, 0.0))
    return {p for p, row in enumerate(rows) if row.pace and row.pace > 0.99 * best[row.machine, row.quantization]}


def headings(rows: Sequence[Row]) -> list[str]:
    """The columns, with the quantization if it was given."""
    if any(row.quantization for row in rows):
        return [*COLUMNS[:2], "quantization", *COLUMNS[2:]]
    return [*COLUMNS]


def problems(rows: Sequence[Row]) -> list[str]:
    """A line for each choice without a plan, with the reason."""
    lines = []
    for row in rows:
        if row.problem:
            lines.append(f"{' '.join(filter(None, (row.machine, row.engine, row.quantization)))}: {row.problem}")
    return lines


def show(name: str, model: str, caption: str, rows: Sequence[Row]) -> None:
    """Print the table, the fastest of each machine in bold, and the reasons for choices without a plan."""
    out = console()
    marked = fastest(rows)
    styles = ["" if row.plan else "dim" for row in rows]
    for number in marked:
        styles[number] = "bold"
    texts = [[escape(cell) for cell in cells(row)] for row in rows]
    optional = ("other", "KV cache", "free", "bound by")
    out.print(fitted(out, headings(rows), texts, (), optional, f"{name}: {model}", caption, styles))
    for line in problems(rows):
        out.print(escape(line), soft_wrap=True)


def markdown(name: str, model: str, caption: str, rows: Sequence[Row]) -> str:
    """The table and the reasons as Markdown text."""
    marked, columns = fastest(rows), headings(rows)
    texts = columns.index("weights")
    rules = ["---"] * texts + ["---:"] * (len(columns) - texts - 1) + ["---"]
    lines = [f"**{name}**: {model}.", "", _pipes(columns), _pipes(rules)]
    for number, row in enumerate(rows):
        texts_of_row = cells(row)
        if number in marked:
            for column in (columns.index("backend"), columns.index("tokens/s, one prompt")):
                texts_of_row[column] = f"**{texts_of_row[column]}**"
        lines.append(_pipes(texts_of_row))
    lines += ["", caption]
    why = [f"- {line}" for line in problems(rows)]
    if why:
        lines += ["", *why]
    return "\n".join(lines) + "\n"


def as_json(name: str, num_parameters: int, rows: Sequence[Row]) -> str:
    """The complete plans as one JSON object; null for missing plans."""
    choices = [
        {
            "machine": row.machine,
            "backend": row.engine,
            "link": row.link or None,
            "quantization": row.quantization or None,
            "problem": row.problem or None,
            "plan": row.plan and row.plan.to_dict(),
            "plan_of_largest_batch": row.full and row.full.to_dict(),
        }
        for row in rows
    ]
    return json.dumps({"model": name, "num_parameters": num_parameters, "plans": choices})


def show_modules(name: str, shape: ModelShape, dtype_bytes: int) -> None:
    """Print the parameters of a model by module, with equal modules of all layers in one row; `*` stands for the layer
    number."""
    times = Counter((re.sub(r"\.\d+(?=\.)", ".*", parameter.name), parameter.shape) for parameter in shape.parameters)
    rows = []
    for (module, sizes), count in times.items():
        numbers = count * prod(sizes)
        share = f"{numbers / shape.num_parameters:.2%}"
        dimensions = " x ".join(map(str, sizes))
        rows.append([module, dimensions, str(count), f"{numbers:,}", share, size(dtype_bytes * numbers)])
    columns = ("parameter", "shape", "times", "numbers", "share", "bytes")
    title = f"{name}: {shape.num_parameters:,} parameters"
    out = console()
    out.print(fitted(out, columns, rows, ("parameter",), ("share", "numbers"), title))


def _pipes(texts: Sequence[Any]) -> str:
    return f"| {' | '.join(texts)} |"
