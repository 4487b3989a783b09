"""scripts/check_gpu.sh: its steps on a CPU, and its one-line error without a GPU."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from running import ROOT, run

from launcher.api import compose, make_plan
from launcher.backends.base import Compilation, CompilingBackend
from launcher.models import EMBEDDED
from shards.load.meta import build_meta
from shards.load.random_weights import fill_random
from shards.machine.world import World
from shards.parallel.families import keep_kv_heads_only

sys.path.insert(0, str(ROOT / "scripts" / "gpu"))

import check_gpu
from check_gpu import AGAIN, Point, Result, Step, check, points, read, steps
from check_gpu_pair import Beside, shared
from check_gpu_table import steps_cell

SCRIPT = ["bash", str(ROOT / "scripts" / "check_gpu.sh")]


def test_without_a_card_it_ends_in_one_line(tmp_path: Path) -> None:
    ended = run([*SCRIPT, str(tmp_path / "out")], timeout=60)
    line = "No CUDA device can be seen. HINT: scripts/check_gpu.sh --rehearse\n"
    assert (ended.code, ended.out, ended.err) == (2, "", line)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_its_steps_go_through_and_are_not_made_twice(tmp_path: Path) -> None:
    ended = run([*SCRIPT, "--rehearse", str(tmp_path)], timeout=280)
    logs = {path.name: path.read_text(errors="replace")[-2000:] for path in tmp_path.glob("*.log")}
    assert ended.code == 0, (ended.out, ended.err, logs)
    text = (tmp_path / "table.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    runs = ["tiny_falcon_transformers_x1_b1", "tiny_llama_fsdp_x2_b2"]
    assert [row[:3] for row in cells[2:7]] == [[name, "ok", "1"] for name in ("doctor", "probe_x1", "tests", *runs)]
    assert "GB/s" in cells[3][4]
    for row in cells[9:]:
        name, made, ours, plain, ratio, *_, weights, cache, peak, peak_of_plain, same = row
        assert name in runs
        assert made == "none", "what auto is on a CPU"
        assert float(ours.split()[0]) > 0
        assert float(plain.split()[0]) > 0
        assert float(ratio) > 0
        for figure in (weights, cache):  # measured, and planned in parentheses
            assert float(figure.split()[0]) == pytest.approx(float(figure.split()[1].strip("()")), rel=0.01)
        assert peak.startswith("- (")
        assert peak_of_plain == "-"
        assert same == "1/1", "of the prompts of the first rank; the weights are the same"
    assert len(cells) == 11
    for run_dir in (tmp_path / "runs").iterdir():
        turns, record = (json.loads((run_dir / f"{name}.json").read_text()) for name in ("plain", "record"))
        assert len(turns["seconds"]) == len(record["metrics"]["new_tokens_per_s"]["values"]) == 3
    again = run([*SCRIPT, "--rehearse", str(tmp_path)], timeout=60)
    assert (again.code, again.out, again.err) == (0, f"{tmp_path / 'table.md'}\n", "")


def sh(name: str, script: str, **more: Any) -> Step:
    return Step(name, ("sh", "-c", script), **more)


def states(out: Path, todo: list[Step]) -> list[tuple[str, int]]:
    return [(result.state, result.tries) for result in (read(out, step) for step in todo)]


def test_what_fails_is_tried_again_by_later_calls_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = f"echo x >>{tmp_path}/count; "
    todo = [
        sh("fine", count),
        sh("shaky", f"test -e {tmp_path}/second || {{ touch {tmp_path}/second; echo no luck; exit 1; }}"),
        sh("broken", count + "echo it is broken; exit 7"),
        sh("too_large", 'echo \'{"error": {"message": "it does not fit"}}\'; exit 2', point=Point("a", "b", 1)),
    ]
    assert check(tmp_path, todo, 0, True) == AGAIN
    assert states(tmp_path, todo) == [("ok", 1), ("failed", 1), ("failed", 1), ("refused", 1)]
    assert "2 steps are left: shaky, broken. HINT: the same command\n" in capsys.readouterr().err
    assert check(tmp_path, todo, 0, True) == AGAIN
    assert check(tmp_path, todo, 0, True) == check(tmp_path, todo, 0, True) == 1
    assert states(tmp_path, todo) == [("ok", 1), ("ok", 2), ("failed", 3), ("refused", 1)]
    assert len((tmp_path / "count").read_text().split()) == 1 + 3
    rows = (tmp_path / "table.md").read_text()
    assert "| broken | failed | 3 | 0 | it is broken |" in rows
    assert "| too_large | refused | 1 | 0 | it does not fit |" in rows


def test_a_step_that_takes_too_long_ends_with_all_that_it_has_started(tmp_path: Path) -> None:
    todo = [sh("slow", f"sleep 4321 & echo $! >{tmp_path}/pid; wait", limit_s=0.5), sh("next", "true")]
    assert check(tmp_path, todo, 0, True) == AGAIN
    assert states(tmp_path, todo) == [("cut off", 1), ("ok", 1)]
    assert "| slow | cut off | 1 | " in (tmp_path / "table.md").read_text()
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_call_begins_nothing_for_which_it_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = [sh("first", "true", needs_s=1000), sh("second", "true", needs_s=1000)]
    assert check(tmp_path, todo, 500, True) == AGAIN
    assert states(tmp_path, todo) == [("ok", 1), ("open", 0)], "one at least, that there be an end"
    assert check(tmp_path, todo, 500, True) == 0


def test_a_step_during_which_all_was_killed_counts_as_tried(tmp_path: Path) -> None:
    step = sh("lethal", "kill -9 $PPID")
    program = f"""
