"""kill -9 of the launching process, a rank, or everything, after each write: no result is lost, no process is left."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from running import Process, launcher, start

from launcher.prompts.prompts import read_prompts
from launcher.run_dir.progress import read_progress
from launcher.run_dir.run_dir import RunDir
from launcher.system.files import read_lines
from launcher.system.processes import end_run, of_run

SEED = 20240601
AT_ONCE = 3
PROMPTS = 30
RUN = (
    "backend=dummy", "backend.step_s=0.002", "prompts=synthetic", f"prompts.count={PROMPTS}", "prompts.output_tokens=8",
    "measure.batch_size=1", "measure.repeats=2",
)  # fmt: skip
GONE_S = 20.0


def run_dir_of(out: Path) -> Path | None:
    return next((path.parent for path in out.glob("*/run.json")), None)


def mark_of(run_dir: Path) -> str:
    return RunDir(run_dir).mark


def kill_parent(process: Process, out: Path) -> None:
    process.kill()


def kill_rank(process: Process, out: Path) -> None:
    run_dir = run_dir_of(out)
    progress = read_progress(run_dir / "rank_0.progress") if run_dir else None
    if run_dir and progress and progress.pid in {living.pid for living in of_run(mark_of(run_dir))}:
        os.kill(progress.pid, signal.SIGKILL)


def kill_everything(process: Process, out: Path) -> None:
    process.kill()
    run_dir = run_dir_of(out)
    for living in of_run(mark_of(run_dir)) if run_dir else []:
        with suppress(Exception):
            living.kill()


Kill = Callable[[Process, Path], None]
KILLS: tuple[Kill, ...] = (kill_parent, kill_rank, kill_everything)
WRITES: dict[str, tuple[float, tuple[Kill, ...]]] = {
    "run.json": (0.01, KILLS[:1]),
    "attempt.json": (0.01, KILLS[:1]),
    "launch.log": (0.1, (kill_parent, kill_everything)),
    "rank_0.progress": (0.2, KILLS),
    "rank_0.completions.jsonl": (0.5, KILLS),
    "rank_0.repeats.jsonl": (0.5, KILLS),
    "rank_0.json": (0.01, KILLS),
    "completions.jsonl": (0.01, KILLS[:1]),
    "record.json": (0.01, KILLS[:1]),
}
"""The files that a run writes, in order: the most seconds from the write to the kill, and what is killed."""
ROUNDS = [(1, write, kill) for write, (_, kills) in WRITES.items() for kill in kills] + [
    (2, "launch.log", kill_everything),
    (2, "rank_0.completions.jsonl", kill_parent),
    (2, "rank_0.completions.jsonl", kill_rank),
    (2, "rank_0.repeats.jsonl", kill_everything),
]


def check_what_is_left(out: Path) -> None:
    """Check that all files of the run directory can be read, and that no process is left."""
    run_dir = run_dir_of(out)
    if run_dir is None:
        return
    deadline = time.monotonic() + GONE_S
    while left := of_run(mark_of(run_dir)):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    for path in run_dir.rglob("*.json"):
        json.loads(path.read_text())
    for path in run_dir.rglob("*.jsonl"):
        read_lines(path)
    if (run_dir / "record.json").exists():
        record = json.loads((run_dir / "record.json").read_text())
        assert record["status"] in ("ok", "failed", "cancelled"), record["error"]
        saved = {row["index"] for path in run_dir.rglob("rank_*.completions.jsonl") for row in read_lines(path)}
        assert saved == {row["index"] for row in read_lines(run_dir / "completions.jsonl")}


def check_resumed(out: Path) -> dict[str, Any]:
    """Resume the run, and check that it has every completion once, each with the tokens of the dummy engine."""
    ended = launcher(*RUN, *devices_of(out), f"output_dir={out}", "resume=true")
    assert ended.code == 0, ended.err
    run_dir = Path(ended.last_json["run_dir"])
    rows = read_lines(run_dir / "completions.jsonl")
    asked = read_prompts(run_dir / "prompts.jsonl")
    assert [row["index"] for row in rows] == list(range(PROMPTS))
    for row, prompt in zip(rows, asked, strict=True):
        assert row["token_ids"] == [(prompt.token_ids[-1] + step) % 256 for step in range(1, 9)]
    saved = sorted(row["index"] for path in run_dir.rglob("rank_*.completions.jsonl") for row in read_lines(path))
    assert saved == list(range(PROMPTS)), "a prompt was answered twice"
    assert of_run(mark_of(run_dir)) == []
    return dict(json.loads((run_dir / "record.json").read_text()))


def devices_of(out: Path) -> tuple[str, ...]:
    return (f"devices={out.name.rpartition('_')[2]}",)


def one_round(out: Path, write: str, kill: Kill, later_s: float) -> str:
    """Start a run, kill a part of it, check what is left, and finish it."""
    process = start([sys.executable, "-m", "launcher", *RUN, *devices_of(out), f"output_dir={out}"])
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob(f"*/{write}")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(later_s)
        kill(process, out)
        process.wait(timeout=60)
        check_what_is_left(out)
        record = check_resumed(out)
        return f"{write}, {kill.__name__}, {len(record['attempts'])} attempts"
    finally:
        process.kill()
        process.wait()
        if run_dir := run_dir_of(out):
            end_run(mark_of(run_dir))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_anywhere_can_be_finished(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    rounds = []
    for number, (devices, write, kill) in enumerate(ROUNDS):
        out = tmp_path / f"{number}_{devices}"
        out.mkdir()
        rounds.append((out, write, kill, draw.uniform(0, WRITES[write][0])))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        became = list(pool.map(lambda one: one_round(*one), rounds))
    assert sum(text.endswith("2 attempts") for text in became) > len(ROUNDS) / 2, became
