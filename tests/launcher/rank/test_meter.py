"""The cost of a run: CPU time, energy by fake counters, money, and traces of steps."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from running import run

from launcher.composition.compose import compose_run
from launcher.config.schema import Accelerator, ConfigError
from launcher.models import EMBEDDED
from launcher.rank import meter as meter_module
from launcher.rank.meter import Meter, cpu_times, packages
from launcher.report.page.devices import devices_over_time
from launcher.results.figures.cost import DeviceSample, PhaseCost, RankCost, cost_of
from shards.machine import nvml
from shards.machine.hardware import Device
from shards.machine.nvml import Reading
from shards.machine.world import World


def rank(energy_j: float | None, is_meter: bool = True) -> RankCost:
    phases = (PhaseCost("start", 1.0, 2.0, 0.5), PhaseCost("repeats", 4.0, 3.0, 1.0, energy_j))
    source, reason = ("NVML", None) if energy_j else (None, "no counter")
    return RankCost(phases, is_meter, source, reason)


def test_energy_and_money_of_a_run() -> None:
    cost = cost_of([rank(800.0), rank(None, is_meter=False)], 100, 20.0, num_devices=2, device_hour=1.8)
    assert cost is not None
    assert cost.phases == (PhaseCost("start", 1.0, 4.0, 1.0), PhaseCost("repeats", 4.0, 6.0, 2.0, 800.0))
    assert (cost.user_s, cost.system_s) == (10.0, 3.0)
    assert (cost.joules_per_token, cost.watts, cost.energy_source, cost.energy_reason) == (8.0, 200.0, "NVML", None)
    assert cost.per_million_tokens == pytest.approx(1.8 * 2 / 3600 / 20 * 1e6)


def test_energy_that_one_node_does_not_tell_is_not_known() -> None:
    cost = cost_of([rank(800.0), rank(None)], 100, 20.0, num_devices=2, device_hour=None)
    assert cost is not None
    assert (cost.joules_per_token, cost.watts, cost.energy_reason) == (None, None, "no counter")
    assert cost.per_million_tokens is None
    assert cost_of([], 0, None, 1, None) is None


def test_the_devices_of_a_node_are_read_by_its_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    energies = {"GPU-a": 100.0, "GPU-b": 50.0}
    sampled = threading.Event()

    def readings(uuids: list[str]) -> list[Reading]:
        if threading.current_thread().name == "meter":
            sampled.set()
        for uuid in uuids:
            energies[uuid] += 10
        return [Reading(uuid, energies[uuid], 300.0, 0.5, 1400, 60, ("power brake",)) for uuid in uuids]

    config = compose_run(["backend=dummy", "devices=2"])
    config.accelerator = Accelerator.cuda
    cards = [Device("A6000", uuid=uuid) for uuid in (*energies, "GPU-c")]
    monkeypatch.setattr(meter_module, "cuda_devices", lambda environ: cards)
    monkeypatch.setattr(meter_module, "readings", readings)
    monkeypatch.setattr(meter_module, "SAMPLE_S", 0.001)
    first = Meter(config, World(world_size=2))
    first.enter("repeats")
    assert sampled.wait(10)
    while not first.slowed_by:
        sampled.clear()
        assert sampled.wait(10)
    cost = first.end()
    start, repeats = cost.phases
    assert (start.phase, repeats.phase, cost.energy_source, cost.energy_reason) == ("start", "repeats", "NVML", None)
    assert repeats.energy_j is not None
    assert repeats.energy_j >= 20
    assert {sample.uuid for sample in cost.samples} == {"GPU-a", "GPU-b"}
    assert cost.slowed_by == ("GPU-a: power brake", "GPU-b: power brake")
    other = Meter(config, World(rank=1, local_rank=1, world_size=2)).end()
    assert (other.is_meter, other.energy_reason) == (False, "another rank of the node reads its devices")


def test_counters_of_cpu_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("1000000\n")
    assert [package.name for package in packages(tmp_path)] == ["intel-rapl:0", "intel-rapl:1"]
    monkeypatch.setattr(meter_module, "packages", lambda: packages(tmp_path))
    config = compose_run(["backend=dummy", "accelerator=cpu"])
    counted = Meter(config, World())
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("3500000\n")
    counted.enter("repeats")
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("0\n")  # the counter has wrapped around
    cost = counted.end()
    assert [phase.energy_j for phase in cost.phases] == [2.5, None]
    assert (cost.energy_source, cost.samples_reason) == ("RAPL", "no NVIDIA device")
    monkeypatch.setattr(meter_module, "packages", list)
    assert "no energy counter in " in str(Meter(config, World()).end().energy_reason)


def test_processor_time_grows_with_work() -> None:
    before = cpu_times()
    sum(range(2_000_000))
    after = cpu_times()
    assert after >= before
    assert sum(after) > 0


def test_a_card_says_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    class NotSupportedError(Exception):
        pass

    def refuse(*arguments: object) -> None:
        raise NotSupportedError

    fake = SimpleNamespace(
        NVMLError=NotSupportedError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5_000,
        nvmlDeviceGetPowerUsage=lambda handle: 70_000,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=40),
        nvmlDeviceGetClockInfo=lambda handle, kind: 1410,
        nvmlDeviceGetTemperature=refuse,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x40 | 0x04 | 0x01,
    )
    monkeypatch.setattr(nvml, "pynvml", fake)
    assert nvml.readings(["GPU-a"]) == (Reading("GPU-a", 5.0, 70.0, 0.4, 1410, None, ("heat (hardware)",)),)


def test_devices_over_time() -> None:
    samples = tuple(DeviceSample(float(s), "repeats", "GPU-a", 100.0 + s, 0.5, None, 60.0) for s in range(3))
    cost = cost_of([rank(800.0)], 100, 20.0, num_devices=1, device_hour=None)
    assert cost is not None
    empty = devices_over_time([("run", cost)])
    assert (empty.series, empty.table.rows) == ([], ())
    sampled = cost_of([RankCost(rank(1.0).phases, True, "NVML", None, samples)], 1, 1.0, 1, None)
    assert sampled is not None
    parts = devices_over_time([("run", sampled)])
    assert parts.series[0].y == (100.0, 101.0, 102.0)
    assert parts.table.rows == (("run GPU-a", "101 W (100 … 102)", "50% (50% … 50%)", "-", "60 °C (60 … 60)"),)


@pytest.mark.slow
def test_steps_are_traced_and_their_cost_is_told(tmp_path: Path) -> None:
    words = ["backend=transformers", "accelerator=cpu", f"output_dir={tmp_path}", "measure.profile=3", "--json"]
    words += ["cost.device_hour=2", "sampling.max_new_tokens=6", "measure.repeats=1"]
    ended = run([sys.executable, "-m", "launcher", *words])
    assert ended.code == 0, ended.err
    run_dir = Path(ended.last_json["run_dir"])
    trace = json.loads((run_dir / "rank_0.trace.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    layers = json.loads((EMBEDDED / "tiny_falcon" / "config.json").read_text())["num_hidden_layers"]
    assert names.count("aten::scaled_dot_product_attention") == 3 * layers, "three steps, and no prompt"
    cost = json.loads((run_dir / "record.json").read_text())["cost"]
    assert [phase["phase"] for phase in cost["phases"]] == ["start", "load", "warm-up", "repeats"]
    assert cost["user_s"] > 0
    assert (cost["joules_per_token"] is None) == (cost["energy_reason"] is not None)
    tokens_per_s = ended.last_json["new_tokens_per_s"]
    assert cost["per_million_tokens"] == pytest.approx(2 / 3600 / tokens_per_s * 1e6, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["backend=dummy", "measure.profile=3"], "measure.profile=3, and backend=dummy runs no torch module"),
        (["backend=vllm", "measure.profile=3"], "backend=vllm runs no torch module"),
        (["backend=fsdp", "measure.profile=40"], "there are 31 decode steps in an answer. HINT: sampling.max_new_tok"),
        (["backend=fsdp", "measure.profile=0"], "measure.profile=0"),
        (["cost.device_hour=-1"], "cost.device_hour=-1"),
    ],
)
def test_what_cannot_be_traced_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        compose_run(words)
