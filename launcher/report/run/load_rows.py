"""The load time of a model in parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.report.units import seconds

if TYPE_CHECKING:
    from launcher.backends.base import Compilation, LoadTimes

LOAD_PARTS = {"read_s": "read", "quantize_s": "quantize", "place_s": "place", "join_s": "join ranks"}


def load_rows(times: LoadTimes | None, compilation: Compilation | None) -> list[list[str]]:
    """Rows of a run's table, if the engine measures the parts, and if it has compiled its steps."""
    rows = []
    if compilation is not None and compilation.seconds:
        note = escape(compilation.note or "made before all measurements")
        rows = [[f"steps by {compilation.way}", seconds(compilation.seconds), "", "", note]]
    if times is None:
        return rows
    parts = [(label, getattr(times, name)) for name, label in LOAD_PARTS.items()]
    shown = ", ".join(f"{label} {seconds(value)}" for label, value in parts if value)
    return [["load of the slowest rank", "", "", "", shown], *rows]


def load_cells(times: LoadTimes | None) -> tuple[str, ...]:
    """The parts in the columns of LOAD_PARTS."""
    return tuple(seconds(getattr(times, name, None)) for name in LOAD_PARTS)
