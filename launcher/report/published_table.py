"""A run of an experiment compared with the published figures and the limits of both machines."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from launcher.composition.compose import compose_run
from launcher.config.schema import ConfigError
from launcher.config.values import from_dict
from launcher.prepare.experiments import PublishedFigure, measured_figure, published_figures
from launcher.report.units import figure

if TYPE_CHECKING:
    from launcher.results.record import Record

LABELS = {
    "new_tokens_per_s": "new tokens/s",
    "generation_s": "time of the generation",
    "load_s": "load",
    "user_s": "user time",
    "system_s": "system time",
    "peak_memory_gb": "peak memory",
}


@dataclass(frozen=True, slots=True)
class PublishedBeside:
    """A run of an experiment compared with the published figures: a row for each figure, and the speeds as numbers."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    speeds: dict[str, float]
    source: str


def published_beside(record: Record) -> PublishedBeside | None:
    """Published and measured figures, and the limits on both machines; None for a run without an experiment."""
    experiment = record.config.get("experiment") or {}
    if experiment.get("name") is None:
        return None
    config = from_dict(record.config)
    hardware = config.experiment.hardware or "hardware not named"
    is_rehearsal = config.model.config is None
    preset = config
    if is_rehearsal:
        with contextlib.suppress(ConfigError):  # the preset may be in a folder that this command does not know
            preset = compose_run([f"experiment={config.experiment.name}"])
    rows: list[tuple[str, ...]] = []
    speeds: dict[str, float] = {}
    for published in published_figures(preset):
        measured = measured_figure(published.name, record)
        limit, share = "-", "-"
        if published.name == "new_tokens_per_s":
            if record.ceiling is not None and record.ceiling.share is not None:
                limit = figure(record.ceiling.tokens_per_s, ",.3g", published.unit)
                share = f"{record.ceiling.share:.0%}"
            values = {
                "published": published.value,
                "limit there": published.limit,
                "measured": measured,
                "limit here": record.ceiling_tokens_per_s,
            }
            speeds = {name: value for name, value in values.items() if value is not None}
        shown = figure(measured, ",.4g", published.unit)
        rows.append((LABELS[published.name], *figure_text(published), shown, limit, share))
    source = f"{config.experiment.source}; {config.experiment.location}"
    if is_rehearsal:
        source += "\nA rehearsal with another model than the published one."
    headings = ("figure", f"published ({hardware})", "limit there", "share", "measured here", "limit here", "share")
    return PublishedBeside(headings, tuple(rows), speeds, source)


def published_table(record: Record) -> Table | None:
    """`published_beside` as a table for the terminal."""
    beside = published_beside(record)
    if beside is None:
        return None
    table = Table(*beside.headings, caption=beside.source)
    for row in beside.rows:
        table.add_row(*row)
    return table


def figure_text(published: PublishedFigure) -> tuple[str, str, str]:
    """The figure, its limit, and the share of the limit that it reaches, as text."""
    share = figure(published.share, ".0%")
    if published.objection:
        share = "above the limit"
    return f"{published.value:g} {published.unit}", figure(published.limit, ".3g", published.unit), share
