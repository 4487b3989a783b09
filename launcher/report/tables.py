"""A record for people: answers, speed, memory of each device; and one JSON line for a program."""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.report.memory_table import device_table, phase_table
from launcher.report.published_table import published_table
from launcher.report.units import count, rate, seconds, size
from launcher.results.metrics import COUNTERS, ROWS, SLOTS
from launcher.run_dir.run_dir import COMPLETIONS, RANK_LOGS, RunDir
from launcher.system.typed import to_plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.results.completions import ReportedCompletion
    from launcher.results.measured import BandwidthUse, CeilingShare, Quantiles, Spread
    from launcher.results.record import BatchSearch, Record
    from launcher.run_dir.run import Run
    from shards.plan.plan import Plan
    from shards.plan.roofline import Limit

SHOWN_COMPLETIONS = 8
LINE_FIELDS = (
    "status", "backend", "model", "precision", "world_size", "num_devices", "batch_size", "new_tokens_per_s", "ttft_s",
    "itl_s", "load_s", "run_dir",
)  # fmt: skip
"""The fields of a record in its JSON line."""


def console(stderr: bool = False) -> Console:
    """A console that does not break its tables at 80 columns where there is no terminal."""
    usual = Console(stderr=stderr, highlight=False)
    return usual if usual.is_terminal else Console(stderr=stderr, highlight=False, width=140)


def rounded(value: Any) -> Any:
    """A figure to the fourth digit behind the point, a smaller one to four digits that are not leading zeros."""
    return round(value, max(4, 3 - math.floor(math.log10(abs(value))))) if isinstance(value, float) and value else value


def shown(text: str) -> str:
    """A text of a prompt or an engine for the terminal: what would move its cursor or set its colours is replaced."""
    return "".join("\ufffd" if unicodedata.category(letter) == "Cc" else letter for letter in text.replace("\t", " "))


def json_line(record: Record, more: Sequence[str] = ()) -> dict[str, Any]:
    """The last line of stdout as an object: the figures that a program asks for first, and `more` of the record."""
    line = {name: rounded(getattr(record, name)) for name in (*LINE_FIELDS, *more)}
    if record.error is not None:
        error = to_plain(record.error)
        line["error"] = {name: value for name, value in error.items() if name != "traceback" and value is not None}
    return line


def error_line(record: Record) -> str:
    """Why a run did not end well, in one line."""
    error = record.error
    if error is None:
        return record.status
    origin = f"rank {error.rank} in {error.stage}" if error.rank is not None else "before any rank began"
    hint = f" HINT: {error.hint}" if error.hint else ""
    kind = "" if error.type in ("ProcessDied", "Ended", "Cancelled") else f"{error.type}: "
    return shown(" ".join(f"{record.status}: {origin}: {kind}{error.message}{hint}".split()))


def show(record: Record) -> None:
    """Print one run: its tables, an error in one line on stderr, and its JSON line as the last of stdout."""
    show_record(record, console())
    if record.status != "ok":
        print(error_line(record), file=sys.stderr)
        print(f"The ranks' own words are in {record.run_dir}/{RANK_LOGS}", file=sys.stderr)
    print(json.dumps(json_line(record)), flush=True)


def show_record(record: Record, out: Console) -> None:
    """Print the tables of one run, which has a run directory."""
    assert record.run_dir is not None
    devices = f"{record.num_devices} device{'s' if record.num_devices > 1 else ''}"
    out.print(f"\n[bold]{record.backend} · {escape(record.model)} · {record.precision} · {devices}[/]")
    for note in record.notes:
        out.print(f"[yellow]note:[/] {escape(note)}")
    completions = RunDir(Path(record.run_dir)).read_completions()
    if any(completion.prompt or completion.text for completion in completions):
        out.print(_completions(completions))
    if record.status == "ok":
        if partial := record.partial:
            measured = f"measured over {partial.prompts} of {partial.of} prompts"
            out.print(f"[yellow]note:[/] {measured}: the run was split between attempts")
        if record.batch_search:
            out.print(batch_line(record.batch_search))
        speed = _speed(record) if record.metrics else None
        for table in (speed, published_table(record), device_table(record), phase_table([record])):
            if table is not None:
                out.print(table)
    out.print(f"run directory: {escape(record.run_dir)}", soft_wrap=True)


