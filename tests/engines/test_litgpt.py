"""LitGPT compared with the reference, by real runs if LITGPT_PYTHON names an environment with it, and refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import ROOT, command_line, launcher
from safetensors.torch import save_file

from launcher.backends.litgpt.engine import INSTALL
from launcher.backends.litgpt.shapes import litgpt_config
from launcher.composition.compose import compose_run
from launcher.config.schema import ConfigError
from launcher.models import EMBEDDED

PYTHON = os.environ.get("LITGPT_PYTHON") or (sys.executable if importlib.util.find_spec("litgpt") else None)
real = pytest.mark.skipif(PYTHON is None, reason="LITGPT_PYTHON does not name an interpreter that has LitGPT")
MODELS = ("tiny_falcon", "tiny_llama")
PROMPTS = ("prompts=file", f"prompts.path={ROOT}/tests/ragged_prompts.txt")


def ran(folder: Path, *asked: str) -> tuple[dict[str, Any], list[list[int]]]:
    """The record of a run, and its tokens."""
    short = ("sampling.max_new_tokens=16", "measure.repeats=1", "measure.warmup=0", "accelerator=cpu")
    ended = launcher(*asked, *PROMPTS, *short, f"output_dir={folder / 'runs'}", XDG_CACHE_HOME=str(folder / "cache"))
    assert ended.code == 0, ended.err
    run_dir = Path(ended.last_json["run_dir"])
    lines = (run_dir / "completions.jsonl").read_text().splitlines()
    record = json.loads((run_dir / "record.json").read_text())
    for device, planned in zip(record["devices"], record["plan"]["devices"], strict=True):
        for name in ("parameter_bytes", "kv_cache_bytes"):
            assert device[name] == planned[name], name
    return record, [json.loads(line)["token_ids"] for line in lines]


def falcon_adapter(folder: Path) -> Path:
    """An adapter with factors of different ranks for two matrices of one layer. LitGPT supports only one rank and
    factors for all layers, so the adapter has to be converted."""
    fields = json.loads((EMBEDDED / "tiny_falcon" / "config.json").read_text())
    hidden, kv_heads = fields["hidden_size"], fields["num_kv_heads"]
    joint = hidden + 2 * kv_heads * hidden // fields["num_attention_heads"]
    generator, at, factors = torch.Generator().manual_seed(0), "base_model.model.transformer.h.1", {}
    for name, outputs, inputs, rank in (
        ("self_attention.query_key_value", joint, hidden, 4), ("mlp.dense_4h_to_h", hidden, 4 * hidden, 2),
    ):  # fmt: skip
        factors[f"{at}.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        factors[f"{at}.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6}))
    return folder


@real
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_its_tokens_are_those_of_the_reference_and_it_converts_once(model: str, tmp_path: Path) -> None:
    expected = ran(tmp_path, "backend=transformers", f"model={model}", "devices=1")[1]
    python = f"backend.python={PYTHON}"
    record, tokens = ran(tmp_path, "backend=litgpt", python, f"model={model}", "devices=1")
    assert tokens == expected
    whole = record["devices"][0]["parameter_bytes"]
    [made] = (tmp_path / "cache" / "multi-gpu-launcher" / "litgpt").iterdir()
    assert sorted(path.name for path in made.iterdir()) == ["lit_model.pth", "model_config.yaml"]
    written = (made / "lit_model.pth").stat().st_mtime_ns
    cut, tokens = ran(
        tmp_path, "backend=litgpt", python, f"model={model}", "devices=2", "backend.generate=tensor_parallel"
    )
    assert tokens == expected
    assert [path.stat().st_mtime_ns for path in made.parent.glob("*/lit_model.pth")] == [written]
    fields = json.loads((EMBEDDED / model / "config.json").read_text())
    ends = 2 * 4 * fields["vocab_size"] * fields["hidden_size"]  # embedding and head are not split (nor small norms)
    held = [device["parameter_bytes"] for device in cut["devices"]]
    assert len(held) == 2
    assert all(part - ends == pytest.approx((whole - ends) / 2, rel=0.02) for part in held)
    path = EMBEDDED / "tiny_llama_adapter" if model == "tiny_llama" else falcon_adapter(tmp_path / "adapter")
    adapted = (f"model={model}", "devices=1", f"adapter.path={path}")
    other = ran(tmp_path, "backend=transformers", *adapted)[1]
    assert other != expected
    assert ran(tmp_path, "backend=litgpt", python, *adapted)[1] == other


PUBLISHED = {
    "falcon_7b": {"n_head": 71, "n_embd": 4544, "n_query_groups": 1, "shared_attention_norm": True, "n_layer": 32},
    "falcon_40b": {"name": "falcon-40b", "n_head": 128, "n_query_groups": 8, "head_size": 64, "n_layer": 60},
    "llama2_7b": {"intermediate_size": 11008, "n_query_groups": 32, "norm_eps": 1e-5, "mlp_class_name": "LLaMAMLP"},
    "llama31_8b": {"n_query_groups": 8, "rope_base": 500000},
}
"""Expected values, from LitGPT's own table of models."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_shapes_are_those_that_litgpt_has_for_published_models(model: str) -> None:
    preset = yaml.safe_load((ROOT / "conf" / "model" / f"{model}.yaml").read_text())
    assert PUBLISHED[model].items() <= litgpt_config(preset["config"]).items()


LLAMA = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": 768,
    "num_key_value_heads": 2, "intermediate_size": 384, "max_position_embeddings": 1024,
}  # fmt: skip
ADAPTER = f"adapter.path={EMBEDDED / 'tiny_llama_adapter'}"
REFUSALS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "converts a falcon and a llama here, and no gpt2": ((), {"model_type": "gpt2"}),
    "no llama with attention_bias=true": ((), {"attention_bias": True}),
    "no rotary embedding of type yarn": ((), {"rope_parameters": {"rope_type": "yarn"}}),
    "model.weights=random has none": (("model.weights=random",), {}),
    "backend.quantize=bnb.nf4: LitGPT quantizes through Fabric on CUDA only": (("backend.quantize=bnb.nf4",), {}),
    "one process on one node": (("num_nodes=2",), {}),
    "the model has 4 layers to put on them": (("devices=5",), {}),
    "lora_A of model.layers.0.mlp.down_proj, which has 128 x 256": ((ADAPTER,), {"intermediate_size": 256}),
    "is for model.layers.1.mlp.down_proj, which is no matrix": (
        (ADAPTER,),
        {"num_hidden_layers": 1, "num_key_value_heads": 4},
    ),
    "cannot divide n_query_groups=2 by 4": (("devices=4", "backend.generate=tensor_parallel"), {}),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_it_would_get_wrong_is_refused(message: str) -> None:
    asked, fields = REFUSALS[message]
    config = compose_run(["backend=litgpt", "devices=1", *asked])
    with pytest.raises(ConfigError, match=message):
        config.backend.refuse(config, LLAMA | fields, False, 10)


def test_without_litgpt_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("litgpt"):
        pytest.skip("it is installed here")
    ended = command_line("backend=litgpt", f"output_dir={tmp_path}")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "backend=litgpt needs litgpt, which is not installed here" in ended.err
    assert INSTALL in ended.err
    assert INSTALL in (ROOT / "README.md").read_text()
