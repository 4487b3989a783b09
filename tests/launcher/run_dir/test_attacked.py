"""Run directories that are forged, or damaged during a run: no other processes are ended, and the error is one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from running import ROOT, environment, run, start, wait_until_ended

from launcher.__main__ import main
from launcher.composition.compose import compose_run
from launcher.prepare.prepare import prepare
from launcher.run_dir.lifecycle import create_run_dir
from launcher.run_dir.run_dir import RunDir
from launcher.system.processes import MARK, end_run, of_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def begun(folder: Path, *overrides: str) -> RunDir:
    """The run directory of a dummy run that was not started."""
    asked = ["backend=dummy", "devices=1", "prompts.texts=[a]", f"output_dir={folder}", *overrides]
    return create_run_dir(prepare(compose_run(asked), ("python", "-m", "launcher", *asked)))


@pytest.fixture
def victims() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Yields a function that starts a harmless process, with or without a run's mark."""
    started: list[subprocess.Popen[bytes]] = []

    def start(mark: str | None = None, **how: Any) -> subprocess.Popen[bytes]:
        own = {} if mark is None else {MARK: mark}
        started.append(subprocess.Popen(["sleep", "600"], env={**environment(), **own}, **how))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("mark", [None, "", 5, "x", "*", [], "0" * 31, "0" * 33, "0" * 32 + "-1", "../" + "0" * 29])
def test_what_is_no_mark_ends_nothing(mark: Any, victims: Any) -> None:
    process = victims()
    with pytest.raises(ValueError, match="no mark of a run"):
        end_run(mark)
    assert process.poll() is None


