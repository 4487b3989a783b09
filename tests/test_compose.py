"""Every configuration file composes, spells out every field, and survives the way to a rank and back."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from launcher.compose import compose_run, conf_dir, expand_sweep, options
from launcher.config import BACKENDS, ConfigError, ModelConfig, Precision, PromptsConfig, from_dict, to_dict

SCHEMAS = {"model": ModelConfig, "prompts": PromptsConfig}
CHOICES = [(group, option) for group in ("backend", "model", "prompts") for option in options(group)]


def test_every_engine_has_its_file() -> None:
    assert options("backend") == sorted(BACKENDS)


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_a_file_composes_and_goes_to_a_rank_and_back(group: str, option: str) -> None:
    config = compose_run([f"{group}={option}"])
    assert getattr(config, group).name == option
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_a_file_spells_out_every_field(group: str, option: str) -> None:
    text = (conf_dir() / group / f"{option}.yaml").read_text()
    schema = BACKENDS[option] if group == "backend" else SCHEMAS[group]
    assert set(yaml.safe_load(text)) - {"defaults"} == {field.name for field in dataclasses.fields(schema)}
    assert text.startswith("# ")


def test_the_backend_is_typed_by_its_engine() -> None:
    config = compose_run(["backend=vllm", "backend.extra.seed=3", "precision=bf16"])
    assert type(config.backend) is BACKENDS["vllm"]
    assert config.backend.extra == {"seed": 3}
    assert config.precision is Precision.bf16


def test_a_folder_of_ones_own_is_searched_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("my conf")
    (folder / "prompts").mkdir()
    preset = {**to_dict(compose_run([]).prompts), "name": "mine", "texts": ["Hello"]}
    (folder / "prompts" / "mine.yaml").write_text(yaml.safe_dump(preset))
    config = compose_run(["prompts=mine"], (str(folder),))
    assert config.prompts == PromptsConfig(name="mine", texts=["Hello"])


@pytest.mark.parametrize(
    ("overrides", "points"),
    [
        (["devices=1"], [["devices=1"]]),
        (
            ["backend=fsdp,vllm", "seed=7", "devices=1,2"],
            [
                ["backend=fsdp", "seed=7", "devices=1"],
                ["backend=fsdp", "seed=7", "devices=2"],
                ["backend=vllm", "seed=7", "devices=1"],
                ["backend=vllm", "seed=7", "devices=2"],
            ],
        ),
        (["seed=range(0,3)"], [["seed=0"], ["seed=1"], ["seed=2"]]),
    ],
)
def test_a_sweep_is_the_product_of_its_axes(overrides: list[str], points: list[list[str]]) -> None:
    assert expand_sweep(overrides) == points


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("devices=abc", ["abc", "Integer"]),
        ("precision=fp8", ["fp8", "fp32, fp16, bf16"]),
        ("sampling.temprature=1", ["sampling.temprature", "HINT: sampling.temperature"]),
        ("+nothing=1", ["nothing is not a key"]),
        ("a b", ["a b"]),
        ("backend.kernel_inject={a:8}", ["kernel_inject"]),
    ],
)
def test_a_wrong_override_is_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run([override])
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text
