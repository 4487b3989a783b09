"""A stopped run continues where it was: no prompt twice, none lost, the tokens of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from described import described
from running import ROOT, Process, environment, launcher, start, torchrun

from launcher.backends.base import Prompt
from launcher.composition.compose import compose_run
from launcher.launch.run import run_local
from launcher.prepare.prepare import prepare
from launcher.rank.loop import schedule
from launcher.results.completions import Saved, SavedCompletion
from launcher.run_dir import attempts
from launcher.run_dir.lifecycle import create_run_dir
from launcher.run_dir.progress import read_progress
from launcher.run_dir.run_dir import RunDir, SupersededError
from launcher.system.files import read_lines
from launcher.system.processes import end_run, of_run
from shards.machine.world import World

PROMPTS = tuple(Prompt(index, f"prompt {index}", (index + 1, 2)) for index in range(10))
RAGGED = f"prompts.path={ROOT / 'tests' / 'ragged_prompts.txt'}"  # 20 prompts
DUMMY = ("backend=dummy", "prompts=file", RAGGED, "measure.batch_size=1", "sampling.max_new_tokens=8")


def rows(*indices: int) -> tuple[SavedCompletion, ...]:
    return tuple(SavedCompletion(index, (index,), "length") for index in indices)


def planned(rank: int, saved: Saved, *overrides: str) -> list[tuple[int, list[list[int]]]]:
    """For each remaining repeat of one of two ranks: its number, and the prompt indices of each batch."""
    config = compose_run(["backend=dummy", "measure.batch_size=2", "measure.repeats=2", *overrides])
    world = World(rank=rank, local_rank=rank, world_size=2, local_world_size=2)
    made = schedule(PROMPTS, world, config, saved)
    return [(number, [[prompt.index for prompt in batch] for batch in batches]) for number, batches in made]


WHOLE = [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7], [9]]]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_undisturbed_run_answers_all_in_each_repeat(rank: int) -> None:
    assert planned(rank, Saved()) == [(0, WHOLE[rank]), (1, WHOLE[rank])]


@pytest.mark.parametrize(
    ("rank", "batches"), [(0, [[6], [8]]), (1, [[5, 7], []])], ids=["the rank that was slower", "the faster one"]
)
def test_the_first_repeat_keeps_its_batches_without_what_is_saved(rank: int, batches: list[list[int]]) -> None:
    saved = Saved(rows(0, 1, 2, 3, 4, 9))
    assert planned(rank, saved) == [(0, batches), (1, WHOLE[rank])]


@pytest.mark.parametrize(
    ("saved", "repeats", "numbers"),
    [
        (Saved(rows(*range(10)), (0,)), 2, [1]),
        (Saved(rows(*range(10))), 2, [1]),
        (Saved(rows(*range(10)), (0, 1)), 2, []),
        (Saved(rows(*range(10))), 1, [0]),
    ],
    ids=["the repeats that are left", "nothing missing", "all done", "only the measure is missing"],
)
def test_repeats_are_not_made_again(saved: Saved, repeats: int, numbers: list[int]) -> None:
    assert planned(0, saved, f"measure.repeats={repeats}") == [(number, WHOLE[0]) for number in numbers]


def run_dir_with(folder: Path, ranks: int) -> RunDir:
    run_dir = RunDir(folder)
    run_dir.write_run(described(world_size=ranks, num_devices=ranks))
    return run_dir


def repeat(number: int) -> str:
    """A line of a rank's file of measured repeats."""
    counts = dict.fromkeys(("completions", "prompt_tokens", "new_tokens", "decode_steps"), 1)
    times = {"wall_s": 1.0, "prefill_s": None, "decode_s": None, "lengths": [], "ttft_s": [], "itl_s": []}
    return json.dumps({"number": number, "same_tokens": True, **counts, **times}) + "\n"


def test_an_attempt_sets_aside_what_the_last_one_left(tmp_path: Path) -> None:
    run_dir = run_dir_with(tmp_path, 2)
    assert attempts.begin(run_dir) == 1
    line = '{"index": 0, "token_ids": [7], "finish_reason": "stop"}\n'
    (tmp_path / "rank_0.completions.jsonl").write_text(line + '{"index": 2, "tok')
    (tmp_path / "rank_1.completions.jsonl").write_text(line.replace("0", "1", 1).replace("7", "8"))
    (tmp_path / "rank_0.repeats.jsonl").write_text(repeat(0) + repeat(1))
    (tmp_path / "rank_1.repeats.jsonl").write_text(repeat(0) + repeat(1)[:20])
    (tmp_path / ".record.json.host.12").write_text("half")
    assert attempts.begin(run_dir) == 2
    expected = Saved((SavedCompletion(0, (7,), "stop"), SavedCompletion(1, (8,), "stop")), (0,))
    assert run_dir.read_saved() == expected
    assert sorted(path.name for path in tmp_path.glob("rank_*")) == []
    assert len(list((tmp_path / "attempt_1").iterdir())) == 4
    assert not (tmp_path / ".record.json.host.12").exists()
    assert attempts.begin(run_dir) == 3
    assert run_dir.read_saved() == expected


