"""Tables fit the width of the output: no figure is truncated, and omitted columns are named."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from launcher.report.layout import counted, fitted

COLUMNS = ("run", "tokens/s, one prompt", "min … max", "note")
ROWS = [["a long name of a run", "12,345.6", "1,234.5 … 99,999.9", "some words"], None, ["b", "7.1", "-", ""]]


def printed(width: int) -> str:
    out = Console(file=io.StringIO(), width=width)
    out.print(fitted(out, COLUMNS, ROWS, texts=("run", "note"), optional=("min … max", "note"), caption="a caption"))
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


@pytest.mark.parametrize(("width", "missing"), [(120, []), (70, []), (50, ["min … max"]), (32, ["min … max", "note"])])
def test_columns_are_left_out_before_a_figure_is_cut(width: int, missing: list[str]) -> None:
    text = printed(width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "12,345.6" in text
    assert ("1,234.5 … 99,999.9" in text) == ("min … max" not in missing)
    assert (f"left out at this width: {', '.join(missing)}" in " ".join(text.split())) == bool(missing)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 repeats"), (1, "1 repeat"), (2, "2 repeats"), (1000, "1,000 repeats")]
)
def test_one_is_not_several(number: int, text: str) -> None:
    assert counted(number, "repeat") == text