def change(**fields: Any) -> Callable[[Path], object]:
    def act(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return act


def configured(**fields: Any) -> Callable[[Path], object]:
    def act(path: Path) -> None:
        run = json.loads(path.read_text())
        path.write_text(json.dumps({**run, "config": {**run["config"], **fields}}))

    return act


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


LIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no mark": (change(mark=None), "Expected `str`, got `null` - at `$.mark`"),
    "another mark": (change(mark="*"), "mark='*' is not one of 32 hexadecimal digits"),
    "a list of marks": (change(mark=["0" * 32]), "Expected `str`, got `array` - at `$.mark`"),
    "very many ranks": (change(world_size=10**9), "world_size=1000000000 is not from 1 to"),
    "no ranks": (change(world_size=0), "world_size=0 is not from 1 to"),
    "ranks that are text": (change(world_size="2"), "Expected `int`, got `str` - at `$.world_size`"),
    "no configuration": (change(config={}), "it has no 'backend'"),
    "an unknown engine": (configured(backend={"name": "none"}), "There is no engine 'none'"),
    "an engine that is a list": (configured(backend={"name": []}), "unhashable type"),
    "devices that are text": (configured(devices="two"), "Expected `int`, got `str`"),
    "devices that are too many": (configured(devices=10**9), "run.json: devices=1000000000 is not a number from 1 to"),
    "a time that is none": (configured(timeout_s=[]), "Expected `float`, got `array`"),
    "a precision that is none": (configured(precision="fp7"), "it has no 'fp7'"),
    "no JSON": (lambda path: path.write_text("{"), "run.json is not valid JSON: Expecting property name"),
    "an infinity": (lambda path: path.write_text('{"started_at": 1e999}'), "1e999 is too large a number"),
    "a list": (lambda path: path.write_text("[]"), "Expected `object`, got `array`"),
    "deep": (lambda path: path.write_text("[" * 10**5), "more than 50 levels deep"),
    "a pipe": (pipe, "it is a pipe, a socket or a device, not a regular file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "it is a folder"),
    "gone": (Path.unlink, "has no run.json"),
    "a loop": (lambda path: (path.unlink(), path.symlink_to("run.json")), "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_run_directory_that_lies_is_one_line(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], victims: Any
) -> None:
    run_dir, (lie, fact) = begun(tmp_path), LIES[kind]
    process = victims(run_dir.mark)
    lie(run_dir.path / "run.json")
    assert main(["resume=true", f"run_dir={run_dir}"]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    assert fact in err
    assert " HINT: " in err
    assert process.poll() is None


def namespace() -> list[str]:
    """The prefix that runs a command in a new PID namespace; skips if none can be made."""
    for words in (["unshare"], ["unshare", "--map-root-user"]):
        command = [*words, "--pid", "--fork", "--mount-proc"]
        try:
            subprocess.run([*command, "true"], check=True, capture_output=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            continue
        return command
    pytest.skip("no PID namespace can be made here")


@pytest.mark.slow
def test_no_lie_of_a_run_directory_ends_a_process_of_others(tmp_path: Path) -> None:
    """In a separate PID namespace, since a failure of this protection would kill every visible process."""
    ended = run([*namespace(), sys.executable, str(ROOT / "tests" / "programs" / "lying_run_dirs.py"), str(tmp_path)])
    *lies, truth = ended.last_json
    everybody = [name for name in ("unmarked", "of another run", "of this run", "of another user") if name in str(lies)]
    assert [(seen["code"], seen["living"]) for seen in lies] == [(2, everybody)] * 8, lies
    everybody.remove("of this run")
    assert (truth["code"], truth["living"]) == (0, everybody)


@pytest.mark.parametrize("copy", [False, True], ids=["the same directory", "a copy"])
def test_only_ranks_of_the_directory_itself_are_ended(copy: bool, tmp_path: Path, victims: Any) -> None:
    run_dir = begun(tmp_path)
    process, unmarked = victims(run_dir.mark), victims()
    resumed = Path(shutil.copytree(run_dir.path, tmp_path / "copy")) if copy else run_dir.path
    assert main(["resume=true", f"run_dir={resumed}"]) == 0
    assert unmarked.poll() is None
    assert (process.poll() is None) == copy


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_a_process_of_another_user_is_not_ended(tmp_path: Path, victims: Any) -> None:
    run_dir = begun(tmp_path)
    process = victims(run_dir.mark, user=65534)
    assert of_run(run_dir.mark) == []
    assert end_run(run_dir.mark) == 0
    assert process.poll() is None


def emptied(run_dir: Path) -> None:
    shutil.rmtree(run_dir)
    run_dir.mkdir()


def filed(run_dir: Path) -> None:
    shutil.rmtree(run_dir)
    run_dir.touch()


def broken(name: str) -> Callable[[Path], object]:
    return lambda run_dir: (run_dir / name).write_text("{")


def foldered(name: str) -> Callable[[Path], object]:
    def act(run_dir: Path) -> None:
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).mkdir()

    return act


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": shutil.rmtree,
    "moved": lambda run_dir: run_dir.rename(run_dir.with_name("moved")),
    "emptied": emptied,
    "a file": filed,
    "run.json removed": lambda run_dir: (run_dir / "run.json").unlink(),
    "run.json broken": broken("run.json"),
    "run.json a folder": foldered("run.json"),
    "prompts.jsonl broken": broken("prompts.jsonl"),
    "prompts.jsonl removed": lambda run_dir: (run_dir / "prompts.jsonl").unlink(),
    "record.json a folder": foldered("record.json"),
    "attempt.json broken": broken("attempt.json"),
    "rank_0.json a folder": foldered("rank_0.json"),
    "rank_0.json broken": broken("rank_0.json"),
    "completions.jsonl a folder": foldered("rank_0.completions.jsonl"),
    "another mark": lambda run_dir: change(mark=None)(run_dir / "run.json"),
}


@pytest.mark.slow
def test_a_run_directory_that_changes_under_a_run_is_one_line(tmp_path: Path) -> None:
    """All damages at the same time, each in a separate run, which continues for a second after the damage."""
    slow = ("backend.step_s=0.02", "sampling.max_new_tokens=150", "measure.repeats=3")
    run_dirs = {kind: begun(tmp_path / kind, *slow) for kind in DAMAGES}
    started = {}
    for kind, run_dir in run_dirs.items():
        command = [sys.executable, "-m", "launcher", "resume=true", f"run_dir={run_dir}"]
        started[kind] = (run_dir, run_dir.mark, start(command))
    pids, deadline = {}, time.monotonic() + 150
    while pids.keys() != started.keys():
        for kind, (run_dir, mark, process) in started.items():
            progress = run_dir.read_progress(1)[0]
            if kind not in pids and progress is not None and progress.stage.startswith(("warm", "repeat")):
                pids[kind] = [item.pid for item in of_run(mark)]
                DAMAGES[kind](run_dir.path)
            assert kind in pids or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    wrong = {}
    for kind, (_, _, process) in started.items():
        out, err = process.communicate(timeout=120)
        wait_until_ended(pids[kind], 10)
        last = (err.strip().splitlines() or [""])[-1]
        is_line = process.returncode == 0 or " HINT: " in last or last.startswith("failed: ")
        if process.returncode not in (0, 1, 2) or "Traceback" in out + err or not is_line:
            wrong[kind] = (process.returncode, err[-1500:])
    assert wrong == {}, json.dumps(wrong, indent=1)
