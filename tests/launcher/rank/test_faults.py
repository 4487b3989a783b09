"""Killing parts of a run at any time: the rest ends soon after, and the record says which rank failed, and where."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import ROOT, Process, launcher, left_in_shared_memory, run, start, wait_until_ended

from launcher.rank.watchdog import waits
from launcher.run_dir.progress import read_progress
from launcher.run_dir.run_dir import RunDir
from launcher.system.processes import end_run, of_run
from shards.machine.shared_memory import shared_memory_files

GONE_S = 30.0
LONG = ("measure.repeats=200", "sampling.max_new_tokens=900", "sampling.ignore_eos=true", "measure.warmup=0")
SLOW_DUMMY = ("backend=dummy", "backend.step_s=0.01", *LONG)
FSDP = ("backend=fsdp", *LONG)
PLAIN = (sys.executable, "-m", "launcher")
BEHIND_A_SHELL = 2  # the rank that torchrun starts through a shell
TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--max-restarts=0",
    "--no-python", "/bin/sh", "-c", f'[ "$RANK" = {BEHIND_A_SHELL} ] || exec "$@"; "$@"; exit', "sh", *PLAIN,
)  # fmt: skip


@contextmanager
def running(
    out: Path, *overrides: str, ranks: int = 2, command: Sequence[str] = PLAIN, **extra: str
) -> Iterator[tuple[Process, Path]]:
    """A run that has reached its first repeat on all ranks; processes that the test leaves are ended on exit."""
    process = start([*command, f"output_dir={out}", *overrides], **extra)
    run_dir = None
    try:
        deadline = time.monotonic() + 90
        while run_dir is None or not all(_repeating(run_dir, rank) for rank in range(ranks)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the run did not reach its first repeat"
            run_dir = next(iter(out.glob("*")), None)
            time.sleep(0.05)
        yield process, run_dir
    finally:
        process.kill()
        process.communicate()
        if run_dir is not None:
            end_run(_mark(run_dir))


def _repeating(run_dir: Path, rank: int) -> bool:
    progress = read_progress(run_dir / f"rank_{rank}.progress")
    return progress is not None and progress.stage.startswith("repeat")


def _mark(run_dir: Path) -> str:
    return RunDir(run_dir).mark


def _wait_until_gone(run_dir: Path) -> None:
    deadline = time.monotonic() + GONE_S
    while left := of_run(_mark(run_dir)):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _record(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "record.json").read_text()))


def _pid(run_dir: Path, rank: int) -> int:
    progress = read_progress(run_dir / f"rank_{rank}.progress")
    assert progress is not None
    return progress.pid


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [SLOW_DUMMY, FSDP], ids=["dummy", "fsdp"])
def test_a_killed_rank_is_named(overrides: tuple[str, ...], tmp_path: Path) -> None:
    before = shared_memory_files()
    with running(tmp_path, *overrides) as (process, run_dir):
        os.kill(_pid(run_dir, 1), signal.SIGKILL)
        out, err = process.communicate(timeout=GONE_S)
        _wait_until_gone(run_dir)
    record = _record(run_dir)
    assert (record["status"], record["error"]["rank"], record["error"]["type"]) == ("failed", 1, "ProcessDied")
    assert record["error"]["stage"].startswith("repeat 1/200 batch 1/")
    assert process.returncode == 1
    assert "\nfailed: rank 1 in repeat 1/200" in f"\n{err}"
    assert json.loads(out.splitlines()[-1])["status"] == "failed"
    assert left_in_shared_memory(before) == []


def _cut_short(path: Path) -> None:
    os.truncate(path, 1000)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "status", "message"),
    [(_cut_short, "failed", "was truncated"), (_overwrite, "refused", "changed while it was in use")],
)
def test_weights_that_change_in_a_mapped_file_end_the_run(
    spoil: Callable[[Path], None], status: str, message: str, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(ROOT / "launcher" / "models" / "tiny_falcon", tmp_path / "model"))
    mapped = ("backend=fsdp", "precision=bf16", f"model.path={model}", "measure.repeats=1000")
    with running(tmp_path / "out", *mapped) as (process, run_dir):
        for path in model.glob("*.safetensors"):
            spoil(path)
        process.communicate(timeout=GONE_S)
        _wait_until_gone(run_dir)
    record = _record(run_dir)
    assert record["status"] == status
    assert message in record["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["5.3", "4.18"])
def test_the_launching_process_killed_takes_its_ranks_along(kernel: str, tmp_path: Path) -> None:
    old = "import errno, os\ndef pidfd_open(*_):\n    raise OSError(errno.ENOSYS, 'not implemented')\n"
    extra = {}
    if kernel == "4.18":
        (tmp_path / "sitecustomize.py").write_text(old + "os.pidfd_open = pidfd_open\n")
        extra = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    with running(tmp_path / "out", *SLOW_DUMMY, **extra) as (process, run_dir):
        os.kill(process.pid, signal.SIGKILL)
        _wait_until_gone(run_dir)
    record = _record(run_dir)
    assert record["status"] == "failed"
    assert record["error"]["message"] == "the launching process is gone"
    assert record["error"]["stage"].startswith("repeat 1/200")


@pytest.mark.slow
def test_a_stopped_rank_ends_with_the_launching_process(tmp_path: Path) -> None:
    with running(tmp_path, *SLOW_DUMMY, "devices=1", ranks=1) as (process, run_dir):
        os.kill(_pid(run_dir, 0), signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        _wait_until_gone(run_dir)
    assert _record(run_dir)["error"]["message"] == "the launching process is gone"


@pytest.mark.slow
def test_ranks_of_a_foreign_launcher_end_with_it(tmp_path: Path) -> None:
    """Including a stopped rank, and one started through a shell."""
    with running(tmp_path, *SLOW_DUMMY, ranks=3, command=TORCHRUN) as (process, run_dir):
        pids = [_pid(run_dir, rank) for rank in range(3)]
        parents = [psutil.Process(pid).ppid() for pid in pids]
        assert parents[:2] == [process.pid] * 2 != parents[BEHIND_A_SHELL:]
        os.kill(pids[1], signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        wait_until_ended(pids, GONE_S)
    record = _record(run_dir)
    assert (record["status"], record["error"]["message"]) == ("failed", "the launching process is gone")


@pytest.mark.parametrize("ends", ["print(outcome.status, outcome.message, flush=True)", "1 / 0"])
def test_a_guard_that_fails_ends_its_rank(ends: str) -> None:
    program = (
        "import threading\nfrom launcher.rank import guard\n"
        f"def end(outcome, gone):\n    {ends}\n"
        "guard.start(None, guard.Watched(lambda reason: False, end, lambda: 1 / 0, 0.01))\n"
        "threading.Event().wait()\n"
    )
    ended = run([sys.executable, "-c", program], timeout=30)
    assert ended.code == 1
    assert ended.err.count("ZeroDivisionError: division by zero") == (1 if "print" in ends else 3)
    if "print" in ends:
        assert ended.out == "failed the guard of the rank failed: ZeroDivisionError: division by zero\n"


FORKS = """
import multiprocessing, os, signal, time
from launcher.rank import guard