import sys; sys.path.insert(0, {str(ROOT / "scripts" / "gpu")!r})
from pathlib import Path
from check_gpu import Step, check
check(Path({str(tmp_path)!r}), [Step("lethal", {step.command!r})], 0, True)
"""
    for tries in (1, 2):
        assert run([sys.executable, "-c", program], timeout=60).code == -9
        assert read(tmp_path, step) == Result("cut off", tries)


def test_the_runs_on_cards_compose_and_fit_or_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_gpu.importlib.util, "find_spec", lambda name: name)
    alone, together = points(False, 1), points(False, 2)
    assert alone == together[: len(alone)]
    assert {point.devices for point in together[len(alone) :]} == {2}
    names = [step.name for step in steps(tmp_path, False, 2)]
    assert names[:4] == ["doctor", "probe_x1", "probe_x2", "tests"]
    assert [step.name for step in steps(tmp_path, False, 1)][:3] == ["doctor", "probe_x1", "tests"]
    assert len(set(names)) == len(names)
    first = [f"{model}_transformers_x1_b1_cudagraph" for model in ("falcon_40b", "llama_30b")]
    assert names[4:6] == first, "the share of the bandwidth at one prompt, where a failing capture ends the run"
    for point in {(point.engine, point.devices): point for point in together}.values():
        [step] = [step for step in steps(tmp_path, False, 2) if step.point == point]
        overrides = [word for word in step.command if "=" in word and not word.startswith(("-", "accelerator"))]
        plan = make_plan(compose(*overrides, "dry_run=true", f"machine={point.devices}xh200"))
        assert plan is not None
        assert plan.devices[0].free_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny_falcon", "tiny_llama"])
def test_a_plain_model_may_have_the_tensors_of_the_engine(name: str, dtype: torch.dtype) -> None:
    """Even if the engine has replaced its attention; but not tensors of other shapes."""
    engine, plain = (build_meta(EMBEDDED / name, dtype) for _ in range(2))
    keep_kv_heads_only(engine)
    fill_random(engine, 0, "cpu")
    assert shared(plain, engine)
    tensors = [
        {name: one.data_ptr() for name, one in (*m.named_parameters(), *m.named_buffers())} for m in (engine, plain)
    ]
    assert tensors[0] == tensors[1]
    assert [type(one) for one in plain.modules()] == [type(one) for one in build_meta(EMBEDDED / name, dtype).modules()]
    ids = torch.tensor([[5, 6, 7, 8]])
    width = 1e-5 if dtype is torch.float32 else 3e-2
    with torch.inference_mode():
        torch.testing.assert_close(plain(ids).logits, engine(ids).logits, atol=width, rtol=width)
    next(engine.parameters()).data = torch.zeros(3, 3)
    assert not shared(build_meta(EMBEDDED / name, dtype), engine)


def test_steps_are_made_ahead_beside_a_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper passes `compile` on to engines that have it, and returns None for others."""
    config = compose("backend=dummy")
    monkeypatch.setattr(type(config.backend), "engine_alone", config.backend.implementation, raising=False)
    beside = Beside(config)
    assert isinstance(beside, CompilingBackend)
    assert beside.compile((), config.sampling, lambda *_: None) is None
    made = Compilation("cudagraph", 3.0)
    beside.engine.compile = lambda *_: made
    assert beside.compile((), config.sampling, lambda *_: None) == made
    assert steps_cell(asdict(made)) == "cudagraph, 3 s"
    assert steps_cell({"way": "none", "seconds": 3.0, "note": "it | fails"}) == "none, 3 s, it / fails"


@pytest.mark.slow
def test_the_run_goes_on_where_there_is_no_room_for_a_plain_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose("backend=dummy")
    config.run_dir = str(tmp_path)
    monkeypatch.setattr(type(config.backend), "engine_alone", config.backend.implementation, raising=False)

    def full(self: Beside) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 76.93 GiB.\nmore")

    monkeypatch.setattr(Beside, "_load_plain", full)
    beside = Beside(config)
    beside.load(make_plan(config), World(), lambda done, total: None)
    beside.barrier()
    beside.close()
    turns = json.loads((tmp_path / "plain.json").read_text())
    assert (turns["failure"], turns["seconds"]) == ("CUDA out of memory. Tried to allocate 76.93 GiB.", [])
