"""The model presets: their numbers of parameters are those published, and those of transformers for the same config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import plan as plan_command
from launcher.composition.compose import compose_run
from launcher.composition.presets import options
from shards.load.meta import build_meta
from shards.load.meta_shapes import describe
from shards.model.any_shape import shape_from_tensors
from shards.model.known_shape import KNOWN_FAMILIES, known_shape

PUBLISHED = {
    "bloom_176b": 176_247_271_424,
    "falcon_7b": 6_921_720_704,
    "falcon_40b": 41_303_293_952,
    "falcon_180b": 178_557_088_768,  # the hub counts the tied head twice
    "gemma2_9b": 9_241_705_984,
    "gemma3_1b": 999_885_952,
    "gpt_neox_20b": 20_554_567_680,
    "gpt_oss_20b": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_30b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama31_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496,
    "llama32_1b": 1_235_814_400,
    "mistral_7b": 7_241_732_096,
    "mixtral_8x7b": 46_702_792_704,
    "phi3_mini": 3_821_079_552,
    "phi4": 14_659_507_200,
    "qwen2_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "qwen3_30b_a3b": 30_532_122_624,
}
"""Numbers of parameters by the model cards, and by the safetensors counts on the hub."""

PRESETS = [name for name in options("model") if not name.startswith(("tiny_", "local_"))]


def config_of(name: str) -> dict[str, Any]:
    config = compose_run([f"model={name}"]).model.config
    assert config is not None
    return config


def test_every_preset_is_checked() -> None:
    assert sorted(PRESETS) == sorted(PUBLISHED)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_parameters(name: str) -> None:
    config = config_of(name)
    model = build_meta(config, torch.bfloat16)
    assert model.num_parameters() == PUBLISHED[name]
    if config["model_type"] in KNOWN_FAMILIES:
        shape = known_shape(config)
    else:
        answer = json.loads(json.dumps(describe(model)))
        assert answer["notes"] == []
        shape = shape_from_tensors(answer["sizes"], answer["tensors"])
    assert shape.num_parameters == PUBLISHED[name]
    assert {parameter.name for parameter in shape.parameters} == {key for key, _ in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights"), [("llama31_70b", "65.71 GiB"), ("gpt_oss_20b", "19.48 GiB"), ("qwen3_8b", "7.63 GiB")]
)
def test_a_folder_with_only_a_config_is_planned(
    name: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    assert plan_command.main([f"model={tmp_path}", "machines=2xh200", "backend=fsdp,vllm"]) == 0
    printed = capsys.readouterr().out
    assert f"{PUBLISHED[name]:,} parameters" in printed
    assert printed.count(weights) == 2