def child(ready):
    ready.set()
    time.sleep(60)

guard.start(None, guard.Watched(lambda reason: False, lambda outcome, gone: print(outcome.message, flush=True)))
fork = multiprocessing.get_context("fork")
ready = fork.Event()
process = fork.Process(target=child, args=(ready,))
process.start()
ready.wait()
for number in guard.SIGNALS:
    os.kill(process.pid, number)
process.join()
print("child", process.exitcode, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_signals_of_a_forked_child_end_the_child_and_not_the_rank() -> None:
    ended = run([sys.executable, "-c", FORKS], timeout=60)
    child, own = ended.out.splitlines()
    assert int(child.removeprefix("child ")) in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1)
    assert (own, ended.code, ended.err) == ("received SIGTERM", 143, "")


@pytest.mark.slow
def test_the_process_that_starts_the_ranks_killed_is_a_failure(tmp_path: Path) -> None:
    with running(tmp_path, *SLOW_DUMMY) as (process, run_dir):
        agent = psutil.Process(_pid(run_dir, 0)).ppid()
        os.kill(agent, signal.SIGKILL)
        process.communicate(timeout=GONE_S)
        _wait_until_gone(run_dir)
    record = _record(run_dir)
    assert record["status"] == "failed"
    assert record["error"]["message"] == "the process that starts the ranks ended with exit code -9"


@pytest.mark.slow
def test_an_interrupt_from_the_keyboard_is_cancelled(tmp_path: Path) -> None:
    with running(tmp_path, *SLOW_DUMMY) as (process, run_dir):
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=GONE_S)
        _wait_until_gone(run_dir)
    assert _record(run_dir)["status"] == "cancelled"
    assert "Traceback" not in err
    assert process.returncode == 1


@pytest.mark.slow
def test_signals_after_the_first_do_not_lose_the_record(tmp_path: Path) -> None:
    with running(tmp_path, *SLOW_DUMMY) as (process, run_dir):
        os.kill(_pid(run_dir, 0), signal.SIGSTOP)  # it cannot end by itself: the run waits until it kills it
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GONE_S
        while not (run_dir / "rank_1.json").exists():
            assert time.monotonic() < deadline, "the end did not begin"
            time.sleep(0.01)
        assert not (run_dir / "record.json").exists()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=GONE_S)
        assert of_run(_mark(run_dir)) == []
    assert (process.returncode, "Traceback" in err) == (1, False)
    assert (_record(run_dir)["status"], _record(run_dir)["error"]["message"]) == (
        "cancelled", "interrupted from the keyboard",
    )  # fmt: skip


@pytest.mark.slow
def test_a_rank_that_stands_still_is_the_one_that_hangs(tmp_path: Path) -> None:
    with running(tmp_path, *FSDP, "hang_timeout_s=15") as (process, run_dir):
        os.kill(_pid(run_dir, 1), signal.SIGSTOP)
        _, err = process.communicate(timeout=15 + GONE_S)
        _wait_until_gone(run_dir)
    assert (_record(run_dir)["status"], _record(run_dir)["error"]["rank"]) == ("hang", 1), err
    assert waits((run_dir / "stacks_rank_0.txt").read_text())


@pytest.mark.slow
def test_an_error_in_a_rank_is_one_line_and_its_traceback_is_kept(tmp_path: Path) -> None:
    ended = launcher("backend=dummy", "backend.fail_at=generate", f"output_dir={tmp_path}")
    assert ended.code == 1
    [first, second] = ended.err.strip().splitlines()
    assert first == "failed: rank 1 in warmup 1/1: RuntimeError: the dummy engine was told to fail at generate"
    [run_dir] = tmp_path.iterdir()
    assert second == f"Logs: {run_dir}/rank_*.log"
    assert "Traceback (most recent call last)" in (run_dir / "rank_1.log").read_text()
    assert "Traceback" in _record(run_dir)["error"]["traceback"]
