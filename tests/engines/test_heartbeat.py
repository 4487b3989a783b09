"""A long load of vLLM counts as alive while it reads or computes, and as hung otherwise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.backends import heartbeat
from launcher.backends.heartbeat import COMPUTING_S, READING, Activity, Work
from launcher.backends.vllm import backend as module
from launcher.composition.compose import compose_run
from shards.machine.world import World

LOOKS = {
    "reads": ([Work(READING * at, 0.0) for at in range(1, 5)], [True] * 4),
    "computes": ([Work(0, 0.5 * at) for at in range(1, 5)], [True] * 4),
    "does nothing": ([Work(100.0 * at, 0.01 * at) for at in range(1, 5)], [False] * 4),
    "stops": ([Work(READING, 1.0), Work(READING, 1.1), Work(READING, 1.2)], [True, False, False]),
}


@pytest.mark.parametrize(("done", "alive"), LOOKS.values(), ids=LOOKS)
def test_life_is_work_that_is_done(done: list[Work], alive: list[bool]) -> None:
    activity = Activity(0.0, {})
    assert [activity.look(2.0 * at, {7: work}) for at, work in enumerate(done, 1)] == alive


def test_computing_alone_is_life_for_a_while_only() -> None:
    activity = Activity(0.0, {})
    assert activity.look(COMPUTING_S, {7: Work(0, COMPUTING_S)})
    assert not activity.look(COMPUTING_S + 1, {7: Work(0, COMPUTING_S + 1)})
    assert activity.look(COMPUTING_S + 2, {7: Work(READING, COMPUTING_S + 1)})
    assert activity.look(2 * COMPUTING_S, {7: Work(READING, 2 * COMPUTING_S)})


def test_a_process_that_ends_takes_no_work_back() -> None:
    activity = Activity(0.0, {})
    assert activity.look(2.0, {7: Work(0, 100.0), 8: Work(0, 1.0)})
    assert activity.look(4.0, {8: Work(0, 2.0)})


class Loaded(Exception):
    """Ends the test when the fake engine has loaded."""


def reading(path: Path, beats: list[int]) -> None:
    """Keep reading, like a slow load, until three heartbeats were seen."""
    while len(beats) < 3:
        path.read_bytes()
        time.sleep(0.01)


def waiting(path: Path, beats: list[int]) -> None:
    threading.Event().wait(0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("work", "is_alive"), [(reading, True), (waiting, False)])
def test_a_slow_load_of_the_engine_beats_while_it_works(
    work: Callable[[Path, list[int]], None], is_alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").write_bytes(bytes(2 * READING))
    beats: list[int] = []

    def load(**arguments: object) -> None:
        work(tmp_path / "weights", beats)
        raise Loaded

    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    monkeypatch.setattr(heartbeat, "COMPUTING", 1000.0)  # so that this process' other threads do not count as work
    engine = object.__new__(module.VllmBackend)
    engine.config = compose_run(["backend=vllm", "devices=1", "accelerator=cpu"])
    engine.options, engine.on_cpu, engine.external = engine.config.backend, True, False
    engine.vllm = SimpleNamespace(__path__=[str(tmp_path)], LLM=load)
    monkeypatch.setattr(module, "check_platform", lambda on_cpu: None)
    monkeypatch.setattr(type(engine.options), "check_extra", lambda *_: None)
    monkeypatch.setattr(engine, "_model_folder", lambda: tmp_path)
    plan = SimpleNamespace(kv_cache_memory_bytes=1, devices=[SimpleNamespace(offloaded_bytes=0)])
    with pytest.raises(Loaded):
        engine.load(plan, World(), lambda done, total: beats.append(done))
    assert bool(beats) == is_alive
    assert "heartbeat" not in [thread.name for thread in threading.enumerate()]
