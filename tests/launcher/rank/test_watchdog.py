"""Runs that hang or take too long, also under other launchers: they are ended, and the stacks are saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import environment, launcher, torchrun

from launcher.composition.compose import compose_run
from launcher.rank.watchdog import Watchdog, blame, write_stacks
from launcher.results.verdict import Outcome
from launcher.run_dir.progress import Progress, read_progress
from launcher.run_dir.run_dir import RunDir
from launcher.system.processes import of_run

HANG = ("backend=dummy", "backend.fail_at=hang", "backend.fail_after=2", "measure.batch_size=1")


def watchdog(*overrides: str) -> tuple[Watchdog, list[float]]:
    """A watchdog, and its clock, which the test sets."""
    clock = [0.0]
    return Watchdog(compose_run(["backend=dummy", *overrides]), lambda: clock[0]), clock


def at(step: int, stage: str = "repeat 1/3 batch 1/2") -> Progress:
    return Progress(pid=1, stage=stage, ticks=step, time=float(step))


def test_a_rank_that_waits_for_a_slow_one_does_not_hang() -> None:
    dog, clock = watchdog("hang_timeout_s=10")
    for moment in range(100):
        clock[0] = float(moment)
        assert dog.look((at(5), at(6 + moment // 9))) is None


@pytest.mark.parametrize(
    ("ranks", "rank", "stage"),
    [
        ((at(9), at(8, "load")), 1, "load"),
        ((at(5, "end"), at(8)), 1, "repeat 1/3 batch 1/2"),
        ((at(9), None), 1, "start"),
    ],
    ids=["the one furthest behind", "not one that has finished", "one that never began"],
)
def test_the_rank_to_blame(ranks: tuple[Progress | None, ...], rank: int, stage: str) -> None:
    dog, clock = watchdog("hang_timeout_s=10")
    assert dog.look(ranks) is None
    clock[0] = 10.0
    assert dog.look(ranks) is None
    clock[0] = 10.1
    message = "no rank has made a step for hang_timeout_s=10"
    assert dog.look(ranks) == Outcome("hang", message, rank, stage)


@pytest.mark.parametrize(
    ("stacks", "rank"),
    [
        ({0: "all_gather (torch/distributed/distributed_c10d.py:4394)", 1: "no stacks"}, 1),
        ({0: "sleep", 1: "all_gather (torch/distributed/distributed_c10d.py:4394)"}, 0),
        ({0: "gather (shards/parallel/collectives.py:103)", 1: "no stacks"}, 1),
        ({0: "distributed_c10d", 1: "distributed_c10d"}, 0),
        ({1: "sleep"}, 0),
    ],
    ids=["the one that nobody waits behind", "already right", "in shared memory", "all wait", "one that lives no more"],
)
def test_who_waits_for_another_is_not_to_blame(stacks: dict[int, str], rank: int) -> None:
    found = blame(Outcome("hang", "it hangs", 0, "load"), (at(5, "load"), at(6, "close")), stacks)
    assert (found.status, found.message, found.rank) == ("hang", "it hangs", rank)
    assert found.stage == ("load", "close")[rank]


WAITS_FOR_ITS_CARD = """
import faulthandler, functools, signal, sys, threading, time
import torch
from launcher.rank.rank import Rank

torch.cuda._lazy_init = lambda: None
torch.cuda.device = lambda device: threading.Lock()
torch._C._cuda_synchronize = functools.partial(time.sleep, 60)  # native code, as that of CUDA is: no frame of its own
Rank._work = lambda self: torch.cuda.synchronize() if sys.argv[1] == "card" else time.sleep(60)
faulthandler.register(signal.SIGUSR2, all_threads=True)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("ready", flush=True)
object.__new__(Rank).run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("spy", [True, False], ids=["py-spy", "the rank itself"])
def test_who_waits_for_a_card_on_which_others_are_missing_is_not_to_blame(
    spy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    if not spy:
        monkeypatch.setattr("launcher.rank.watchdog.shutil.which", lambda *_, **__: None)
    program = tmp_path / "program.py"
    program.write_text(WAITS_FOR_ITS_CARD)
    started: dict[int, subprocess.Popen[bytes]] = {}
    stacks: dict[int, str] = {}
    try:
        for number, place in enumerate(("card", "elsewhere")):
            with (tmp_path / f"rank_{number}.log").open("wb") as log:
                command = [sys.executable, str(program), place]
                started[number] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment())
        for process in started.values():
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        while not stacks or not all("launcher/rank/rank.py" in text for text in stacks.values()):
            stacks = write_stacks(RunDir(tmp_path), {number: process.pid for number, process in started.items()})
    finally:
        for process in started.values():
            process.kill()
            process.communicate()
    late = Outcome("hang", "it hangs", 0, "load")
    ranks = (at(5, "load"), at(6, "close"))
    assert blame(late, ranks, stacks, on_cuda=True).rank == 1, stacks
    assert blame(late, ranks, stacks, on_cuda=False).rank == 0