def test_a_late_rank_writes_nothing(tmp_path: Path) -> None:
    run_dir = run_dir_with(tmp_path, 1)
    attempts.begin(run_dir)
    attempts.begin(run_dir)
    with pytest.raises(SupersededError):
        run_dir.check_attempt(1)
    run_dir.check_attempt(2)
    worker = [sys.executable, "-m", "launcher.rank.worker", str(run_dir)]
    subprocess.run(worker, env=environment(LAUNCHER_ATTEMPT="1"), check=False, timeout=60)
    assert {path.name for path in tmp_path.glob("rank_*")} == {"rank_0.log"}


@contextmanager
def begun(out: Path, *overrides: str, **extra: str) -> Iterator[tuple[Process, Path]]:
    """A run that has saved its first completions; processes that the test leaves are ended on exit."""
    process = start([sys.executable, "-m", "launcher", f"output_dir={out}", *overrides], **extra)
    try:
        deadline = time.monotonic() + 90
        while not list(out.glob("*/rank_0.completions.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process, next(out.iterdir())
    finally:
        process.kill()
        process.communicate()
        for path in out.glob("*/run.json"):
            end_run(RunDir(path.parent).mark)


def record_of(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "record.json").read_text()))


def answers(run_dir: Path) -> list[dict[str, Any]]:
    names = ("index", "text", "token_ids", "finish_reason")
    return [{name: row[name] for name in names} for row in read_lines(run_dir / "completions.jsonl")]


def saved_by(run_dir: Path) -> list[int]:
    """The prompt indices of all lines that any rank saved in any attempt."""
    return sorted(row["index"] for path in run_dir.rglob("rank_*.completions.jsonl") for row in read_lines(path))


def finished(out: Path, *overrides: str) -> Path:
    ended = launcher(f"output_dir={out}", *overrides)
    assert ended.code == 0, ended.err
    [run_dir] = out.iterdir()
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "repeats"),
    [
        ((*DUMMY, "devices=1", "backend.step_s=0.02", "measure.repeats=1"), 1),
        ((*DUMMY, "devices=2", "backend.step_s=0.02", "measure.repeats=2"), 2),
        (
            (
                "backend=fsdp", "prompts=file", RAGGED, "measure.batch_size=2", "measure.repeats=1",
                "sampling.temperature=0.8", "sampling.max_new_tokens=48", "sampling.ignore_eos=true",
            ),
            1,
        ),
    ],
    ids=["one rank", "two ranks", "fsdp sampled"],
)  # fmt: skip
def test_an_interrupted_run_goes_on(overrides: tuple[str, ...], repeats: int, tmp_path: Path) -> None:
    with begun(tmp_path / "stopped", *overrides) as (process, run_dir):
        process.send_signal(signal.SIGUSR1)
        _, err = process.communicate(timeout=60)
    first = record_of(run_dir)
    assert (process.returncode, first["status"], first["error"]["message"]) == (1, "cancelled", "received SIGUSR1")
    assert "cancelled: rank " in err
    assert f"To continue: python -m launcher resume=true run_dir={run_dir}" in err
    before = len(answers(run_dir))
    assert 0 < before < 20
    assert of_run(RunDir(run_dir).mark) == []

    assert finished(tmp_path / "stopped", *overrides, "resume=true") == run_dir
    at_once = ("backend.step_s=0",) if "backend=dummy" in overrides else ()
    undisturbed = finished(tmp_path / "undisturbed", *overrides, *at_once)
    assert answers(run_dir) == answers(undisturbed)
    assert saved_by(run_dir) == list(range(20))

    record = record_of(run_dir)
    assert [one["status"] for one in record["attempts"]] == ["cancelled", "ok"]
    made = [one["completions"] for one in record["attempts"][1]["repeats"]]
    assert made == [20 - before, 20][:repeats]
    if repeats == 1:
        assert record["partial"] == {"prompts": 20 - before, "of": 20}
        assert record["totals"]["prompts"] == 20 - before
    else:
        assert record["partial"] is None
        assert (record["totals"]["prompts"], record["totals"]["repeats"]) == (20, repeats - 1)
    assert record["totals"]["same_tokens_every_repeat"]


@pytest.mark.slow
def test_a_rank_that_cannot_end_in_time_is_ended(tmp_path: Path) -> None:
    hang = ("backend.fail_at=hang", "backend.fail_after=3", "backend.step_s=0.05")
    with begun(tmp_path, *DUMMY, *hang) as (process, run_dir):
        time.sleep(2)
        process.send_signal(signal.SIGUSR1)
        start = time.monotonic()
        process.communicate(timeout=60)
        assert time.monotonic() - start < 20
    record = record_of(run_dir)
    assert (record["status"], record["error"]["message"]) == ("cancelled", "received SIGUSR1")
    assert [rank["status"] for rank in record["ranks"]] == ["interrupted", "interrupted"]
    assert record["ranks"][1]["error"]["stage"] == "repeat 1/3 batch 3/10"


