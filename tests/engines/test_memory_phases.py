"""Peaks of CUDA's allocator by phase, with a fake allocator, so that the tests run on every machine."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from running import ROOT

from launcher.backends import memory
from launcher.backends.base import DeviceMemory, PhaseMemory, Prompt
from launcher.backends.decode import Decoder, eos_token_ids
from launcher.backends.memory import PhasePeaks, module_memory
from launcher.backends.module import ALLOCATOR
from launcher.backends.slots.decoder import SlotDecoder
from launcher.backends.tensor_parallel.backend import TensorParallelBackend
from launcher.composition.compose import compose_run
from launcher.config.schema import SamplingConfig
from launcher.models import EMBEDDED
from launcher.report.run.memory_table import device_table, phase_table
from launcher.results.record import Record, read_record
from shards.checkpoint.checkpoint import Checkpoint
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.machine.world import World
from shards.plan.memory import DevicePlan

CARD, OTHER = torch.device("cuda", 0), torch.device("cuda", 1)


class Allocator:
    """A fake of torch's allocator statistics: current and peak bytes of each device since the last reset."""

    def __init__(self) -> None:
        self.current = {CARD: (0, 0), OTHER: (0, 0)}
        self.peak = dict(self.current)
        self.split = 0

    def use(self, device: torch.device, allocated: int, reserved: int, peak: int | None = None) -> None:
        self.current[device] = (allocated, reserved)
        most = max(self.peak[device][0], peak or allocated), max(self.peak[device][1], reserved)
        self.peak[device] = most

    def stats(self, device: torch.device) -> dict[str, Any]:
        names = ("allocated_bytes", "reserved_bytes")
        figures = zip(names, self.current[device], self.peak[device], strict=True)
        found = {name: {"all": {"current": current, "peak": peak}} for name, current, peak in figures}
        return found | {"inactive_split_bytes": {"all": {"current": 0, "peak": self.split}}}

    def reset(self, device: torch.device) -> None:
        self.peak[device] = self.current[device]


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    one = Allocator()
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", one.stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", one.reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: one.peak[device][0])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: one.peak[device][1])
    properties = SimpleNamespace(uuid="1", name="NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(memory, "nvml_used", lambda uuid, reasons: 999)
    return one


def test_each_phase_has_the_peaks_of_its_own_steps(allocator: Allocator) -> None:
    allocator.use(CARD, 0, 0, peak=5000)  # before the first phase: belongs to none
    peaks = PhasePeaks([torch.device("cpu"), CARD, OTHER])
    allocator.use(CARD, 100, 120, peak=110)
    peaks.end("load")
    for _ in range(2):
        allocator.use(CARD, 110, 200, peak=190)
        peaks.end("prefill")
        for reserved in (200, 230, 280, 280):
            allocator.use(CARD, 115, reserved, peak=130)
            allocator.split = 40
            peaks.end("decode")
        allocator.use(CARD, 105, 150)
    held = module_memory(torch.nn.Module(), CARD, 0, {}, peaks)
    phases = [("load", 110, 120), ("prefill", 190, 280), ("decode", 130, 280)]
    assert held.phases == tuple(PhaseMemory(*phase) for phase in phases)  # type: ignore[arg-type]
    assert (held.peak_allocated_bytes, held.peak_reserved_bytes) == (190, 280)
    assert (held.fragmented_bytes, held.step_growth_bytes, held.nvml_used_bytes) == (40, 50, 999)
    idle = module_memory(torch.nn.Module(), OTHER, 1, {}, peaks)
    assert [(phase.peak_allocated_bytes, phase.peak_reserved_bytes) for phase in idle.phases] == [(0, 0)] * 3


def test_what_is_not_watched_is_null_with_a_reason(allocator: Allocator) -> None:
    peaks = PhasePeaks([CARD])
    peaks.end("load")
    loaded = module_memory(torch.nn.Module(), CARD, 0, {}, peaks)
    assert (loaded.step_growth_bytes, loaded.reasons["step_growth_bytes"]) == (None, "no decode step was made")
    mixed = module_memory(torch.nn.Module(), CARD, 0, {})
    on_cpu = module_memory(torch.nn.Module(), torch.device("cpu"), 0, {}, PhasePeaks([torch.device("cpu")]))
    for device, reason in ((mixed, "the engine mixes the phases in its steps"), (on_cpu, "no CUDA device")):
        assert (device.phases, device.fragmented_bytes, device.step_growth_bytes) == ((), None, None)
        assert {device.reasons[name] for name in memory.BY_PHASE} == {reason}


@pytest.mark.slow
@pytest.mark.parametrize("is_continuous", [True, False], ids=["slots", "static"])
def test_a_decode_loop_ends_a_phase_with_each_step(is_continuous: bool) -> None:
    """With two prompts in two slots, the second is read in chunks of two tokens, and the first decoded in between."""
    model = build_meta(EMBEDDED / "tiny_llama", torch.float32)
    load_weights(model, Checkpoint.open(EMBEDDED / "tiny_llama"), "cpu")
    seen: list[str] = []
    peaks: Any = SimpleNamespace(end=seen.append)
    cpu, eos = torch.device("cpu"), eos_token_ids(model)
    decoder: Decoder | SlotDecoder = Decoder(model, eos, cpu, 0, peaks=peaks)
    if is_continuous:
        decoder = SlotDecoder(model, eos, cpu, World(), 0, peaks, 2, 40, prefill_tokens=2, splits_prompts=False)
    prompts = [Prompt(0, "", (5, 6)), Prompt(1, "", (5, 6, 7, 8))]
    for _ in range(2):
        decoder.generate(prompts, SamplingConfig(max_new_tokens=3, ignore_eos=True), lambda *_: None)
    mixed = ["prefill", "decode", "prefill", "decode", "prefill", "decode", "decode"]
    assert seen == (mixed if is_continuous else ["prefill", "decode", "decode"]) * 2


WIDE = Console(width=200)


def text_of(table: object) -> list[list[str]]:
    """The cells of each row of a table, as printed."""
    out = StringIO()
    Console(width=200, file=out).print(table)
    rows = [line.split("│")[1:-1] for line in out.getvalue().splitlines() if "│" in line]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_report_sets_the_plan_beside_what_was_measured() -> None:
    record = read_record(json.loads((ROOT / "tests" / "records" / "version_1.json").read_text()))
    mib = 2**20
    plan = DevicePlan(0, 80 * mib, 1 * mib, 1 * mib, 8 * mib, 2 * mib, 500 * mib, None)
    phases = (PhaseMemory("load", 81 * mib, 90 * mib), PhaseMemory("decode", 85 * mib, 96 * mib))
    device = DeviceMemory(
        0, "cuda:0", "NVIDIA H200", phases=phases, peak_allocated_bytes=85 * mib, nvml_used_bytes=600 * mib,
        fragmented_bytes=3 * mib, step_growth_bytes=2 * mib,
    )  # fmt: skip
    assert record.plan is not None
    run: Record = replace(record, devices=(device,), plan=replace(record.plan, devices=(plan,)))
    assert phase_table([replace(record)], WIDE) is None
    assert text_of(phase_table([run], WIDE)) == [
        ["0", "load", "81.00 MiB (80.00 MiB)", "90.00 MiB"],
        ["0", "decode", "85.00 MiB (91.00 MiB)", "96.00 MiB"],
    ]
    assert text_of(phase_table([run, run], WIDE, ["base", "other"]))[0][0] == "base"
    expected = ["85.00 MiB (91.00 MiB)", "3.00 MiB", "2.00 MiB", "600.00 MiB (591.00 MiB)"]
    assert text_of(device_table(run, WIDE)) == [["0", "cuda:0 NVIDIA H200", *expected]]


def test_no_engine_of_ours_uses_the_attention_that_is_planned_anew_at_each_length() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    TensorParallelBackend(compose_run(["backend=tensor_parallel", "devices=1"]))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("scheduling", "own", "found"),
    [
        ("static", {}, "expandable_segments:True"),
        ("static", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
        ("static", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ("continuous", {}, None),
    ],
)
def test_memory_grows_with_a_cache_that_does(
    scheduling: str, own: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")  # makes monkeypatch restore the variable, even if it is not set now
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    TensorParallelBackend(compose_run(["backend=tensor_parallel", "devices=1", f"measure.scheduling={scheduling}"]))
    assert os.environ.get("PYTORCH_ALLOC_CONF") == found
