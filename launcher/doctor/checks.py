"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 1024**3

State = Literal["ok", "note", "warning", "missing", "broken"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table: what was found, and the one command that mends it where something is to mend."""

    section: str
    name: str
    state: State
    found: str
    mend: str = ""


def size(value: int | None) -> str:
    """GiB for a reader, MiB where that would be nothing."""
    if value is None:
        return "?"
    if value >= GIB // 2:
        return f"{value / GIB:,.1f} GiB"
    return f"{value / 1024**2:,.1f} MiB"
