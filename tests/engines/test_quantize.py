"""Weights that are quantized while they are loaded: the library's own logits, the planned bytes, every engine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from running import ROOT, launcher
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.config.engines import engines
from launcher.config.formats import WeightFormat
from launcher.models import EMBEDDED
from shards.checkpoint.checkpoint import Checkpoint
from shards.errors import PlanError
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.load.quantizers import make_quantizer
from shards.parallel.products import quantize_layers

MODELS = ("tiny_falcon", "tiny_llama")
IDS = torch.tensor([[5, 77, 301, 12, 9, 44, 130, 8]])


def loaded(model: str, quantization: str) -> torch.nn.Module:
    folder = EMBEDDED / model
    module = build_meta(folder, torch.float32)
    quantize_layers(module, make_quantizer(quantization, torch.float32))
    load_weights(module, Checkpoint.open(folder), "cpu")
    return module


@torch.inference_mode()
def test_llm_int8_is_that_of_from_pretrained() -> None:
    """Of a Llama: transformers leaves the layers of a Falcon, which have a class of their own, as they are."""
    folder, config = EMBEDDED / "tiny_llama", BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    torch.testing.assert_close(loaded("tiny_llama", "int8")(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq", "fp4"])
def test_four_bits_are_those_that_bitsandbytes_makes(quantization: str, model: str) -> None:
    """The model with the values that its weights have after bitsandbytes; some CPUs it lets multiply in bf16 only."""
    module = loaded(model, quantization)
    rounded = AutoModelForCausalLM.from_pretrained(EMBEDDED / model, dtype=torch.float32)
    for name, layer in module.named_modules():
        if getattr(layer, "quantizer", None) is not None:
            weight = rounded.get_submodule(name).weight
            kind, _, nested = quantization.partition("_")
            packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=bool(nested), quant_type=kind)
            assert torch.equal(packed, layer.weight)
            weight.copy_(dequantize_4bit(packed, state))
    torch.testing.assert_close(module(IDS).logits, rounded(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("model", MODELS)
def test_int8_of_rows_is_the_model_with_its_rows_rounded(model: str) -> None:
    module = loaded(model, "int8_wo")
    rounded = AutoModelForCausalLM.from_pretrained(EMBEDDED / model, dtype=torch.float32)
    for name, layer in module.named_modules():
        if getattr(layer, "quantizer", None) is not None:
            weight = rounded.get_submodule(name).weight
            values = layer.weight.float() * layer.weight_scale[:, None]
            assert (values - weight).abs().max() <= layer.weight_scale.max()
            weight.copy_(values)
    torch.testing.assert_close(module(IDS).logits, rounded(IDS).logits, rtol=1e-4, atol=1e-4)


RUNS = {
    "tiny_falcon": (
        ("transformers", 1, "int8_wo"), ("fsdp", 2, "int8_wo"), ("tensor_parallel", 2, "int8_wo"),
        ("transformers", 1, "nf4_dq"), ("tensor_parallel", 2, "nf4_dq"),
    ),
    "tiny_llama": (
        ("transformers", 1, "int8_wo"), ("fsdp", 2, "int8_wo"),
        ("transformers", 1, "int8"), ("tensor_parallel", 2, "int8"),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_engine_answers_alike_and_holds_the_planned_bytes(model: str, tmp_path: Path) -> None:
    texts: dict[str, list[str]] = {}
    for backend, devices, quantization in RUNS[model]:
        ended = launcher(
            f"backend={backend}", f"devices={devices}", f"model={model}", f"quantization={quantization}",
            "measure.repeats=1", "measure.warmup=0", "sampling.max_new_tokens=12", f"output_dir={tmp_path}",
        )  # fmt: skip
        assert ended.code == 0, ended.err
        run_dir = Path(ended.last_json["run_dir"])
        record = json.loads((run_dir / "record.json").read_text())
        held = [device["parameter_bytes"] for device in record["devices"]]
        assert held == [device["parameter_bytes"] for device in record["plan"]["devices"]]
        answers = [json.loads(line)["token_ids"] for line in (run_dir / "completions.jsonl").read_text().splitlines()]
        assert answers == texts.setdefault(quantization, answers), (backend, quantization)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            ["backend=fsdp", "quantization=nf4"],
            "=fsdp makes no nf4 weights, but int8_wo. HINT: backend=tensor_parallel",
        ),
        (
            ["backend=deepspeed", "quantization=int8"],
            "backend=deepspeed makes no int8 weights. HINT: backend=",
        ),
        (["backend=dummy", "quantization=int8"], "backend=dummy makes no int8 weights. HINT: backend=tensor_parallel"),
        (
            ["backend=transformers", "quantization=fp8"],
            "makes no fp8 weights, but int8_wo, int8, nf4, nf4_dq, fp4.",
        ),
    ],
)
def test_an_engine_that_does_not_make_it_names_one_that_does(asked: list[str], message: str, tmp_path: Path) -> None:
    ended = launcher(*asked, f"output_dir={tmp_path}", "dry_run=true")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert message in ended.err


def test_other_layers_than_linear_ones_are_refused() -> None:
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}
    with pytest.raises(PlanError, match="Conv1D, which is not quantized here"):
        quantize_layers(build_meta(config, torch.float32), make_quantizer("int8_wo", torch.float32))


def test_the_table_of_the_readme_is_that_of_the_engines() -> None:
    rows = [line.split("|")[1:-1] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    heading = ["fsdp", "tensor_parallel", "transformers", "vllm"]
    shown = {
        name: {engine for engine, cell in zip(heading, cells, strict=True) if cell.strip()}
        for first, _, *cells in rows
        if "int8" in first or "fp4" in first or "fp8" in first
        for name in re.findall("`(\\w+)`", first)
    }
    made = {
        name: {engine for engine, kind in engines().items() if name in kind.quantizations}
        for name in WeightFormat.__members__
        if name != "none"
    }
    assert shown == made