def batch_line(search: BatchSearch) -> str:
    """The result of the search for the largest batch, and how far the plan was from it."""
    largest, planned = search.largest_batch, search.planned
    more = "" if search.limited_by == "memory" else ", and the prompts suffice for no larger one"
    plan = f"; the plan allowed {planned}, {planned / largest - 1:+.0%}" if planned else "; the plan knew no limit"
    return f"largest batch: {largest} by {len(search.tries)} tries{more}{plan}"


def _completions(rows: Sequence[ReportedCompletion]) -> Table:
    table = Table("prompt", "completion", "new tokens", "end", title=None, show_lines=False)
    for row in rows[:SHOWN_COMPLETIONS]:
        prompt, text = (shown(part.strip().replace("\n", " ⏎ ")) for part in (row.prompt, row.text))
        table.add_row(escape(prompt), escape(text), str(row.new_tokens), row.finish_reason)
    if len(rows) > SHOWN_COMPLETIONS:
        table.add_row("…", f"{len(rows) - SHOWN_COMPLETIONS} more in {COMPLETIONS}", "", "")
    return table


def _speed(record: Record) -> Table:
    metrics, totals = record.metrics, record.totals
    assert metrics is not None
    assert totals is not None
    table = Table("measure", "median", "min", "max", "of")
    repeats = f"{totals.repeats} repeats"
    rates: dict[str, Spread] = {
        "new tokens/s": metrics.new_tokens_per_s,
        "new tokens/s per device": metrics.new_tokens_per_s_per_device,
        "prefill tokens/s": metrics.prefill_tokens_per_s,
        "decode tokens/s": metrics.decode_tokens_per_s,
    }
    for label, spread in rates.items():
        table.add_row(label, rate(spread.median), rate(spread.min), rate(spread.max), repeats)
    for name, spread in metrics.counters.items():
        if name in (SLOTS, ROWS):
            continue  # told as shares
        label = COUNTERS.get(name, name)
        table.add_row(label, count(spread.median), count(spread.min), count(spread.max), repeats)
    for label, share in (("slots in use", metrics.slots_in_use), ("computed rows in use", metrics.rows_in_use)):
        if share is not None:
            table.add_row(label, percent(share.median), percent(share.min), percent(share.max), repeats)
    table.add_section()
    table.add_row("[dim]latency[/]", "[dim]p50[/]", "[dim]p90[/]", "[dim]p99[/]", "")
    latencies: dict[str, Quantiles] = {"time to first token": metrics.ttft_s, "inter-token latency": metrics.itl_s}
    for label, times in latencies.items():
        table.add_row(label, seconds(times.p50), seconds(times.p90), seconds(times.p99), f"{times.count} values")
    table.add_section()
    tokens = f"{totals.prompts} prompts, {totals.prompt_tokens} prompt tokens, {totals.new_tokens} new tokens"
    table.add_row("load", seconds(record.load_s), "", "", tokens)
    if (ceiling := record.ceiling) and ceiling.share is not None:
        limit = f"of {rate(ceiling.tokens_per_s)} tokens/s, bound by {ceiling.bound}"
        table.add_row("share of the ceiling", _share(ceiling), "", "", limit)
    if used := record.mbu:
        of = used.reason if used.bandwidth is None else f"of {used.bandwidth / 1e9:,.1f} GB/s a device"
        table.add_row("memory bandwidth used (MBU)", _share(used), "", "", of)
    return table


def percent(value: float | None) -> str:
    """A share for a reader."""
    return "-" if value is None else f"{value:.1%}"


def _share(measured: CeilingShare | BandwidthUse) -> str:
    if measured.share is None:
        return "-"
    return f"[red]{measured.share:.1%}, impossible[/]" if measured.impossible else f"{measured.share:.1%}"


