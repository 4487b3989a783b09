"""A record as a person reads it: answers, speed, what each device held; and one JSON line for a program."""

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

from launcher.system.files import read_lines
from shards.machine.hardware import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.run_dir.run import Run
    from shards.plan.roofline import Limit

SHOWN_COMPLETIONS = 8
HEADLINE = (
    "status", "backend", "model", "precision", "world_size", "new_tokens_per_s", "ttft_s", "itl_s", "load_s", "run_dir",
)  # fmt: skip


def console(stderr: bool = False) -> Console:
    """A console that does not break its tables at 80 columns where there is no terminal."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=140)


def size(value: int | None) -> str:
    """Bytes for a reader, in MiB or GiB; a dash for what is not known."""
    if value is None:
        return "-"
    return f"{value / GIB:,.2f} GiB" if value >= GIB else f"{value / MIB:,.2f} MiB"


def seconds(value: float | None) -> str:
    """Seconds for a reader, in ms below one."""
    if value is None:
        return "-"
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1000:,.2f} ms"


def rate(value: float | None) -> str:
    """Tokens per second for a reader."""
    return "-" if value is None else f"{value:,.1f}" if value >= 10 else f"{value:,.3f}"


def rounded(value: Any) -> Any:
    """A figure to the fourth digit behind the point, a smaller one to four digits that are not leading zeros."""
    return round(value, max(4, 3 - math.floor(math.log10(abs(value))))) if isinstance(value, float) and value else value


def shown(text: str) -> str:
    """A text of a prompt or an engine for the terminal: what would move its cursor or set its colours is replaced."""
    return "".join("\ufffd" if unicodedata.category(letter) == "Cc" else letter for letter in text.replace("\t", " "))


def headline(record: dict[str, Any], more: Sequence[str] = ()) -> str:
    """The last line of stdout: one JSON object with the figures that a program asks for first."""
    error = {key: value for key, value in (record["error"] or {}).items() if key != "traceback"}
    return json.dumps(
        {name: rounded(record[name]) for name in (*HEADLINE, *more)} | ({"error": error} if error else {})
    )


def error_line(record: dict[str, Any]) -> str:
    """Why a run did not end well, in one line."""
    error = record["error"]
    where = f"rank {error['rank']} in {error['stage']}" if error["rank"] is not None else "before any rank began"
    hint = f" HINT: {error['hint']}" if error["hint"] else ""
    kind = "" if error["type"] in ("ProcessDied", "Ended", "Cancelled") else f"{error['type']}: "
    return shown(" ".join(f"{record['status']}: {where}: {kind}{error['message']}{hint}".split()))


def show(record: dict[str, Any]) -> None:
    """Print one run: its tables, an error in one line on stderr, and the headline as the last line of stdout."""
    show_record(record, console())
    if record["status"] != "ok":
        print(error_line(record), file=sys.stderr)
        print(f"The ranks' own words are in {record['run_dir']}/rank_*.log", file=sys.stderr)
    print(headline(record), flush=True)


def show_record(record: dict[str, Any], out: Console) -> None:
    """Print the tables of one run."""
    run_dir = Path(record["run_dir"])
    devices = f"{record['world_size']} device{'s' if record['world_size'] > 1 else ''}"
    out.print(f"\n[bold]{record['backend']} · {escape(record['model'])} · {record['precision']} · {devices}[/]")
    for note in record["notes"]:
        out.print(f"[yellow]note:[/] {escape(note)}")
    completions = read_lines(run_dir / "completions.jsonl")
    if any(row["prompt"] or row["text"] for row in completions):
        out.print(_completions(completions))
    if record["status"] == "ok":
        if record["partial"]:
            prompts, of = record["partial"]["prompts"], record["partial"]["of"]
            out.print(f"[yellow]note:[/] measured over {prompts} of {of} prompts: the run was split between attempts")
        if search := record.get("batch_search"):
            out.print(batch_line(search))
        if record["metrics"]:
            out.print(_speed(record))
        out.print(_devices(record))
    out.print(f"run directory: {escape(str(run_dir))}", soft_wrap=True)


def batch_line(search: dict[str, Any]) -> str:
    """What the search for the largest batch found, and how far the plan was from it."""
    found, planned = search["largest_batch"], search["planned"]
    more = "" if search["limited_by"] == "memory" else ", and the prompts suffice for no larger one"
    plan = f"; the plan allowed {planned}, {planned / found - 1:+.0%}" if planned else "; the plan knew no limit"
    return f"largest batch: {found} by {len(search['tries'])} tries{more}{plan}"


def _completions(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("prompt", "completion", "new tokens", "end", title=None, show_lines=False)
    for row in rows[:SHOWN_COMPLETIONS]:
        prompt, text = (shown(row[name].strip().replace("\n", " ⏎ ")) for name in ("prompt", "text"))
        table.add_row(escape(prompt), escape(text), str(row["new_tokens"]), row["finish_reason"])
    if len(rows) > SHOWN_COMPLETIONS:
        table.add_row("…", f"{len(rows) - SHOWN_COMPLETIONS} more in completions.jsonl", "", "")
    return table


def _speed(record: dict[str, Any]) -> Table:
    metrics, totals = record["metrics"], record["totals"]
    table = Table("measure", "median", "min", "max", "of")
    repeats = f"{totals['repeats']} repeats"
    for name, label in (
        ("new_tokens_per_s", "new tokens/s"),
        ("new_tokens_per_s_per_device", "new tokens/s per device"),
        ("prefill_tokens_per_s", "prefill tokens/s"),
        ("decode_tokens_per_s", "decode tokens/s"),
    ):
        row = metrics[name]
        table.add_row(label, rate(row["median"]), rate(row.get("min")), rate(row.get("max")), repeats)
    table.add_section()
    table.add_row("[dim]latency[/]", "[dim]p50[/]", "[dim]p90[/]", "[dim]p99[/]", "")
    for name, label in (("ttft_s", "time to first token"), ("itl_s", "inter-token latency")):
        row = metrics[name]
        table.add_row(label, *(seconds(row[at]) for at in ("p50", "p90", "p99")), f"{row['count']} values")
    table.add_section()
    tokens = f"{totals['prompts']} prompts, {totals['prompt_tokens']} prompt tokens, {totals['new_tokens']} new tokens"
    table.add_row("load", seconds(record["load_s"]), "", "", tokens)
    if (ceiling := record["ceiling"])["share"] is not None:
        limit = f"of {rate(ceiling['decode_tokens_per_s'])} tokens/s, bound by {ceiling['bound']}"
        table.add_row("share of the ceiling", _share(ceiling), "", "", limit)
    used = record["mbu"]
    of = f"of {used['bandwidth'] / 1e9:,.1f} GB/s a device" if used["share"] is not None else used["reason"]
    table.add_row("memory bandwidth used (MBU)", _share(used), "", "", of)
    return table


def _share(found: dict[str, Any]) -> str:
    if found["share"] is None:
        return "-"
    return f"[red]{found['share']:.1%}, impossible[/]" if found["impossible"] else f"{found['share']:.1%}"


def _devices(record: dict[str, Any]) -> Table:
    fields = {
        "parameter_bytes": "parameters",
        "kv_cache_bytes": "KV cache",
        "kv_cache_reserved_bytes": "KV reserved",
        "tensor_bytes": "tensors",
        "peak_allocated_bytes": "peak allocated",
        "peak_reserved_bytes": "peak reserved",
        "nvml_used_bytes": "NVML used",
        "host_anonymous_bytes": "host anonymous",
    }
    shown = [name for name in fields if any(device[name] is not None for device in record["devices"])]
    planned = {device["rank"]: device for device in record["plan"]["devices"]}
    table = Table("rank", "device", *(fields[name] for name in shown), caption="in brackets: as planned")
    for device in record["devices"]:
        name = f"{device['device']} {device['device_name']}".strip()
        table.add_row(str(device["rank"]), name, *(_held(field, device, planned) for field in shown))
    return table


def _held(field: str, device: dict[str, Any], planned: dict[int, dict[str, Any]]) -> str:
    expected = planned.get(device["rank"], {}).get(field)
    return size(device[field]) + (f" [dim]({size(expected)})[/]" if expected is not None else "")


def show_point(point: Sequence[str], record: dict[str, Any], out: Console) -> None:
    """One line as soon as a point of a sweep has ended."""
    what = f"{rate(record['new_tokens_per_s'])} new tokens/s" if record["status"] == "ok" else error_line(record)
    out.print(escape(f"{' '.join(point)}: {record['status']}, {what}"), soft_wrap=True)


def sweep_line(records: Sequence[dict[str, Any]], more: Sequence[str] = ()) -> str:
    """The last line of a sweep: how many points ended how, and of each the headline, and `more` of its record."""
    counts = Counter(record["status"] for record in records)
    return json.dumps({"points": counts, "records": [json.loads(headline(record, more)) for record in records]})


def show_plan(run: Run, out: Console) -> None:
    """Print what a run would hold on each device, and the ceiling of its speed where the device is known."""
    plan = run.plan
    out.print(f"[bold]plan: {plan.engine} · {escape(run.config.model.name)} · {plan.num_parameters:,} parameters[/]")
    for note in run.notes:
        out.print(f"[yellow]note:[/] {escape(note)}")
    table = Table("rank", "parameters", "KV cache", "activations", "buffers", "overhead", "capacity", "free")
    for device in plan.devices:
        cache = max(device.kv_cache_bytes, device.kv_cache_reserved_bytes)
        held = (device.parameter_bytes, cache, device.activation_bytes, device.buffer_bytes, device.overhead_bytes)
        table.add_row(str(device.rank), *map(size, held), size(device.capacity_bytes), size(device.free_bytes))
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
    if run.paces:
        facts["ceiling by engine"] = ", ".join(f"{name} {rate(pace)}" for name, pace in run.paces.items()) + " tokens/s"
    for name, value in facts.items():
        out.print(f"  {name}: {value}")


def _limit(limit: Limit | None, more: str = "") -> str:
    if limit is None:
        return "no rates are known of the device or its link: python -m launcher.probe measures those of this machine"
    return f"{rate(limit.tokens_per_s)} tokens/s, {seconds(limit.seconds)} a step, bound by {limit.bound}{more}"


def show_sweep(records: Sequence[dict[str, Any]], points: Sequence[Sequence[str]], out: Console) -> None:
    """Print one row a point of a sweep, whatever became of it."""
    table = Table("point", "status", "new tokens/s", "min … max", "ttft p50", "itl p50", "load", "parameters/device")
    for record, point in zip(records, points, strict=True):
        metric = (record.get("metrics") or {}).get("new_tokens_per_s") or {}
        parameters = [device["parameter_bytes"] for device in record["devices"]]
        held = [value for value in parameters if value is not None]
        table.add_row(
            escape(" ".join(point)),
            record["status"],
            rate(record.get("new_tokens_per_s")),
            f"{rate(metric.get('min'))} … {rate(metric.get('max'))}" if metric else "-",
            seconds(record.get("ttft_s")),
            seconds(record.get("itl_s")),
            seconds(record.get("load_s")),
            size(max(held)) if held else "-",
        )
    out.print(table)
