"""Published benchmarks: every preset composes, is planned on its hardware, and can be rehearsed with a tiny model."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

import pytest
from running import ROOT, launcher

from launcher.composition.compose import compose_run
from launcher.composition.presets import options
from launcher.composition.sweeps import expand_sweep
from launcher.config.machine import machine_of
from launcher.config.schema import ConfigError
from launcher.config.values import from_dict, to_dict
from launcher.experiments import main
from launcher.prepare.experiments import published_figures
from launcher.prepare.prepare import prepare
from launcher.report.__main__ import main as report
from launcher.report.published_table import LABELS
from shards.machine.hardware import known_device

NAMES = options("experiment")


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_composes_names_its_source_and_can_be_rehearsed(name: str) -> None:
    config = compose_run([f"experiment={name}"])
    experiment = config.experiment
    assert experiment.name == name
    assert from_dict(to_dict(config)) == config
    assert experiment.source
    assert experiment.location
    assert {figure.name for figure in experiment.figures} <= LABELS.keys()
    if experiment.hardware is None:
        assert any(what.startswith("the card") for what in experiment.unknown)
    else:
        number, card = machine_of(experiment.hardware)
        assert number == config.devices
        assert known_device(card).bandwidth
        assert name.endswith(experiment.hardware)
    assert not experiment.needs
    if config.backend.name in ("transformers", "fsdp", "tensor_parallel"):
        words = [f"experiment={name}", "model=tiny_llama", "devices=2", "dry_run=true", "accelerator=cpu"]
        assert prepare(compose_run(words), ()).config.sampling == config.sampling


REHEARSALS = [
    line.strip().partition(" -m launcher -m ")[2]
    for line in (ROOT / "docs" / "rehearsals.md").read_text().splitlines()
    if " -m launcher " in line
]


@pytest.mark.parametrize("command", REHEARSALS)
def test_a_rehearsal_can_be_run_without_gpus(command: str) -> None:
    for point in expand_sweep(shlex.split(command)):
        config = compose_run([*point, "dry_run=true", "accelerator=cpu"])
        if all(map(importlib.util.find_spec, config.backend.modules())):
            assert prepare(config, ()).config.sampling == compose_run([point[0]]).sampling


def test_what_cannot_be_made_yet_says_so() -> None:
    config = compose_run([f"experiment={NAMES[0]}"])
    config.experiment.needs = ["a time machine"]
    with pytest.raises(ConfigError, match=f"experiment={NAMES[0]} needs a time machine, which is not supported yet"):
        prepare(config, ())


def test_the_published_pace_of_fsdp_is_that_of_the_link() -> None:
    speed, memory, wall = published_figures(compose_run(["experiment=falcon_40b_fsdp_2xa6000"]))
    assert (speed.name, speed.value) == ("new_tokens_per_s", 0.6)
    assert speed.limit == pytest.approx(0.613, abs=0.001)
    assert speed.share == pytest.approx(0.98, abs=0.01)
    assert memory.limit == pytest.approx(45.1, abs=0.1)
    assert wall.limit is not None
    assert wall.limit < 83.4


def test_a_figure_that_cannot_be_true_is_called_so() -> None:
    (wall,) = published_figures(compose_run(["experiment=llama_30b_vllm_2gpu"]))
    assert wall.share is None
    assert wall.objection is not None
    assert "16 tokens take 0.17 s at least on 2xh100" in wall.objection


@pytest.mark.slow
def test_docs_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--markdown"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "reproduce.md").read_text()


@pytest.mark.slow
def test_a_run_is_shown_beside_the_published_figures(tmp_path: Path) -> None:
    words = ("experiment=falcon_40b_fsdp_2xa6000", "model=tiny_falcon", "backend=dummy", f"output_dir={tmp_path}")
    ended = launcher(*words)
    assert ended.code == 0, ended.err
    (row,) = [line for line in ended.out.splitlines() if "new tokens/s" in line and "0.613" in line]
    assert "98%" in row
    assert f"{ended.last_json['new_tokens_per_s']:,.4g} tokens/s" in row
    page = tmp_path / "page.html"
    assert report([str(tmp_path), "--html", str(page)]) == 0
    text = page.read_text()
    assert "<h2>Published beside measured</h2>" in text
    assert "<td>published (2xa6000)</td><td>new tokens/s</td><td>0.6 tokens/s</td><td>0.613 tokens/s</td>" in text
