"""Output of a sweep: a line when a point ends, a table at the end, and a JSON line for programs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from launcher.report.layout import fitted
from launcher.report.run.speculation import COLUMN, cell, has_guesses
from launcher.report.run.tables import error_line, json_line, range_of
from launcher.report.units import percent, rate, seconds, size
from launcher.results.figures.quality import agreement, kl_divergence

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from launcher.results.record import Record
    from shards.untrusted_files import JsonObject

QUALITY = ("perplexity", "same top-1", "KL≥, nats")
FIGURES = ("new tokens/s", "min … max", "ttft p50", "itl p50", "load", "parameters/device")


def varied(points: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """The swept values of each point, by key: the overrides that are not the same in all points."""
    common: set[str] = set()
    if len(points) > 1:
        common = set.intersection(*map(set, points))
    swept = []
    for point in points:
        pairs = (item.partition("=") for item in point if item not in common)
        swept.append({key.lstrip("+"): value for key, _, value in pairs})
    return swept


def named(point: Mapping[str, str]) -> str:
    """The name of a point: its swept values."""
    return " ".join(f"{key}={value}" for key, value in point.items())


def show_point(point: Mapping[str, str], record: Record, out: Console) -> None:
    """Print one line when a point of a sweep has ended."""
    if record.status == "ok":
        outcome = f"ok, {rate(record.new_tokens_per_s)} new tokens/s"
    else:
        outcome = error_line(record)
    if point:
        outcome = f"{named(point)}: {outcome}"
    out.print(escape(outcome), soft_wrap=True)


def show_sweep(records: Sequence[Record], points: Sequence[Mapping[str, str]], out: Console) -> None:
    """Print one row for each point of a sweep, whatever its status, with a column for each swept key."""
    keys = list(dict.fromkeys(key for point in points for key in point))
    columns = [*keys, "status", *FIGURES]
    shows_guesses = has_guesses(records)
    if shows_guesses:
        columns.append(COLUMN)
    base = next((record.quality for record in records if record.quality), None)
    if base:
        columns += QUALITY
    rows = []
    for record, point in zip(records, points, strict=True):
        parameters = [device.parameter_bytes for device in record.devices if device.parameter_bytes is not None]
        row = [
            *(escape(point.get(key, "-")) for key in keys),
            record.status,
            rate(record.new_tokens_per_s),
            range_of(record.speed),
            seconds(record.ttft_s),
            seconds(record.itl_s),
            seconds(record.load_s),
            size(max(parameters, default=None)),
        ]
        if shows_guesses:
            row.append(cell(record))
        if base and record.quality:
            kl = kl_divergence(base, record.quality)
            row += [f"{record.quality.perplexity:,.4g}", percent(agreement(base, record.quality))]
            row.append("-" if kl is None else f"{kl:.2g}")
        elif base:
            row += ["-"] * len(QUALITY)
        rows.append(row)
    out.print(fitted(out, columns, rows, texts=keys, optional=FIGURES[:0:-1]))


def sweep_line(
    records: Sequence[Record], points: Sequence[Mapping[str, str]] = (), more: Sequence[str] = ()
) -> JsonObject:
    """The JSON line of a sweep: the number of points by status, and for each point its own JSON line with the swept
    values and the fields `more` of its record."""
    lines = [json_line(record, more) for record in records]
    for line, record, point in zip(lines, records, points, strict=False):
        line["swept"] = {key: _value(record.config, key, value) for key, value in point.items()}
    return {"points": Counter(record.status for record in records), "records": lines}


def _value(config: Mapping[str, Any], key: str, given: str) -> Any:
    """The value of a key in a composed configuration; for a group its chosen option."""
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return given
        value = value[name]
    if isinstance(value, dict):
        return given
    return value
