"""Tables that fit the width of the terminal, and output for terminals and programs."""

from __future__ import annotations

import json
import math
import sys
import textwrap
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

WIDTH_WITHOUT_TERMINAL = 140
LEAST_TEXT = 14
"""The minimum width of a folded text column."""


def console(stderr: bool = False) -> Console:
    """A console that is wider than rich's default of 80 columns if the output is not a terminal."""
    usual = Console(stderr=stderr, highlight=False)
    if usual.is_terminal:
        return usual
    return Console(stderr=stderr, highlight=False, width=WIDTH_WITHOUT_TERMINAL)


def print_json(values: Any, always: bool) -> None:
    """Print an object as one JSON line for programs; on a terminal only if `always`."""
    if sys.stdout is not None and (always or not sys.stdout.isatty()):
        print(json.dumps(values), flush=True)


@dataclass(frozen=True, slots=True)
class _Measured:
    """A column and the width of its widest cell."""

    index: int
    name: str
    is_text: bool
    cells: int

    @property
    def least(self) -> int:
        """The width of the column with its heading, and its words, folded."""
        needed = max(self.cells, *map(len, self.name.split()), 1)
        if self.is_text:
            return min(needed, LEAST_TEXT)
        return needed

    @property
    def whole(self) -> int:
        """The width of the column with its heading on one line."""
        return max(self.least, len(self.name))

    def column(self, folded: bool) -> Column:
        if folded and not self.is_text:
            heading = textwrap.fill(self.name, self.least)
        else:
            heading = self.name
        return Column(heading, overflow="fold", no_wrap=not self.is_text)


def fitted(
    out: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str] | None],
    texts: Collection[str] = (),
    optional: Sequence[str] = (),
    title: str | None = None,
    caption: str = "",
    styles: Sequence[str] = (),
) -> Table:
    """A table that fits the console without cutting any figure. None among the rows is a separator between sections.

    If it is too wide, the columns of `texts` and the headings are folded; then columns of `optional` are left out, in
    order, and the caption names them. `styles` are the styles of the rows.
    """
    kept = []
    for index, name in enumerate(columns):
        widths = (cell_len(Text.from_markup(row[index]).plain) for row in rows if row is not None)
        kept.append(_Measured(index, name, name in texts, max(widths, default=0)))
    candidates = [name for name in optional if any(column.name == name for column in kept)]
    left_out: list[str] = []
    while sum(column.least + 3 for column in kept) + 1 > out.width and candidates:
        left_out.append(candidates.pop(0))
        kept = [column for column in kept if column.name not in left_out]
    folded = sum(column.whole + 3 for column in kept) + 1 > out.width
    if left_out:
        caption = f"{caption}\nleft out at this width: {', '.join(left_out)}".lstrip()
    table = Table(*(column.column(folded) for column in kept), title=title, caption=caption)
    for row, style in zip(rows, styles or ("",) * len(rows), strict=True):
        if row is None:
            table.add_section()
        else:
            table.add_row(*(row[column.index] for column in kept), style=style or None)
    return table


def counted(number: int, singular: str, plural: str = "") -> str:
    """`1 repeat`, `2 repeats`."""
    if number == 1:
        return f"1 {singular}"
    return f"{number:,} {plural or f'{singular}s'}"


def rounded(value: Any) -> Any:
    """A value rounded to four decimal places, a smaller one to four significant digits."""
    if isinstance(value, float) and value:
        return round(value, max(4, 3 - math.floor(math.log10(abs(value)))))
    return value


def shown(text: str) -> str:
    """Text of a prompt or an engine for the terminal, with control characters replaced."""
    return "".join("\ufffd" if unicodedata.category(letter) == "Cc" else letter for letter in text.replace("\t", " "))
