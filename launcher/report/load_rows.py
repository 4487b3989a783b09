"""The time to load a model, by its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.report.units import seconds

if TYPE_CHECKING:
    from launcher.backends.base import LoadTimes

LOAD_PARTS = {"read_s": "read", "quantize_s": "quantize", "place_s": "place", "join_s": "join ranks"}


def load_rows(times: LoadTimes | None) -> list[list[str]]:
    """A row of the table of a run, where the engine knows the parts."""
    if times is None:
        return []
    parts = [(label, getattr(times, name)) for name, label in LOAD_PARTS.items()]
    shown = ", ".join(f"{label} {seconds(value)}" for label, value in parts if value)
    return [["load of the slowest rank", "", "", "", shown]]


def load_cells(times: LoadTimes | None) -> tuple[str, ...]:
    """The parts in the columns of LOAD_PARTS."""
    return tuple("-" if times is None else seconds(getattr(times, name)) for name in LOAD_PARTS)
