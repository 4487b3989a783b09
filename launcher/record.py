"""Rank files -> one record of what happened, and the completions in prompt order. Nothing measured is lost."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import prompts as prompt_sets
from launcher.files import read_json, read_lines, write_json, write_text
from launcher.progress import Progress, read_progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shards.errors import UserError

SCHEMA = 1
STATUSES = ("ok", "oom", "timeout", "hang", "failed", "refused", "cancelled")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the processes of a run ended, as their watcher saw it; a rank's own word goes before it."""

    status: str
    message: str = ""


def finish(run_dir: Path, outcome: Outcome | None = None) -> dict[str, Any]:
    """Gather the rank files of `run_dir` into `record.json` and `completions.jsonl`; both are replaced atomically."""
    run = read_json(run_dir / "run.json")
    ranks = [read_json(run_dir / f"rank_{rank}.json") for rank in range(run["processes"])]
    present = [rank for rank in ranks if rank is not None]
    status, error = _verdict(run_dir, ranks, outcome)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "status": status,
        "error": error,
        "backend": run["config"]["backend"]["name"],
        "model": run["config"]["model"]["name"],
        "precision": run["config"]["precision"],
        "world_size": run["world_size"],
        "num_nodes": run["config"]["num_nodes"],
        "run_dir": str(run_dir),
        "started_at": run["started_at"],
        "ended_at": time.time(),
        **_measures(present if status == "ok" else [], run["world_size"]),
        "ceiling": None,
        "devices": [device for rank in present for device in rank.get("devices", [])],
        "ranks": [_rank_summary(rank) for rank in present],
        "notes": run["notes"],
        "command": run["command"],
        "config": run["config"],
        "plan": read_json(run_dir / "plan.json"),
        "environment": next((rank["environment"] for rank in present if rank.get("environment")), None),
    }
    record["ceiling"] = against_ceiling(record["plan"], record["metrics"])
    _write_completions(run_dir, run["processes"])
    write_json(run_dir / "record.json", record)
    return record


def refused(config: dict[str, Any], error: UserError, moment: float) -> dict[str, Any]:
    """The record of a point that could not start."""
    said = _said(None, "plan", type(error).__name__, error.fact) | {"hint": error.hint}
    return {
        "schema": SCHEMA,
        "status": "refused",
        "error": said,
        "backend": config["backend"]["name"],
        "model": config["model"]["name"],
        "precision": config["precision"],
        "world_size": config["devices"] * config["num_nodes"],
        "run_dir": None,
        "started_at": moment,
        "ended_at": moment,
        **_measures([], 1),
        "devices": [],
        "config": config,
    }


def _verdict(
    run_dir: Path, ranks: Sequence[dict[str, Any] | None], outcome: Outcome | None
) -> tuple[str, dict[str, Any] | None]:
    """The status of the run and the error that explains it: of the rank that failed first, in its own words if any."""
    if all(rank is not None and rank["status"] == "ok" for rank in ranks):
        return "ok", None
    told = [rank for rank in ranks if rank is not None and rank["status"] not in ("ok", "cancelled")]
    first = min(told, key=lambda rank: rank["ended_at"]) if told else None
    if silent := _silent(run_dir, ranks):
        # A rank that vanished is the cause; what the others then saw (a broken connection) is the consequence.
        number, progress = min(silent, key=lambda item: item[1].time)
        seen = f"; rank {first['rank']} then saw {first['error']['type']}" if first else ""
        message = f"rank {number} ended without a word: killed, or crashed in native code{seen}"
        if outcome is None or outcome.status == "failed":
            return "failed", _said(number, progress.stage, "ProcessDied", message)
        return outcome.status, _said(number, progress.stage, "Ended", outcome.message)
    if first:
        return first["status"], {"rank": first["rank"], **first["error"]}
    cancelled = next((rank for rank in ranks if rank is not None and rank["status"] == "cancelled"), None)
    ended = outcome or Outcome("failed", "the processes ended before any rank began")
    if cancelled:
        message = ended.message or cancelled["error"]["message"]
        return ended.status, _said(cancelled["rank"], cancelled["error"]["stage"], "Ended", message)
    return ended.status, _said(None, "start", "Ended", ended.message)


def _silent(run_dir: Path, ranks: Sequence[dict[str, Any] | None]) -> list[tuple[int, Progress]]:
    """The ranks that had begun and left no last word, with where they were."""
    mute = [number for number, rank in enumerate(ranks) if rank is None]
    found = [(number, read_progress(run_dir / f"rank_{number}.progress")) for number in mute]
    return [(number, progress) for number, progress in found if progress is not None]


def _said(rank: int | None, stage: str, kind: str, message: str) -> dict[str, Any]:
    return {"rank": rank, "stage": stage, "type": kind, "message": message, "hint": ""}


def _rank_summary(rank: dict[str, Any]) -> dict[str, Any]:
    return {key: rank.get(key) for key in ("rank", "status", "host", "pid", "error", "load_s", "repeats")}