def test_the_time_of_the_whole_run() -> None:
    dog, clock = watchdog("timeout_s=30")
    clock[0] = 30.0
    assert dog.look((at(1), at(2))) is None
    clock[0] = 30.5
    outcome = dog.look((at(1), at(3)))
    assert outcome == Outcome("timeout", "the run took longer than timeout_s=30", 0, "repeat 1/3 batch 1/2")


def test_zero_is_off() -> None:
    dog, clock = watchdog("hang_timeout_s=0")
    clock[0] = 1e6
    assert dog.look((at(1), None)) is None


@pytest.mark.parametrize(
    "text", [None, "", "[]", '{"pid": 1, "strides": 2}'], ids=["OSError", "empty", "list", "other"]
)
def test_progress_that_cannot_be_read_ends_no_watch(text: str | None, tmp_path: Path) -> None:
    if text is None:
        (tmp_path / "rank_0.progress").mkdir()
    else:
        (tmp_path / "rank_0.progress").write_text(text)
    assert read_progress(tmp_path / "rank_0.progress") is None


def only(folder: Path) -> tuple[Path, dict[str, Any]]:
    [run_dir] = folder.iterdir()
    return run_dir, json.loads((run_dir / "record.json").read_text())


def check_hang(folder: Path, timeout_s: int) -> None:
    run_dir, record = only(folder)
    assert (record["status"], record["error"]["rank"]) == ("hang", 1)
    assert record["error"]["stage"] == "repeat 1/3 batch 2/2"
    assert record["error"]["message"] == f"no rank has made a step for hang_timeout_s={timeout_s}"
    assert "_maybe_hang" in (run_dir / "stacks_rank_1.txt").read_text()
    saved = [json.loads(line)["index"] for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    assert saved == [0, 1, 2]
    assert of_run(RunDir(run_dir).mark) == []


@pytest.mark.slow
def test_a_hang_is_ended_and_its_stacks_are_kept(tmp_path: Path) -> None:
    ended = launcher(*HANG, "hang_timeout_s=10", f"output_dir={tmp_path}", timeout=60)  # includes the start of torchrun
    assert ended.code == 1
    line = "hang: rank 1 in repeat 1/3 batch 2/2: no rank has made a step for hang_timeout_s=10"
    assert f"\n{line}" in f"\n{ended.err}"
    check_hang(tmp_path, 10)


@pytest.mark.slow
def test_ranks_that_torchrun_started_watch_themselves(tmp_path: Path) -> None:
    ended = torchrun(2, "-m", "launcher", *HANG, "hang_timeout_s=3", f"output_dir={tmp_path}", timeout=90)
    assert ended.code == 1
    check_hang(tmp_path, 3)


@pytest.mark.slow
def test_a_run_that_takes_too_long_keeps_its_completions(tmp_path: Path) -> None:
    slow = ("backend.step_s=0.05", "measure.repeats=100", "timeout_s=6")
    ended = launcher("backend=dummy", *slow, f"output_dir={tmp_path}", "devices=1", timeout=60)
    _, record = only(tmp_path)
    assert (ended.code, record["status"]) == (1, "timeout")
    assert record["error"]["message"] == "the run took longer than timeout_s=6"
    assert len((Path(record["run_dir"]) / "completions.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("spy", [True, False], ids=["py-spy", "the rank itself"])
def test_stacks_of_a_rank(spy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import faulthandler, signal, time\n"
        "faulthandler.register(signal.SIGUSR2, all_threads=True)\n"
        "def stuck():\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "stuck()\n"
    )
    if not spy:
        monkeypatch.setattr("launcher.rank.watchdog.shutil.which", lambda *_, **__: None)
    with (tmp_path / "rank_0.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=log)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        text = write_stacks(RunDir(tmp_path), {0: process.pid})[0]
    finally:
        process.kill()
        process.communicate()
    assert text == (tmp_path / "stacks_rank_0.txt").read_text()
    assert "stuck" in text
    assert ("Current thread" in text or "most recent call first" in text) != spy
