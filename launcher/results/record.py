"""Rank files -> one record of what happened, and the completions in prompt order. Nothing measured is lost.

A run may take several attempts: interrupted or killed, it goes on later in the same directory. What each attempt made
is in `attempts` of the record: its hosts, how it ended, and its repeats of the prompt set. Completions are those that
were saved first, whichever attempt made them. The headline figures are medians over whole repeats only, each timed
within one attempt; with none, `partial` says of how many prompts they are. `load_s`, `ranks`, `devices` and
`environment` are of the last attempt; `notes` are of the run and the last attempt.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.prompts import prompts as prompt_sets
from launcher.results.metrics import against_ceiling, bandwidth_used, measures, total
from launcher.results.verdict import Outcome, said, verdict
from launcher.run_dir import attempts
from launcher.system.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.backends.base import Prompt
    from shards.errors import UserError

SCHEMA = 1


def finish(run_dir: Path, outcome: Outcome | None = None) -> dict[str, Any]:
    """Gather the rank files of `run_dir` into `record.json` and `completions.jsonl`; both are replaced atomically."""
    run = read_json(run_dir / "run.json")
    ranks = [read_json(run_dir / f"rank_{rank}.json") for rank in range(run["processes"])]
    present = [rank for rank in ranks if rank is not None]
    status, error = verdict(run_dir, ranks, outcome)
    prompts = prompt_sets.read_prompts(run_dir / "prompts.jsonl")
    folders = [*attempts.folders(run_dir), (attempts.newest(run_dir), run_dir)]
    repeats = {number: attempts.repeats_in(folder, attempts.answering(run)) for number, folder in folders}
    plan = read_json(run_dir / "plan.json")
    counted = [ranks for made in repeats.values() for ranks in made.values()] if status == "ok" else []
    record = blank(run["config"], status, error) | {
        "run_dir": str(run_dir),
        "started_at": run["started_at"],
        "ended_at": time.time(),
        "load_s": max(rank["load_s"] for rank in present) if status == "ok" else None,
        **measures(counted, len(prompts), run["world_size"], (plan or {}).get("windows", ())),
        "devices": [device for rank in present for device in rank.get("devices", [])],
        "ranks": [_rank_summary(rank) for rank in present],
        "attempts": [_attempt(number, folder, run, repeats[number]) for number, folder in folders],
        "batch_search": run.get("batch_search"),
        "notes": [*run["notes"], *_notes(run_dir)],
        "command": run["command"],
        "plan": plan,
        "environment": next((rank["environment"] for rank in present if rank.get("environment")), None),
    }
    record["ceiling"] = against_ceiling(record["plan"], record["metrics"])
    record["mbu"] = bandwidth_used(record["plan"], record["metrics"])
    record["attempts"][-1]["status"] = status
    _write_completions(run_dir, run, prompts)
    write_json(run_dir / "record.json", record)
    return record


def refused(config: dict[str, Any], error: UserError, moment: float, run_dir: Path | None = None) -> dict[str, Any]:
    """The record of a point that could not start."""
    why = said(None, "plan", type(error).__name__, error.fact, error.hint)
    place = str(run_dir) if run_dir else None
    return blank(config, "refused", why) | {"run_dir": place, "started_at": moment, "ended_at": moment}


def never_begun(config: dict[str, Any], message: str, moment: float) -> dict[str, Any]:
    """The record of a point whose turn never came."""
    why = said(None, "start", "Ended", message, "resume=true")
    return blank(config, "cancelled", why) | {"started_at": moment, "ended_at": moment}


def unfinished(run_dir: Path, status: str) -> dict[str, Any]:
    """What stands for the record of a run that has none yet."""
    run = read_json(run_dir / "run.json")
    names = ("started_at", "batch_search", "notes", "command")
    return blank(run["config"], status) | {"run_dir": str(run_dir)} | {name: run.get(name) for name in names}


def blank(config: dict[str, Any], status: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
    """A record with all its keys, of a run of which nothing more is known."""
    return {
        "schema": SCHEMA,
        "status": status,
        "error": error,
        "backend": config["backend"]["name"],
        "model": config["model"]["name"],
        "precision": config["precision"],
        "world_size": config["devices"] * config["num_nodes"],
        "num_nodes": config["num_nodes"],
        "run_dir": None,
        "started_at": None,
        "ended_at": None,
        "load_s": None,
        **measures([], 0, 1),
        "ceiling": None,
        "mbu": None,
        "devices": [],
        "ranks": [],
        "attempts": [],
        "batch_search": None,
        "notes": [],
        "command": [],
        "config": config,
        "plan": None,
        "environment": None,
    }


def _rank_summary(rank: dict[str, Any]) -> dict[str, Any]:
    return {key: rank.get(key) for key in ("rank", "status", "host", "pid", "error", "load_s", "repeats")}


def _attempt(number: int, folder: Path, run: dict[str, Any], made: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """What became of one attempt, and the repeats that it finished."""
    ranks = [read_json(folder / f"rank_{rank}.json") for rank in range(run["processes"])]
    names = ("completions", "new_tokens", "wall_s", "new_tokens_per_s")
    totals = {place: total(measured) for place, measured in made.items()}
    return {
        "attempt": number,
        "status": (read_json(folder / "record.json") or {"status": None})["status"],
        "hosts": sorted({rank["host"] for rank in ranks if rank is not None}),
        "notes": _notes(folder),
        "repeats": [{"repeat": place + 1} | {name: one[name] for name in names} for place, one in totals.items()],
    }


def _notes(folder: Path) -> list[str]:
    """What was found before the ranks of one attempt began."""
    return read_json(folder / attempts.NOTES) or []


def _write_completions(run_dir: Path, run: dict[str, Any], prompts: Sequence[Prompt]) -> None:
    """`completions.jsonl` in prompt order from what this attempt and those before it have saved so far."""
    made: dict[int, dict[str, Any]] = {}
    for row in (*attempts.saved(run_dir).rows, *attempts.completions_in(run_dir, attempts.answering(run))):
        made.setdefault(row["index"], row)
    if not made:
        return
    folder = run["model_folder"]
    asked = {prompt.index: prompt for prompt in prompts}
    rows = [made[index] for index in sorted(made)]
    texts = prompt_sets.decode([row["token_ids"] for row in rows], Path(folder) if folder else None)
    lines = [_line(asked[row["index"]], row, text) for row, text in zip(rows, texts, strict=True)]
    write_text(run_dir / "completions.jsonl", "".join(lines))


def _line(prompt: Prompt, row: dict[str, Any], text: str) -> str:
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
