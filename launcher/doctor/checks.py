"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 1024**3

State = Literal["ok", "note", "warning", "missing", "broken"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table: the finding, and the command that fixes it if something is wrong."""

    section: str
    name: str
    state: State
    found: str
    mend: str = ""


def size(value: int | None) -> str:
    """Bytes as text in GiB, or in MiB if that would be 0."""
    if value is None:
        return "?"
    if value >= GIB // 2:
        return f"{value / GIB:,.1f} GiB"
    return f"{value / 1024**2:,.1f} MiB"
