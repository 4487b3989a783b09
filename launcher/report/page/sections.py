"""Make the sections of a page from records: each figure with its text and its table."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from launcher.report.page.devices import devices_over_time
from launcher.report.page.document import DataTable, Section
from launcher.report.page.figures import (
    Point,
    Series,
    Span,
    Stack,
    bar_figure,
    line_figure,
    merged_spans,
    pareto_front,
    scatter_figure,
    stacked_figure,
    svg,
    timeline_figure,
)
from launcher.report.page.memory_parts import cache_of, measured_parts, planned_parts
from launcher.report.published_table import published_beside
from launcher.report.rows import label_of, swept_keys, unique
from launcher.report.run.load_rows import LOAD_PARTS, load_cells
from launcher.report.units import percent, rate, seconds, size
from shards.machine.hardware import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from launcher.results.record import Record

NamedFigure = tuple[str, "Figure"]
"""The name of a figure's file, and the figure."""

AXES = {"num_devices": "devices", "batch_size": "batch size"}


class Report:
    """The figures and sections of some runs, in the order in which a page shows them."""

    def __init__(self, records: Sequence[Record], badges: Sequence[str] = ()) -> None:
        self.records, self.badges = records, badges or ("",) * len(records)
        self.swept = swept_keys(records)
        self.labels = unique([label_of(record, self.swept) for record in records])
        self.measured = [
            (label, record) for label, record in zip(self.labels, records, strict=True) if record.metrics is not None
        ]
        self.figures: list[NamedFigure] = []

    def sections(self) -> list[Section]:
        """All sections for which the runs have values; failed runs are in the first table only."""
        sections = [self._overview()]
        if self.measured:
            sections += [self._speed(), self._latency(), self._memory(), self._timeline()]
            sections += [*self._scaling(), *self._pareto(), *self._devices(), *self._published()]
        return sections

    def _drawn(self, name: str, figure: Figure, title: str, text: str) -> str:
        self.figures.append((name, figure))
        return svg(figure, title, text)

    def _overview(self) -> Section:
        rows = []
        for label, record, badge in zip(self.labels, self.records, self.badges, strict=True):
            figures = ("-",) * 5
            if record.metrics is not None:
                spread = record.metrics.new_tokens_per_s
                figures = (
                    rate(spread.median),
                    f"{rate(spread.min)} … {rate(spread.max)}",
                    seconds(record.ttft_s),
                    seconds(record.itl_s),
                    percent(getattr(record.ceiling, "share", None)),
                )
            state = record.status
            if record.error is not None:
                state += f": {record.error.message[:80]}"
            rows.append((label, state, badge or "-", *figures, seconds(record.load_s), *load_cells(record.load_times)))
        headings = (
            "run", "status", "verified", "new tokens/s", "min … max", "ttft p50", "itl p50", "of the ceiling", "load",
            *LOAD_PARTS.values(),
        )  # fmt: skip
        notes = tuple(dict.fromkeys(f"{r.backend} x{r.num_devices}: {note}" for r in self.records for note in r.notes))
        return Section("Runs", "Medians over the repeats of each run.", None, DataTable(headings, tuple(rows)), notes)

    def _speed(self) -> Section:
        title, text = "Speed", "New tokens/s of all devices together; bars are the least and most of the repeats."
        rows, ceilings = [], {}
        for label, record in self.measured:
            assert record.metrics is not None
            spread = record.metrics.new_tokens_per_s
            ceilings[label] = record.ceiling_tokens_per_s
            rows.append((label, rate(spread.median), rate(spread.min), rate(spread.max), rate(ceilings[label])))
        headings = ("run", "new tokens/s", "min", "max", "ceiling")
        axes = [name for name in AXES if all(getattr(record, name) is not None for _, record in self.measured)]
        axis = max(axes, key=self._longest_line)
        if self._longest_line(axis) < 2:
            groups = {label: {"measured": record.new_tokens_per_s or 0.0} for label, record in self.measured}
            for label, ceiling in ceilings.items():
                if ceiling is not None:
                    groups[label]["ceiling"] = ceiling
            figure = bar_figure(groups, "tokens/s")
        else:
            text += " Dashed: the ceiling, what bandwidth, arithmetic and links of the machine allow."
            figure = line_figure(self._lines(axis), AXES[axis], "new tokens/s", log_x=True)
        return Section(title, text, self._drawn("speed", figure, title, text), DataTable(headings, tuple(rows)))

    def _longest_line(self, axis: str) -> int:
        """The largest number of points of a line over `axis`."""
        return max(len(set(line.x)) for line in self._lines(axis))

    def _lines(self, axis: str) -> list[Series]:
        """The lines over `axis`: runs that differ only in it form one line."""
        groups: dict[str, list[Record]] = defaultdict(list)
        others = [key for key in self.swept if key not in ("devices", "num_nodes", "measure.batch_size")]
        other_axis = next(name for name in AXES if name != axis)
        for _, record in self.measured:
            name = record.backend
            if others:
                name = label_of(record, others)
            groups[f"{name}, {AXES[other_axis]} {getattr(record, other_axis) or 'of its own'}"].append(record)
        if len({name.partition(", ")[2] for name in groups}) == 1:
            groups = defaultdict(list, {name.partition(", ")[0]: records for name, records in groups.items()})
        lines = []
        for name, records in groups.items():
            ordered = sorted(records, key=lambda record: float(getattr(record, axis)))
            spreads = [record.metrics.new_tokens_per_s for record in ordered if record.metrics]
            lines.append(
                Series(
                    name,
                    tuple(float(getattr(record, axis)) for record in ordered),
                    tuple(spread.median or 0.0 for spread in spreads),
                    tuple(spread.min or 0.0 for spread in spreads),
                    tuple(spread.max or 0.0 for spread in spreads),
                    tuple(record.ceiling_tokens_per_s for record in ordered),
                )
            )
        return lines

    def _latency(self) -> Section:
        title = "Latency"
        text = "Quantiles in ms, over all prompts and repeats: time to first token and gaps between tokens after it."
        groups, rows = {}, []
        for label, record in self.measured:
            assert record.metrics is not None
            ttft, itl = record.metrics.ttft_s, record.metrics.itl_s
            values = {
                f"{name} {part}": getattr(quantiles, part)
                for name, quantiles in (("ttft", ttft), ("itl", itl))
                for part in ("p50", "p90", "p99")
            }
            groups[label] = {name: 1000 * value for name, value in values.items() if value is not None}
            rows.append((label, *(seconds(value) for value in values.values()), str(ttft.count), str(itl.count)))
        headings = ("run", "ttft p50", "p90", "p99", "itl p50", "p90", "p99", "prompts", "gaps")
        drawing = self._drawn("latency", bar_figure(groups, "ms"), title, text)
        return Section(title, text, drawing, DataTable(headings, tuple(rows)))

    def _memory(self) -> Section:
        title = "Memory of each device"
        devices = [
            (f"{label} {device.rank}", device, planned.get(device.rank))
            for label, record in self.measured
            for planned in [record.planned_devices]
            for device in record.devices
        ]
        largest = max((device.parameter_bytes or 0 for _, device, _ in devices), default=0)
        unit, unit_name = MIB, "MiB"
        if largest >= GIB:
            unit, unit_name = GIB, "GiB"
        text = f"In {unit_name}; planned above measured. A black line is the capacity of the device."
        stacks: list[Stack] = []
        limits: list[float | None] = []
        rows = []
        for name, device, plan in devices:
            capacity = planned_parameters = planned_cache = None
            if plan is not None:
                planned_parameters = plan.parameter_bytes
                capacity = plan.capacity_bytes and plan.capacity_bytes / unit
                planned_cache = max(plan.kv_cache_bytes, plan.kv_cache_reserved_bytes)
                stacks.append(Stack(f"{name} planned", planned_parts(plan, device, unit)))
                limits.append(capacity)
            stacks.append(Stack(f"{name} measured", measured_parts(device, unit)))
            limits.append(capacity)
            bytes_ = (
                planned_parameters,
                device.parameter_bytes,
                planned_cache,
                cache_of(device),
                device.peak_allocated_bytes,
                device.nvml_used_bytes,
                device.host_anonymous_bytes,
            )
            rows.append((name, *map(size, bytes_)))
        headings = (
            "device", "parameters, planned", "measured", "KV cache, planned", "measured", "peak allocated", "NVML",
            "host",
        )  # fmt: skip
        drawing = self._drawn("memory", stacked_figure(stacks, unit_name, limits), title, text)
        return Section(title, text, drawing, DataTable(headings, tuple(rows)))

    def _timeline(self) -> Section:
        title = "Timeline"
        text = "Time of each rank in the repeats, one after the other from the first: prefill and decode of all calls."
        spans, rows = [], []
        for label, record in self.measured:
            longest: dict[int, float] = defaultdict(float)
            for rank in record.ranks:
                for repeat in rank.repeats:
                    longest[repeat.number] = max(longest[repeat.number], repeat.wall_s)
            for rank in record.ranks:
                name = f"{label} rank {rank.rank}"
                for repeat in rank.repeats:
                    start = sum(wall_s for number, wall_s in longest.items() if number < repeat.number)
                    end, prefill = start + repeat.wall_s, repeat.prefill_s
                    if prefill is None:
                        spans.append(Span(name, start, end, "prefill and decode"))
                    else:
                        spans += [
                            Span(name, start, start + prefill, "prefill"),
                            Span(name, start + prefill, end, "decode"),
                        ]
                    times = (prefill, repeat.decode_s, repeat.wall_s)
                    rows.append((name, str(repeat.number + 1), *map(seconds, times)))
        headings = ("rank", "repeat", "prefill", "decode", "wall")
        drawing = self._drawn("timeline", timeline_figure(merged_spans(spans), "seconds"), title, text)
        return Section(title, text, drawing, DataTable(headings, tuple(rows)))

    def _scaling(self) -> list[Section]:
        """Efficiency relative to the fewest devices of the same line, if there are lines."""
        if len({record.num_devices for _, record in self.measured}) < 2:
            return []
        title = "Scaling efficiency"
        text = "Tokens/s for each device, over those with the fewest devices: 1 is perfect scaling."
        lines = [line for line in self._lines("num_devices") if len(line.x) > 1 and line.y[0] > 0]
        if not lines:
            return []
        scaled = [
            Series(
                line.name, line.x, tuple((y / x) / (line.y[0] / line.x[0]) for x, y in zip(line.x, line.y, strict=True))
            )
            for line in lines
        ]
        rows = [(line.name, f"{x:g}", f"{y:.3f}") for line in scaled for x, y in zip(line.x, line.y, strict=True)]
        drawing = self._drawn("scaling", line_figure(scaled, "devices", "efficiency", log_x=True), title, text)
        return [Section(title, text, drawing, DataTable(("runs", "devices", "efficiency"), tuple(rows)))]

    def _pareto(self) -> list[Section]:
        """Speed for one user against throughput per device, if at least two runs have both."""
        title = "One user against all"
        text = (
            "Tokens/s that one user sees (one over the median gap between tokens) against tokens/s for each device. "
            "No other run is better in both than one on the Pareto front."
        )
        points = []
        for label, record in self.measured:
            assert record.metrics is not None
            per_device = record.metrics.new_tokens_per_s_per_device.median
            if record.itl_s and per_device is not None:
                points.append(Point(label, 1 / record.itl_s, per_device))
        if len(points) < 2:
            return []
        marked = pareto_front(points)
        rows = [(p.name, rate(p.x), rate(p.y), "yes" if p.on_front else "no") for p in marked]
        headings = ("run", "tokens/s per user", "tokens/s per device", "on the front")
        figure = scatter_figure(marked, headings[1], headings[2])
        return [Section(title, text, self._drawn("pareto", figure, title, text), DataTable(headings, tuple(rows)))]

    def _devices(self) -> list[Section]:
        """Power, utilisation, clock and temperature of the devices, if the driver reported them."""
        parts = devices_over_time([(label, record.cost) for label, record in self.measured if record.cost])
        if not parts.series:
            return []
        title, text = "Devices over time", "Power of each device from the warm-up on; the table has the repeats."
        drawing = self._drawn("devices", line_figure(parts.series, "seconds", "watts"), title, text)
        return [Section(title, text, drawing, parts.table)]

    def _published(self) -> list[Section]:
        """Runs of experiments compared with the published figures."""
        pairs = [(label, beside) for label, r in self.measured if (beside := published_beside(r)) is not None]
        if not pairs:
            return []
        title, text = "Published beside measured", "Two machines compare by their shares of the limit."
        rows = [(label, beside.headings[1], *row) for label, beside in pairs for row in beside.rows]
        headings = ("run", "source of the figure", "figure", "published", *pairs[0][1].headings[2:])
        figure = bar_figure({label: beside.speeds for label, beside in pairs}, "tokens/s")
        notes = tuple(dict.fromkeys(f"{label}: {beside.source}" for label, beside in pairs))
        drawing = self._drawn("published", figure, title, text)
        return [Section(title, text, drawing, DataTable(headings, tuple(rows)), notes)]
