"""Output of one record: tables of answers, speed and memory of each device, and one JSON line for programs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.config.engines import engines
from launcher.config.schema import Scheduling
from launcher.report.layout import console, counted, fitted, print_json, rounded, shown
from launcher.report.published_table import published_table
from launcher.report.run.cost_rows import cost_rows
from launcher.report.run.load_rows import load_rows
from launcher.report.run.memory_table import device_table, phase_table
from launcher.report.run.request_rows import rate_rows, serving_rows, time_rows
from launcher.report.run.speculation import speculation_rows
from launcher.report.units import count, percent, rate, seconds
from launcher.results.figures.metrics import COUNTERS, ROWS, SLOTS
from launcher.results.figures.speculation import COUNTED
from launcher.results.figures.validity import STEADY
from launcher.run_dir.rank_files import RANK_LOGS
from launcher.run_dir.run_dir import COMPLETIONS, RunDir
from launcher.run_dir.verify import verify
from launcher.system.typed import to_plain
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from launcher.results.completions import ReportedCompletion
    from launcher.results.measured import BandwidthUse, CeilingShare, Quantiles, Spread
    from launcher.results.record import BatchSearch, Record
    from shards.untrusted_files import JsonObject

SHOWN_COMPLETIONS = 8
WORDS_OF_OURS = ("ProcessDied", "Ended", "Cancelled")
"""Error types that are not names of exceptions."""

GOES_ON = ("cancelled", "timeout")
"""Statuses of runs that resume=true can continue."""

LINE_FIELDS = (
    "status", "backend", "model", "precision", "world_size", "num_devices", "batch_size", "new_tokens_per_s", "ttft_s",
    "itl_s", "load_s", "run_dir",
)  # fmt: skip
"""The fields of a record in its JSON line."""


def json_line(record: Record, more: Sequence[str] = ()) -> JsonObject:
    """The JSON line of a run: the headline figures, and the fields `more` of the record."""
    line = {name: rounded(getattr(record, name)) for name in (*LINE_FIELDS, *more)}
    if record.error is not None:
        error = to_plain(record.error)
        line["error"] = {name: value for name, value in error.items() if name != "traceback" and value is not None}
    return line


def error_line(record: Record) -> str:
    """The error of a run in one line."""
    error = record.error
    if error is None:
        return record.status
    parts = [f"{record.status}:"]
    if error.rank is not None:
        parts.append(f"rank {error.rank} in {error.stage}:")
    if error.type not in WORDS_OF_OURS and record.status != "refused":
        parts.append(f"{error.type}:")
    parts.append(error.message)
    if error.hint:
        parts.append(f"HINT: {error.hint}")
    return shown(" ".join(" ".join(parts).split()))


def show(record: Record, began: float = 0.0, only_json: bool = False) -> None:
    """Print one run: its tables, its error as one line on stderr, and its JSON line as the last line of stdout.

    A note says so if the run had ended before `began`, so that it was not repeated.
    """
    if not only_json:
        show_record(record, console(), began)
    if record.status != "ok":
        print(error_line(record), file=sys.stderr)
        print(f"Logs: {record.run_dir}/{RANK_LOGS}", file=sys.stderr)
    if record.status in GOES_ON:
        print(f"To continue: python -m launcher resume=true run_dir={record.run_dir}", file=sys.stderr)
    print_json(json_line(record), only_json)


def show_record(record: Record, out: Console, began: float = 0.0) -> None:
    """Print the tables of one run, which has a run directory."""
    assert record.run_dir is not None
    parts = [record.backend, escape(record.model), record.precision, counted(record.num_devices, "device")]
    out.print(f"\n[bold]{' · '.join([*parts, _batching(record)])}[/]")
    for note in [*record.notes, *_remarks(record, began)]:
        out.print(f"[yellow]note:[/] {escape(note)}")
    completions = RunDir(Path(record.run_dir)).read_completions()
    if any(completion.prompt or completion.text for completion in completions):
        out.print(_completions(completions, out))
    if record.status == "ok":
        if record.batch_search:
            out.print(batch_line(record.batch_search))
        tables = [published_table(record), phase_table([record], out)]
        if record.devices:
            tables.insert(1, device_table(record, out))
        if record.metrics:
            tables.insert(0, _speed(record, out))
        for table in filter(None, tables):
            out.print(table)
        out.print(badge_line(RunDir(Path(record.run_dir))), soft_wrap=True)
    out.print(f"run directory: {escape(record.run_dir)}", soft_wrap=True)


def badge_line(run_dir: RunDir) -> str:
    """The verdict on the figures of a run, VALID or INVALID, with the reasons."""
    try:
        validity = verify(run_dir)
    except UserError as error:
        return f"[yellow]not verified: {escape(error.fact)}[/]"
    colour = "yellow"
    if validity.is_valid:
        colour = "green"
    return f"[{colour}]{escape(validity.line)}[/]"


def _batching(record: Record) -> str:
    """The number of prompts answered at a time, as text."""
    engine = engines().get(record.backend)
    if record.batch_size is None or (engine is not None and engine.continuous_batching):
        return "continuous batching"
    has_slots = engine is not None and engine.has_slots
    if has_slots and record.config.get("measure", {}).get("scheduling") == Scheduling.continuous.name:
        return counted(record.batch_size, "slot")
    return f"batch of {record.batch_size}"


def _remarks(record: Record, began: float) -> list[str]:
    """Remarks that a reader should see before the figures."""
    remarks = []
    if record.ended_at is not None and record.ended_at < began:
        ended = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.ended_at))
        remarks.append(f"this run ended on {ended} and was not repeated: resume=true shows its result")
    if partial := record.partial:
        measured = f"measured over {partial.prompts} of {counted(partial.of, 'prompt')}"
        remarks.append(f"{measured}: the run was split between attempts")
    speed = record.speed
    if speed and speed.min and speed.max and speed.max / speed.min > STEADY:
        factor = f"a factor of {speed.max / speed.min:.3g} between repeats"
        remarks.append(
            f"new tokens/s differ by {factor}: the median is unreliable; increase measure.repeats or measure.warmup"
        )
    return remarks


def batch_line(search: BatchSearch) -> str:
    """The result of the search for the largest batch, compared with the plan."""
    largest, planned = search.largest_batch, search.planned
    line = f"largest batch: {largest} by {counted(len(search.tries), 'try', 'tries')}"
    if search.limited_by != "memory":
        line += ", and there are not enough prompts for a larger one"
    if planned:
        return f"{line}; the plan allowed {planned}, {planned / largest - 1:+.0%}"
    return f"{line}; the plan had no limit"


def _completions(completions: Sequence[ReportedCompletion], out: Console) -> Table:
    rows = []
    for row in completions[:SHOWN_COMPLETIONS]:
        prompt, text = (shown(part.strip().replace("\n", " ⏎ ")) for part in (row.prompt, row.text))
        rows.append([escape(prompt), escape(text), str(row.new_tokens), row.finish_reason])
    if len(completions) > SHOWN_COMPLETIONS:
        rows.append(["…", f"{len(completions) - SHOWN_COMPLETIONS} more in {COMPLETIONS}", "", ""])
    columns = ("prompt", "completion", "new tokens", "end")
    return fitted(out, columns, rows, texts=("prompt", "completion"), optional=("end", "new tokens"))


def range_of(spread: Spread | None) -> str:
    """The slowest and the fastest repeat, marked if they are far apart."""
    if spread is None or not spread.min or not spread.max:
        return "-"
    text = f"{rate(spread.min)} … {rate(spread.max)}"
    if spread.max / spread.min > STEADY:
        return f"[yellow]{text}[/]"
    return text


def _speed(record: Record, out: Console) -> Table:
    metrics, totals = record.metrics, record.totals
    assert metrics is not None
    assert totals is not None
    rows: list[list[str] | None] = []
    repeats = counted(totals.repeats, "repeat")
    rates: dict[str, Spread] = {
        "new tokens/s": metrics.new_tokens_per_s,
        "new tokens/s per device": metrics.new_tokens_per_s_per_device,
        "prefill tokens/s": metrics.prefill_tokens_per_s,
        "decode tokens/s": metrics.decode_tokens_per_s,
    }
    for label, spread in rates.items():
        rows.append([label, rate(spread.median), rate(spread.min), rate(spread.max), repeats])
    shows_requests = any((metrics.serving, metrics.request_goodput, *record.config.get("load", {}).values()))
    if shows_requests:
        rows += rate_rows(metrics, repeats)
    for name, spread in metrics.counters.items():
        if name in (SLOTS, ROWS, *COUNTED):
            continue  # reported as shares below
        rows.append([COUNTERS.get(name, name), count(spread.median), count(spread.min), count(spread.max), repeats])
    for label, share in (("slots in use", metrics.slots_in_use), ("computed rows in use", metrics.rows_in_use)):
        if share is not None:
            rows.append([label, percent(share.median), percent(share.min), percent(share.max), repeats])
    rows += speculation_rows(metrics.speculation)
    rows += [None, ["[dim]latency[/]", "[dim]p50[/]", "[dim]p90[/]", "[dim]p99[/]", ""]]
    latencies: dict[str, Quantiles] = {"time to first token": metrics.ttft_s, "inter-token latency": metrics.itl_s}
    for label, times in latencies.items():
        p50, p90, p99 = map(seconds, (times.p50, times.p90, times.p99))
        rows.append([label, p50, p90, p99, counted(times.count, "value")])
    if shows_requests:
        rows += time_rows(metrics)
    if metrics.serving:
        rows += [None, *serving_rows(metrics.serving)]
    sums = (counted(totals.prompts, "prompt"), f"{totals.prompt_tokens:,} prompt tokens", f"{totals.new_tokens:,} new")
    rows += [None, ["load", seconds(record.load_s), "", "", ", ".join(sums)]]
    rows += load_rows(record.load_times, record.compilation)
    if record.cost is not None:
        rows += cost_rows(record.cost)
    if (quality := record.quality) is not None:
        shown = f"{counted(quality.tokens, 'token')} of {escape(quality.text)}"
        rows.append(["perplexity", f"{quality.perplexity:,.4g}", "", "", shown])
    if (ceiling := record.ceiling) and ceiling.share is not None:
        limit = f"of {rate(ceiling.tokens_per_s)} tokens/s, bound by {ceiling.bound}"
        rows.append(["share of the ceiling", _share(ceiling), "", "", limit])
    if used := record.mbu:
        bandwidth = used.reason or ""
        if used.bandwidth is not None:
            bandwidth = f"of {used.bandwidth / 1e9:,.1f} GB/s a device"
        rows.append(["memory bandwidth used (MBU)", _share(used), "", "", bandwidth])
    return fitted(out, ("measure", "median", "min", "max", "of"), rows, texts=("measure", "of"))


def _share(measured: CeilingShare | BandwidthUse) -> str:
    if measured.share is None:
        return "-"
    if measured.impossible:
        return f"[red]{measured.share:.1%}, impossible[/]"
    return f"{measured.share:.1%}"
