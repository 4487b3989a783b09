"""Samples of devices as lines over time, and a table of their values in the repeats."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.report.page.document import DataTable
from launcher.report.page.figures import Series
from launcher.results.figures.cost import REPEATS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.results.figures.cost import Cost, DeviceSample

STATES = {"power_w": "W", "utilisation": "", "sm_clock_mhz": "MHz", "temperature_c": "°C"}


@dataclass(frozen=True, slots=True)
class DevicesOverTime:
    """The power of each device over time, and a table row for each device."""

    series: list[Series]
    table: DataTable


def devices_over_time(costs: Sequence[tuple[str, Cost]]) -> DevicesOverTime:
    """The sampled devices of each run, by the run's label."""
    series, rows = [], []
    for label, cost in costs:
        for uuid in dict.fromkeys(sample.uuid for sample in cost.samples):
            name = f"{label} {uuid[:12]}"
            samples = [sample for sample in cost.samples if sample.uuid == uuid]
            powered = [(sample.second, sample.power_w) for sample in samples if sample.power_w is not None]
            if powered:
                x, y = zip(*powered, strict=True)
                series.append(Series(name, x, y))
            repeats = [sample for sample in samples if sample.phase == REPEATS]
            rows.append((name, *(middle(repeats, state, unit) for state, unit in STATES.items())))
    return DevicesOverTime(
        series, DataTable(("device", "power", "utilisation", "SM clock", "temperature"), tuple(rows))
    )


def middle(samples: Sequence[DeviceSample], state: str, unit: str) -> str:
    """The median of a value with its minimum and maximum; a dash if it is not known."""
    values = [value for sample in samples if (value := getattr(sample, state)) is not None]
    if not values:
        return "-"
    if state == "utilisation":
        return f"{statistics.median(values):.0%} ({min(values):.0%} … {max(values):.0%})"
    return f"{statistics.median(values):,.0f} {unit} ({min(values):,.0f} … {max(values):,.0f})"