def show_point(point: Sequence[str], record: Record, out: Console) -> None:
    """Print one line as soon as a point of a sweep has ended."""
    result = f"{rate(record.new_tokens_per_s)} new tokens/s" if record.status == "ok" else error_line(record)
    out.print(escape(f"{' '.join(point)}: {record.status}, {result}"), soft_wrap=True)


def sweep_line(records: Sequence[Record], more: Sequence[str] = ()) -> str:
    """The last line of a sweep: how many points ended how, and the JSON line of each, with `more` of its record."""
    counts = Counter(record.status for record in records)
    return json.dumps({"points": counts, "records": [json_line(record, more) for record in records]})


def show_plan(run: Run, out: Console) -> None:
    """Print what a run would hold on each device, and the ceiling of its speed where the device is known."""
    plan, names = run.plan, f"{run.config.backend.name} · {escape(run.config.model.name)}"
    parameters = "" if plan is None else f" · {plan.num_parameters:,} parameters"
    out.print(f"[bold]plan: {names}{parameters}[/]")
    for note in run.notes:
        out.print(f"[yellow]note:[/] {escape(note)}")
    if plan is not None:
        _show_plan(plan, run.paces, out)
    elif run.paces:
        out.print(f"  {_by_engine(run.paces)}")


def _by_engine(paces: Mapping[str, float]) -> str:
    ceilings = ", ".join(f"{name} {rate(pace)}" for name, pace in paces.items())
    return f"ceiling by engine: {ceilings} tokens/s"


def _show_plan(plan: Plan, paces: Mapping[str, float], out: Console) -> None:
    table = Table("rank", "parameters", "KV cache", "activations", "buffers", "overhead", "capacity", "free")
    for device in plan.devices:
        cache = max(device.kv_cache_bytes, device.kv_cache_reserved_bytes)
        parts = (device.parameter_bytes, cache, device.activation_bytes, device.buffer_bytes, device.overhead_bytes)
        table.add_row(str(device.rank), *map(size, parts), size(device.capacity_bytes), size(device.free_bytes))
    out.print(table)
    on_host = "not known" if plan.load_host_bytes is None else size(plan.load_host_bytes)
    facts: dict[str, Any] = {
        "device": plan.device_name,
        "KV cache a token": f"{plan.kv_bytes_per_token:,} bytes",
        "peak while loading": f"{on_host} on a node's host, {size(plan.load_device_bytes)} on a device",
        "largest batch": plan.largest_batch or "not bounded by a known capacity",
        "longest context": plan.longest_context,
        "smallest number of devices": plan.smallest_devices or "not bounded by a known capacity",
        "decode ceiling": _limit(plan.limit, ", if every answer has its full length"),
        "prefill ceiling": _limit(plan.prefill_limit),
    }
    for name, value in facts.items():
        out.print(f"  {name}: {value}")
    if paces:
        out.print(f"  {_by_engine(paces)}")


def _limit(limit: Limit | None, more: str = "") -> str:
    if limit is None:
        return "no rates are known of the device or its link: python -m launcher.probe measures those of this machine"
    return f"{rate(limit.tokens_per_s)} tokens/s, {seconds(limit.seconds)} a step, bound by {limit.bound}{more}"


def show_sweep(records: Sequence[Record], points: Sequence[Sequence[str]], out: Console) -> None:
    """Print one row a point of a sweep, whatever became of it."""
    table = Table("point", "status", "new tokens/s", "min … max", "ttft p50", "itl p50", "load", "parameters/device")
    for record, point in zip(records, points, strict=True):
        speed = record.metrics.new_tokens_per_s if record.metrics else None
        parameters = [device.parameter_bytes for device in record.devices if device.parameter_bytes is not None]
        table.add_row(
            escape(" ".join(point)),
            record.status,
            rate(record.new_tokens_per_s),
            f"{rate(speed.min)} … {rate(speed.max)}" if speed else "-",
            seconds(record.ttft_s),
            seconds(record.itl_s),
            seconds(record.load_s),
            size(max(parameters)) if parameters else "-",
        )
    out.print(table)
