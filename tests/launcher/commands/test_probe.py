"""`python -m launcher.probe` with two real ranks, and plans that use its measurements."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import plan, probe
from shards.machine import rates
from shards.machine.hardware import CPU, Device, Link
from shards.machine.rates import Measured, cache_file, save, this_machine

THIS_CPU = replace(CPU, capacity_bytes=64 << 30)
MEASURED = Measured(Device("CPU", "cpu", 64 << 30, 20e9, 1e12, 2e11), 2, Link("2 ranks over gloo", 1e9, 1e-4))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "main_memory_bytes", lambda: 64 << 30)
    return tmp_path


@pytest.mark.slow
def test_two_ranks_are_measured_and_the_figures_kept(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert probe.main(["devices=2", "accelerator=cpu"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"2 x CPU, all at once\nmemory: [\d.]+ GB/s\nmatmul: [\d.]+ TFLOP/s in bfloat16, ", out)
    device, link = this_machine(os.environ, 2, on_cuda=False)
    assert link is not None
    assert device.bandwidth is not None
    assert device.flops_32 is not None
    assert 1e8 < device.bandwidth < 2e12
    assert 1e8 < device.flops_32 < 1e14
    assert 1e6 < link.bandwidth < 1e12
    assert 1e-6 < link.latency_s < 1


def test_the_matmul_rate_is_that_of_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from shards.parallel import probe as rank

    seen = []
    multiply = torch.mm

    def watched(left: Any, right: Any, *, out: Any) -> Any:
        seen.extend((left.float(), right.float()))
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    monkeypatch.setitem(rank.MATMUL_SIZE, "cpu", 64)
    assert rank.matmul_rate(torch.device("cpu"), torch.bfloat16) > 0
    assert [0.9 < operand.std() < 1.1 for operand in seen] == [True] * 2 * (rank.REPEATS + 1)


def test_figures_that_cannot_be_kept_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "measure", lambda *_: MEASURED)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert probe.main(["devices=2", "accelerator=cpu"]) == 2
    said = capsys.readouterr()
    assert "memory: 20.0 GB/s" in said.out
    assert said.err.startswith("error: The figures cannot be kept: [Errno 20] Not a directory: '/dev/null")
    assert said.err.count("\n") == 1


KILLED = """
import os, sys
forks = []
def kill_second():
    if len(forks) == 1:
        os.kill(os.getpid(), 9)
if "launcher.launch.forks" in sys.orig_argv:
    os.register_at_fork(after_in_parent=lambda: forks.append(1), after_in_child=kill_second)
"""


@pytest.mark.slow
@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    ("program", "interface", "words"),
    [(KILLED, "lo", "rank 1 ended with exit code -9."), ("", "nowhere", "RuntimeError: .*nowhere.")],
    ids=["killed", "raised"],
)
def test_the_rank_that_fails_is_named_at_once_and_none_is_left(
    program: str, interface: str, words: str, cache: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("torch")
    (cache / "sitecustomize.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(cache))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    assert probe.main(["devices=2", "accelerator=cpu"]) == 2
    command = r"\S+ -m launcher\.launch\.forks 2 shards\.parallel\.probe cpu"
    assert re.fullmatch(
        rf"error: The probe failed: {words} HINT: to see it whole: {command}\n", capsys.readouterr().err
    )
    own = [process.info["environ"] or {} for process in psutil.process_iter(["environ"])]
    assert str(cache) not in [environ.get("XDG_CACHE_HOME") for environ in own]


def test_figures_are_those_of_as_many_devices(cache: Path) -> None:
    assert this_machine(os.environ, 2, on_cuda=False) == (THIS_CPU, None)
    path = save(os.environ, MEASURED)
    assert path.parent == cache / "multi-gpu-launcher"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert this_machine(os.environ, 2, on_cuda=False) == (MEASURED.device, MEASURED.link)
    assert this_machine(os.environ, 4, on_cuda=False) == (THIS_CPU, None)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"device": {"name": 1, "colour": 2}, "num_devices": 2, "link": 0}']
)
def test_a_cache_that_cannot_be_read_is_none(text: str) -> None:
    path = cache_file(os.environ, CPU, 2)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert this_machine(os.environ, 2, on_cuda=False) == (THIS_CPU, None)


def test_the_plan_of_this_machine_takes_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "cuda_devices", lambda environ: ())
    save(os.environ, MEASURED)
    assert plan.main(["model=llama_7b", "devices=2", "backend=fsdp", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "Links: 2xCPU 2 ranks over gloo." in out
    assert "| **0.154** | 19.8 | link |" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpus=2"], "error: 'gpus' is not an argument of the probe. HINT: devices=2\n"),
        (["devices=none"], "error: devices=none is not a whole number above 0. HINT: devices=2\n"),
        (["accelerator=tpu"], "error: accelerator=tpu is not one of auto, cpu, cuda. HINT: accelerator=cpu\n"),
        (["device=2"], "error: 'device' is not an argument of the probe. HINT: devices=2\n"),
        (["--cpu"], "error: '--cpu' is not an argument of the probe. HINT: accelerator=cpu\n"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(arguments) == 2
    assert capsys.readouterr() == ("", message)