@pytest.mark.slow
def test_sigterm_can_be_a_notice(tmp_path: Path) -> None:
    slow = (*DUMMY, "devices=1", "backend.step_s=0.05", "measure.repeats=1")
    with begun(tmp_path, *slow, LAUNCHER_ON_TERM="interrupt") as (process, run_dir):
        progress = read_progress(run_dir / "rank_0.progress")
        assert progress is not None
        os.kill(progress.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    record = record_of(run_dir)
    assert (record["status"], record["ranks"][0]["status"]) == ("cancelled", "interrupted")
    assert record["error"]["message"] == "received SIGTERM"


@pytest.mark.slow
def test_what_is_done_is_reported_again(tmp_path: Path) -> None:
    run_dir = finished(tmp_path, *DUMMY, "devices=1")
    written = (run_dir / "record.json").stat().st_mtime_ns
    again = launcher(f"output_dir={tmp_path}", *DUMMY, "devices=1", "resume=true", "hang_timeout_s=99")
    assert (again.code, again.last_json["run_dir"]) == (0, str(run_dir))
    assert "and was not repeated: resume=true shows its result" in again.out
    assert (run_dir / "record.json").stat().st_mtime_ns == written
    by_name = launcher("resume=true", f"run_dir={run_dir}")
    assert by_name.last_json == again.last_json
    other = launcher(f"output_dir={tmp_path}", *DUMMY, "devices=1", "resume=true", "seed=1")
    assert (other.code, len(list(tmp_path.iterdir()))) == (0, 2)


@pytest.mark.slow
def test_ranks_of_torchrun_go_on_too(tmp_path: Path) -> None:
    command = ("-m", "launcher", *DUMMY, "measure.repeats=1", f"output_dir={tmp_path}")
    failed = torchrun(2, *command, "backend.fail_at=generate", "backend.fail_after=4")
    assert failed.code == 1
    [run_dir] = tmp_path.iterdir()
    config = json.loads((run_dir / "run.json").read_text())
    config["config"]["backend"] |= {"fail_at": "", "fail_after": 0}  # the cause of the failure is fixed
    (run_dir / "run.json").write_text(json.dumps(config))
    before = len(answers(run_dir))
    assert 0 < before < 20
    assert torchrun(2, *command, "resume=true").code == 0
    assert saved_by(run_dir) == list(range(20))
    again = torchrun(2, *command, "resume=true")
    assert (again.code, again.last_json["run_dir"]) == (0, str(run_dir))


@pytest.mark.slow
def test_what_was_found_on_the_devices_is_kept_with_its_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_run(["backend=dummy", "devices=1", "accelerator=cpu", f"output_dir={tmp_path}"])
    run_dir = create_run_dir(replace(prepare(config, ()), on_cuda=True, notes=("of the run",)))
    for notes in (["first"], ["second"], []):
        monkeypatch.setattr("launcher.launch.run.neighbours", lambda *_, notes=notes: notes)
        record = run_local(run_dir, lambda ranks: None)
        assert (record.status, record.notes) == ("ok", ("of the run", *notes))
    assert [attempt.notes for attempt in record.attempts] == [("first",), ("second",), ()]


@pytest.mark.slow
def test_two_processes_do_not_run_the_same(tmp_path: Path) -> None:
    slow = (*DUMMY, "devices=1", "backend.step_s=0.05")
    with begun(tmp_path, *slow) as (_, run_dir):
        ended = launcher(f"output_dir={tmp_path}", *slow, "resume=true")
        assert ended.code == 2
        assert ended.err == f"{run_dir} is running: another process has launched it. HINT: wait for its end\n"


@pytest.mark.slow
def test_a_sweep_skips_what_is_done(tmp_path: Path) -> None:
    sweep = ("-m", *DUMMY, "devices=1", f"output_dir={tmp_path}", "resume=true")
    first = launcher(*sweep, "seed=0,1")
    second = launcher(*sweep, "seed=0,1,2", "sampling.max_new_tokens=8,5000")
    assert (first.code, second.code) == (0, 1)
    assert [row["status"] for row in second.last_json["records"]] == ["ok", "refused"] * 3
    was = [row["run_dir"] for row in first.last_json["records"]]
    assert [row["run_dir"] for row in second.last_json["records"]][:3:2] == was
    assert len(list(tmp_path.glob("*/record.json"))) == 6
    again = launcher(*sweep, "seed=0,1,2", "sampling.max_new_tokens=8,5000")
    assert again.last_json == second.last_json
    assert len(list(tmp_path.glob("*/record.json"))) == 6


@pytest.mark.slow
def test_an_interrupted_sweep_starts_no_further_points(tmp_path: Path) -> None:
    sweep = ("-m", *DUMMY, "devices=1", "backend.step_s=0.02", "measure.repeats=1", "seed=0,1,2")
    with begun(tmp_path, *sweep) as (process, _):
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(out.splitlines()[-1])["points"] == {"cancelled": 3}
    again = launcher(*sweep, f"output_dir={tmp_path}", "resume=true")
    assert again.last_json["points"] == {"ok": 3}
    assert [saved_by(path.parent) for path in tmp_path.glob("*/run.json")] == [list(range(20))] * 3
