"""The plan of one run, as a dry run shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from launcher.config.machine import how_to_know_rates
from launcher.report.layout import counted, fitted
from launcher.report.run.lengths import lengths_line
from launcher.report.run.speculation import draft_facts
from launcher.report.units import rate, seconds, size

if TYPE_CHECKING:
    from rich.console import Console

    from launcher.config.schema import RunConfig
    from launcher.run_dir.run import Run
    from shards.plan.roofline import Limit
    from shards.untrusted_files import JsonObject


def show_plan(run: Run, out: Console) -> None:
    """Print what a run would use on each device, and its speed limit if the device is known."""
    plan, names = run.plan, f"{run.config.backend.name} · {escape(run.config.model.name)}"
    if plan is not None:
        names += f" · {plan.num_parameters:,} parameters"
    out.print(f"[bold]plan: {names}[/]")
    for note in run.notes:
        out.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    out.print(f"  {lengths_line(run.prompts)}", soft_wrap=True)
    if plan is not None:
        rows = []
        for device in plan.devices:
            cache = max(device.kv_cache_bytes, device.kv_cache_reserved_bytes)
            parts = (device.parameter_bytes, cache, device.activation_bytes, device.buffer_bytes, device.overhead_bytes)
            rows.append([str(device.rank), *map(size, parts), size(device.capacity_bytes), size(device.free_bytes)])
        columns = ("rank", "parameters", "KV cache", "activations", "buffers", "overhead", "capacity", "free")
        out.print(fitted(out, columns, rows, optional=("buffers", "activations", "overhead")))
        on_host = "not known"
        if plan.load_host_bytes is not None:
            on_host = size(plan.load_host_bytes)
        facts: JsonObject = {
            "device": plan.device_name,
            "KV cache a token": f"{plan.kv_bytes_per_token:,} bytes",
            "peak while loading": f"{on_host} on a node's host, {size(plan.load_device_bytes)} on a device",
            **draft_facts(plan),
            "largest batch": plan.largest_batch or "not bounded by a known capacity",
            "longest context": plan.longest_context,
            "smallest number of devices": plan.smallest_devices or "not bounded by a known capacity",
            "decode ceiling": _limit(plan.limit, run.config, ", if every answer has its full length"),
            "prefill ceiling": _limit(plan.prefill_limit, run.config),
        }
        if plan.offload:
            storage, nbytes = {"cpu": "main memory"}.get(plan.offload, "files"), plan.devices[0].offloaded_bytes
            facts["offloaded"] = f"{size(nbytes)} of each device in {storage}, read in each step"
        for name, value in facts.items():
            out.print(f"  {name}: {value}", soft_wrap=True)
    if run.paces:
        ceilings = ", ".join(f"{name} {rate(pace)}" for name, pace in run.paces.items())
        at_once = counted(run.at_once, "prompt")
        out.print(f"  ceiling by engine, {at_once} at a time: {ceilings} tokens/s", soft_wrap=True)


def _limit(limit: Limit | None, config: RunConfig, more: str = "") -> str:
    if limit is None:
        return f"no rates are known of the device or its link: {how_to_know_rates(config)}"
    return f"{rate(limit.tokens_per_s)} tokens/s, {seconds(limit.seconds)} a step, bound by {limit.bound}{more}"
