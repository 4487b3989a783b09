"""Figures of runs by matplotlib, as SVG text or as files; the functions take plain numbers, not records.

In SVG, text is not converted to paths, and black becomes the text colour of the page, so that a figure works on light
and dark backgrounds.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

WIDTH, HEIGHT = 7.0, 3.6  # inches
COLOURS = ("#3b82c4", "#d9822b", "#2e9e6b", "#c2569b", "#8a6fd1", "#a8892c", "#3aa6b9", "#c75450")
"""Readable on white and on black; taken in order, so that a series has the same colour in all figures of a page."""

LETTER, HANDLE, MOST_COLUMNS = 0.07, 0.55, 4
"""Width in inches of a letter and of a line sample in a legend, and the largest number of its columns."""

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "launcher",  # fixed, so that the output is deterministic
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a figure: values over `x`, with their spread and ceilings if known."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    ceiling: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Stack:
    """One bar that is made of parts, in bytes or any other unit, by the parts' names."""

    name: str
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a scatter plot."""

    name: str
    x: float
    y: float
    on_front: bool = False


@dataclass(frozen=True, slots=True)
class Span:
    """An interval from `start` to `end`, in seconds, in which a row (a rank) was busy with `kind`."""

    row: str
    start: float
    end: float
    kind: str


def line_figure(series: Sequence[Series], x_label: str, y_label: str, log_x: bool = False) -> Figure:
    """Lines with their spread; ceilings are dashed, in the colour of their line."""
    figure, axes = _figure()
    for colour, one in zip(_colours(len(series)), series, strict=True):
        axes.plot(one.x, one.y, marker="o", color=colour, label=one.name)
        if one.low and one.high:
            below = [value - low for value, low in zip(one.y, one.low, strict=True)]
            above = [high - value for value, high in zip(one.y, one.high, strict=True)]
            axes.errorbar(one.x, one.y, yerr=(below, above), fmt="none", color=colour, capsize=3)
        known = [(x, ceiling) for x, ceiling in zip(one.x, one.ceiling, strict=False) if ceiling is not None]
        if known:
            xs, ceilings = zip(*known, strict=True)
            axes.plot(xs, ceilings, linestyle="--", marker="_", color=colour, alpha=0.8)
    if log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for one in series for x in one.x})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    _finish(axes, x_label, y_label)
    return figure


def bar_figure(groups: Mapping[str, Mapping[str, float]], y_label: str) -> Figure:
    """Bars side by side: by group, and within it by name, for example the quantiles of each run."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    figure, axes = _figure(rows=len(groups) * max(1, len(names) // 2))
    height = 0.8 / max(len(names), 1)
    for place, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
        offsets = [row + (place - (len(names) - 1) / 2) * height for row in range(len(groups))]
        values = [values.get(name, 0.0) for values in groups.values()]
        bars = axes.barh(offsets, values, height * 0.9, color=colour, label=name)
        axes.bar_label(bars, fmt=_short, padding=3, fontsize=8)
    _rows(axes, list(groups))
    axes.margins(x=0.12)
    _finish(axes, y_label, "")
    return figure


def stacked_figure(stacks: Sequence[Stack], x_label: str, limits: Sequence[float | None] = ()) -> Figure:
    """A bar for each stack; `limits` are marked across them, for example the capacity of each device."""
    names = list(dict.fromkeys(name for stack in stacks for name in stack.parts))
    figure, axes = _figure(rows=len(stacks))
    lefts = [0.0] * len(stacks)
    for name, colour in zip(names, _colours(len(names)), strict=True):
        values = [stack.parts.get(name, 0.0) for stack in stacks]
        axes.barh(range(len(stacks)), values, 0.7, left=lefts, color=colour, label=name)
        lefts = [left + value for left, value in zip(lefts, values, strict=True)]
    for row, limit in enumerate(limits):
        if limit is not None:
            axes.plot((limit, limit), (row - 0.4, row + 0.4), color="black", linewidth=1.5)
    _rows(axes, [stack.name for stack in stacks])
    _finish(axes, x_label, "")
    return figure


def scatter_figure(points: Sequence[Point], x_label: str, y_label: str) -> Figure:
    """Points with their names; points of the Pareto front are connected."""
    figure, axes = _figure()
    front = sorted((point for point in points if point.on_front), key=lambda point: point.x)
    axes.plot([point.x for point in front], [point.y for point in front], color=COLOURS[1], label="Pareto front")
    axes.scatter([point.x for point in points], [point.y for point in points], color=COLOURS[0], zorder=3)
    for point in points:
        axes.annotate(point.name, (point.x, point.y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.margins(0.1)
    _finish(axes, x_label, y_label)
    return figure


def timeline_figure(spans: Sequence[Span], x_label: str) -> Figure:
    """A row for each rank, coloured by activity."""
    rows = list(dict.fromkeys(span.row for span in spans))
    kinds = list(dict.fromkeys(span.kind for span in spans))
    figure, axes = _figure(rows=len(rows))
    for kind, colour in zip(kinds, _colours(len(kinds)), strict=True):
        label = kind  # one legend entry for all rows
        for row, name in enumerate(rows):
            bars = [(s.start, s.end - s.start) for s in spans if s.row == name and s.kind == kind]
            axes.broken_barh(bars, (row - 0.35, 0.7), facecolors=colour, label=label)
            label = ""
    _rows(axes, rows)
    _finish(axes, x_label, "")
    return figure


def merged_spans(spans: Sequence[Span], most: int = 2000) -> list[Span]:
    """Reduce to about `most` spans: neighbours of the same row and kind are merged, over increasingly wide gaps."""
    joined = list(spans)
    total = max((span.end for span in spans), default=0.0) - min((span.start for span in spans), default=0.0)
    gap = total / most / 4
    while len(joined) > most:
        merged: list[Span] = []
        for span in sorted(joined, key=lambda span: (span.row, span.kind, span.start)):
            if merged:
                last = merged[-1]
                if (last.row, last.kind) == (span.row, span.kind) and span.start - last.end <= gap:
                    merged.pop()
                    span = Span(span.row, last.start, max(last.end, span.end), span.kind)
            merged.append(span)
        joined, gap = merged, gap * 2
    return joined


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points, marked as Pareto-optimal if no other one is at least as good in both coordinates and better in
    one."""

    def is_beaten(point: Point) -> bool:
        return any(
            other.x >= point.x and other.y >= point.y and (other.x > point.x or other.y > point.y) for other in points
        )

    return [Point(point.name, point.x, point.y, not is_beaten(point)) for point in points]


def svg(figure: Figure, title: str, description: str) -> str:
    """The figure as an inline SVG element with a title and a description for screen readers."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(stroke|fill): ?(#000000|black)", r"\1: currentColor", text)
    text = re.sub(r"<text ", '<text fill="currentColor" ', text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg role="img" viewBox="\1">', text, count=1)
    start = text.index(">") + 1
    return f"{text[:start]}<title>{_escaped(title)}</title><desc>{_escaped(description)}</desc>{text[start:]}"


def save(figure: Figure, path: Path) -> None:
    """Write the figure to a file in the format of its suffix."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=150)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _figure(rows: int = 0) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, high enough for `rows` horizontal bars."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, max(HEIGHT, 1.2 + 0.32 * rows)))
        return figure, figure.add_subplot()


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _short(value: float) -> str:
    """Three significant digits, or all digits before the decimal point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        widest = max(map(len, labels)) * LETTER + HANDLE
        columns = max(1, min(len(labels), int(WIDTH / widest), MOST_COLUMNS))
        axes.figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
