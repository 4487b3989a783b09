"""Runs as flat rows with a column for each swept key: for CSV, JSON, Markdown and the page."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from launcher.config.values import flat
from launcher.report.run.load_rows import LOAD_PARTS
from launcher.system.files import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from launcher.results.measured import Metrics
    from launcher.results.record import Record
    from shards.untrusted_files import JsonObject

Row = dict[str, Any]

NOT_SWEPT = {"run_dir", "output_dir", "resume", "model.config"}
"""Keys of a configuration that may differ between runs, but never count as swept."""

CSV, JSON = "sweep.csv", "sweep.json"


def rows_of(records: Sequence[Record]) -> list[Row]:
    """A row for each record. A figure that was not measured is None; columns are the same in all rows."""
    swept = swept_keys(records)
    return [_row(record, swept) for record in records]


def swept_keys(records: Sequence[Record]) -> tuple[str, ...]:
    """The dotted keys whose values differ between the configurations of the runs."""
    flat = [flat_values(record.config) for record in records]
    keys = dict.fromkeys(key for values in flat for key in values)
    differing = [key for key in keys if len({json.dumps(values.get(key)) for values in flat}) > 1]
    names = {key.removesuffix(".name") for key in differing if key.endswith(".name")}
    # If the option of a group differs (backend=vllm), its other keys differ as a consequence and are not swept.
    return tuple(key for key in differing if key.rpartition(".")[0] not in names or key.endswith(".name"))


def flat_values(config: JsonObject) -> JsonObject:
    """The values of a nested configuration by dotted keys, without keys that are never swept."""
    settings = {name: value for name, value in flat(config).items() if name not in NOT_SWEPT}
    return {name: value for name, value in settings.items() if not name.startswith("model.config.")}


def label_of(record: Record, swept: Sequence[str]) -> str:
    """A short name of a run: the values of the swept keys, or engine, model and devices without any."""
    values = flat_values(record.config)
    parts = [f"{key.removesuffix('.name').rpartition('.')[2]}={values.get(key)}" for key in swept]
    return " ".join(parts) or f"{record.backend} {record.model} x{record.num_devices}"


def unique(labels: Sequence[str]) -> list[str]:
    """The labels, with a number added to those that occur several times."""
    seen: dict[str, int] = defaultdict(int)
    numbered = []
    for label in labels:
        seen[label] += 1
        count = seen[label]
        if count > 1:
            label = f"{label} ({count})"
        numbered.append(label)
    return numbered


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns of the rows, which are the same in all of them."""
    return list(next(iter(rows), {}))


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV with a heading; a figure that was not measured is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def markdown_text(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, without empty columns."""
    columns = [key for key in columns_of(rows) if any(row[key] is not None for row in rows)]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        lines.append(f"| {' | '.join(_cell(row[key]) for key in columns)} |")
    return "\n".join(lines) + "\n"


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Write the rows to `sweep.csv` and `sweep.json` in a folder."""
    write_text(folder / CSV, csv_text(rows))
    write_text(folder / JSON, json.dumps(rows, indent=1) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _row(record: Record, swept: Sequence[str]) -> Row:
    values = flat_values(record.config)
    metrics, totals, ceiling, mbu = record.metrics, record.totals, record.ceiling, record.mbu
    speed, guesses = record.speed, metrics and metrics.speculation
    row: Row = {}
    for key in swept:
        row[key] = values.get(key)
        if isinstance(row[key], list | dict):
            row[key] = json.dumps(row[key])
    row |= {
        "status": record.status,
        "backend": record.backend,
        "model": record.model,
        "precision": record.precision,
        "perplexity": record.quality and record.quality.perplexity,
        "num_devices": record.num_devices,
        "num_nodes": record.num_nodes,
        "batch_size": record.batch_size,
        "prompts": totals and totals.prompts,
        "prompt_tokens": totals and totals.prompt_tokens,
        "new_tokens": totals and totals.new_tokens,
        "repeats": totals and totals.repeats,
        "new_tokens_per_s": speed and speed.median,
        "new_tokens_per_s_min": speed and speed.min,
        "new_tokens_per_s_max": speed and speed.max,
        "new_tokens_per_s_per_device": metrics and metrics.new_tokens_per_s_per_device.median,
        "prefill_tokens_per_s": metrics and metrics.prefill_tokens_per_s.median,
        "decode_tokens_per_s": metrics and metrics.decode_tokens_per_s.median,
        **_quantiles("ttft_s", metrics),
        **_quantiles("itl_s", metrics),
        "accepted_guesses": guesses and guesses.acceptance.median,
        "tokens_per_step": guesses and guesses.tokens_per_step.median,
        "load_s": record.load_s,
        **{f"load_{name}": record.load_times and getattr(record.load_times, name) for name in LOAD_PARTS},
        "ceiling_tokens_per_s": ceiling and ceiling.tokens_per_s,
        "ceiling_share": ceiling and ceiling.share,
        "ceiling_bound": ceiling and ceiling.bound,
        "mbu": mbu and mbu.share,
        "user_s": record.cost and record.cost.user_s,
        "system_s": record.cost and record.cost.system_s,
        "joules_per_token": record.cost and record.cost.joules_per_token,
        "watts": record.cost and record.cost.watts,
        "cost_per_million_tokens": record.cost and record.cost.per_million_tokens,
    }
    for name in ("parameter_bytes", "kv_cache_bytes", "kv_cache_reserved_bytes", "peak_allocated_bytes"):
        known = [getattr(device, name) for device in record.devices if getattr(device, name) is not None]
        row[f"{name}_most"] = max(known, default=None)
    row["started_at"] = record.started_at
    row["run_dir"] = record.run_dir
    row["error"] = record.error and record.error.message
    return row


def _quantiles(name: str, metrics: Metrics | None) -> Row:
    quantiles = getattr(metrics, name, None)
    return {f"{name}_{part}": getattr(quantiles, part, None) for part in ("p50", "p90", "p99")}