def _measures(ranks: Sequence[dict[str, Any]], world_size: int) -> dict[str, Any]:
    """The headline figures; None for all of them where the run did not finish."""
    if not ranks:
        names = ("load_s", "new_tokens_per_s", "ttft_s", "itl_s", "totals", "metrics")
        return dict.fromkeys(names)
    passes = [_pass(repeats) for repeats in zip(*(_answering(ranks)), strict=True)]
    metrics = {
        name: spread(one[name] for one in passes)
        for name in ("new_tokens_per_s", "prefill_tokens_per_s", "decode_tokens_per_s", "wall_s")
    }
    metrics["new_tokens_per_s_per_device"] = spread(one["new_tokens_per_s"] / world_size for one in passes)
    metrics["ttft_s"] = quantiles(value for rank in _answering(ranks) for repeat in rank for value in repeat["ttft_s"])
    metrics["itl_s"] = quantiles(value for rank in _answering(ranks) for repeat in rank for value in repeat["itl_s"])
    return {
        "load_s": max(rank["load_s"] for rank in ranks),
        "new_tokens_per_s": metrics["new_tokens_per_s"]["median"],
        "ttft_s": metrics["ttft_s"]["p50"],
        "itl_s": metrics["itl_s"]["p50"],
        "totals": {
            "repeats": len(passes),
            "prompts": passes[0]["completions"],
            "prompt_tokens": passes[0]["prompt_tokens"],
            "new_tokens": passes[0]["new_tokens"],
            "same_tokens_every_repeat": all(one["same_tokens"] for one in passes),
        },
        "metrics": metrics,
    }


def _answering(ranks: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The repeats of each rank that answers prompts of its own; of ranks that answer together, those of the first."""
    return [rank["repeats"] for rank in ranks if rank["answers"]]


def _pass(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One repeat over all ranks: tokens add up, the slowest rank sets the time."""
    total = {key: sum(one[key] for one in repeats) for key in ("completions", "prompt_tokens", "new_tokens")}
    wall_s = max(one["wall_s"] for one in repeats)
    phases = {
        name: None if any(one[name] is None for one in repeats) else max(one[name] for one in repeats)
        for name in ("prefill_s", "decode_s")
    }
    later = total["new_tokens"] - total["completions"]  # the first token of each prompt is prefill's
    return {
        **total,
        "wall_s": wall_s,
        "same_tokens": all(one["same_tokens"] for one in repeats),
        "new_tokens_per_s": total["new_tokens"] / wall_s,
        "prefill_tokens_per_s": total["prompt_tokens"] / phases["prefill_s"] if phases["prefill_s"] else None,
        "decode_tokens_per_s": later / phases["decode_s"] if phases["decode_s"] else None,
    }


def against_ceiling(plan: dict[str, Any] | None, metrics: dict[str, Any] | None) -> dict[str, Any]:
    """Measured decode speed as a share of what the machine allows by plan; over 1 a figure or a rate is wrong.

    A batch of the plan is one rank's where prompts are split over ranks: there the ceiling is of all ranks together.
    """
    limit = (plan or {}).get("limit")
    measured = metrics and (metrics["decode_tokens_per_s"]["median"] or metrics["new_tokens_per_s"]["median"])
    if limit is None or not measured:
        reason = "nothing was measured" if limit else "no rates are known of this machine: python -m launcher.probe"
        return {"decode_tokens_per_s": None, "bound": None, "share": None, "impossible": False, "reason": reason}
    share = measured / limit["tokens_per_s"]
    ceiling = {"decode_tokens_per_s": limit["tokens_per_s"], "bound": limit["bound"]}
    return {**ceiling, "share": share, "impossible": share > 1}


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Median, extremes and the raw values over the repeats; a value that does not exist makes all of them None."""
    raw = list(values)
    known = [value for value in raw if value is not None]
    if not known or len(known) < len(raw):
        reason = "continuous batching interleaves prefill and decode, or nothing was decoded"
        return {"median": None, "min": None, "max": None, "values": raw, "reason": reason}
    return {"median": statistics.median(known), "min": min(known), "max": max(known), "values": raw}


def quantiles(values: Iterable[float]) -> dict[str, Any]:
    """p50, p90 and p99 by linear interpolation, with the count; None where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return {"p50": None, "p90": None, "p99": None, "count": 0, "reason": "no such value was measured"}

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "count": len(ordered)}


def _write_completions(run_dir: Path, processes: int) -> None:
    """`completions.jsonl` in prompt order from what the ranks have saved so far."""
    saved = (run_dir / f"rank_{rank}.completions.jsonl" for rank in range(processes))
    made = {row["index"]: row for path in saved for row in read_lines(path)}
    if not made:
        return
    folder = read_json(run_dir / "run.json")["model_folder"]
    prompts = {prompt.index: prompt for prompt in prompt_sets.read_prompts(run_dir / "prompts.jsonl")}
    rows = [made[index] for index in sorted(made)]
    texts = prompt_sets.decode([row["token_ids"] for row in rows], Path(folder) if folder else None)
    lines = [_line(prompts[row["index"]], row, text) for row, text in zip(rows, texts, strict=True)]
    write_text(run_dir / "completions.jsonl", "".join(lines))


def _line(prompt: Any, row: dict[str, Any], text: str) -> str:
    value = {
        "index": prompt.index,
        "prompt": prompt.text,
        "text": text,
        "token_ids": row["token_ids"],
        "prompt_tokens": len(prompt.token_ids),
        "new_tokens": len(row["token_ids"]),
        "finish_reason": row["finish_reason"],
        "top2_gaps": row["top2_gaps"],
    }
    return json.dumps(value, ensure_ascii=False) + "\n"
