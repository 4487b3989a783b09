"""Quantized checkpoints: weights are kept as stored, and give the logits of the dequantized values."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from running import command_line, launcher, ranks_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.config.engines import engines
from launcher.models import EMBEDDED
from shards.checkpoint.checkpoint import Checkpoint
from shards.errors import CheckpointError
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.load.quantized.integer_quantizers import rows_divided
from shards.load.quantized.stored import make_stored
from shards.model.known_shape import known_shape
from shards.model.quantization import Quantization, Storage, as_kept
from shards.model.quantized_checkpoint import from_config
from shards.parallel.products import quantize_layers
from shards.plan.cuts import cut_up
from shards.plan.request import PlanRequest

IDS = torch.tensor([[5, 77, 301, 12, 9, 44, 130, 8]])
LLAMA = EMBEDDED / "tiny_llama"
GROUP = 64
AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # the output channel of each 4-bit field of a word, lowest bits first
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
BYTES = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
BLOCK = 32
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq 8 bits": GPTQ | {"bits": 8},
    "gptq in rows": GPTQ | {"group_size": -1},
    "gptq in order": GPTQ | {"desc_act": True},
    "gptq asymmetric": GPTQ | {"sym": False},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    "fp8 tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    "float8": {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**BYTES, "type": "float"}}},
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "w4a16": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    },
    "w8a8": {
        "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": BYTES, "input_activations": ROWS}},
    },
}  # fmt: skip


def words(integers: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Integers packed into 32-bit words along the last dimension, the first in the lowest bits."""
    parts = integers.long().view(*integers.shape[:-1], -1, 32 // bits)
    total = sum(parts[..., place] << (bits * place) for place in range(32 // bits))
    assert isinstance(total, torch.Tensor)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()


def packed(method: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that a method stores for a matrix, and the dequantized values."""
    if method == "w8a8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        integers = (weight / scale).round()
        return {"weight": integers.to(torch.int8), "weight_scale": scale}, integers * scale
    if method.startswith(("fp8", "float8")):
        return packed_fp8(method, weight)
    if method.startswith("gptq"):
        return packed_gptq(CONFIGS[method], weight)
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if method == "awq":
        scale = ((high - low) / 15).half().float()
        zero = (-low / scale).round().clamp(0, 15)
    else:
        scale = (groups.abs().amax(-1, keepdim=True) / 7.5).half().float()
        zero = torch.full_like(scale, 8)
    integers = (groups / scale + zero).round().clamp(0, 15)
    values = ((integers - zero) * scale).view_as(weight)
    integers, scale, zero = integers.view_as(weight), scale[..., 0], zero[..., 0]
    if method == "w4a16":
        return {
            "weight_packed": words(integers),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }, values
    order = [8 * word + place for word in range(len(weight) // 8) for place in AWQ_OUTPUTS]
    return {
        "qweight": words(integers.t()[:, order]), "qzeros": words(zero.t()[:, order]),
        "scales": scale.t().half().contiguous(),
    }, values  # fmt: skip


def packed_gptq(config: dict[str, Any], weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of GPTQ and the dequantized values. With activation order the inputs of a group are not contiguous.
    Stored zero points are less by one, so a zero point of 0, possible if asymmetric, borrows from the next field of its
    word. Source: convert_gptq_v2_to_v1_format in gptqmodel/utils/model.py."""
    bits, inputs = config["bits"], weight.shape[1]
    group = config["group_size"] if config["group_size"] > 0 else inputs
    order = torch.arange(inputs)
    if config["desc_act"]:
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(0))
    numbers = order // group
    most, middle = (1 << bits) - 1, 1 << (bits - 1)
    largest = torch.stack([weight[:, numbers == number].abs().amax(1) for number in range(inputs // group)], 1)
    scale = (largest / (most / 2)).half().float()
    zeros = torch.full_like(scale, middle)
    if not config["sym"]:
        zeros = torch.randint(most + 1, scale.shape, generator=torch.Generator().manual_seed(0)).float()
    integers = (weight / scale[:, numbers] + zeros[:, numbers]).round().clamp(0, most)
    ones = words(torch.ones(len(weight)), bits)
    return {
        "qweight": words(integers, bits).t().contiguous(),
        "qzeros": words(zeros.t(), bits) - ones, "scales": scale.t().half().contiguous(), "g_idx": numbers.int(),
    }, (integers - zeros[:, numbers]) * scale[:, numbers]  # fmt: skip


def packed_fp8(method: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of fp8 and the dequantized values. The largest magnitude of each block (float8: each row) is stored
    as 448, the maximum of fp8."""
    rows, columns = {"fp8": (BLOCK, BLOCK), "fp8 tensor": tuple(weight.shape), "float8": (1, weight.shape[1])}[method]
    blocks = weight.view(len(weight) // rows, rows, -1, columns)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    stored = (blocks / scale).to(torch.float8_e4m3fn)
    values = (stored.float() * scale).view_as(weight)
    parts = {"weight": stored.view_as(weight), "weight_scale": scale[:, 0, :, 0]}
    if method == "fp8":
        parts["weight_scale_inv"] = parts.pop("weight_scale")
    if method == "fp8 tensor":
        parts |= {"weight_scale": scale.view(()), "input_scale": torch.tensor(1.0)}
    return parts, values


def write(method: str, folder: Path) -> torch.nn.Module:
    """Write a quantized tiny_llama to a folder; returns the plain model with the dequantized values."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, weight in model.model.layers.named_parameters():
        if weight.dim() == 2:
            prefix = f"model.layers.{name.removesuffix('weight')}"
            parts, values = packed(method, tensors.pop(f"{prefix}weight"))
            tensors |= {f"{prefix}{leaf}": tensor.contiguous() for leaf, tensor in parts.items()}
            weight.data.copy_(values)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(LLAMA / name, folder)
    config = json.loads((LLAMA / "config.json").read_text()) | {"quantization_config": CONFIGS[method]}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def kept(folder: Path) -> torch.nn.Module:
    stored = from_config(json.loads((folder / "config.json").read_text()))
    assert stored is not None
    form = as_kept(stored)
    assert form is not None
    model = build_meta(folder, torch.float32)
    quantize_layers(model, make_stored(form, torch.float32, zeros_from=1), form.chooses)
    load_weights(model, Checkpoint.open(folder), "cpu")
    return model


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("method", [method for method in CONFIGS if method != "w8a8"])
def test_logits_are_those_of_the_values_that_are_stored(method: str, tmp_path: Path) -> None:
    plain = write(method, tmp_path / "model")
    torch.testing.assert_close(kept(tmp_path / "model")(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("method", ["fp8", "float8"])
def test_fp8_is_that_of_transformers(method: str, tmp_path: Path) -> None:
    """Without a GPU transformers multiplies with dequantized values; those of compressed-tensors are in fp32."""
    pytest.importorskip("compressed_tensors")
    write(method, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(kept(tmp_path / "model")(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_bytes_are_those_of_compressed_tensors(tmp_path: Path) -> None:
    """Compared layer by layer, with the inputs of each layer in the library's model: the integers are equal, and
    products differ in the last bits of fp32, because the library sums floats and we sum integers. Over several layers,
    such bits would change integers if an input is about halfway between two."""
    compressed = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    write("w8a8", tmp_path / "model")
    ours = kept(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    compared = 0

    def compare(name: str, layer: Any, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        nonlocal compared
        mine = ours.get_submodule(name)
        kind = layer.quantization_scheme.input_activations
        for rows in (inputs, inputs.bfloat16()):
            flat = rows.flatten(0, 1)
            integers, scale = rows_divided(flat, flat.abs().amax(1, keepdim=True))
            assert torch.equal(
                (integers * scale.to(rows.dtype)).view_as(rows), compressed.forward_quantize(layer, rows, "input", kind)
            )
        assert torch.equal(mine.weight * mine.weight_scale[:, None], layer.weight)
        torch.testing.assert_close(mine(inputs), outputs, rtol=1e-5, atol=1e-5)
        compared += 1

    for name, layer in theirs.model.layers.named_modules(prefix="model.layers"):
        if hasattr(layer, "quantization_scheme"):
            layer.register_forward_hook(
                partial(lambda name, layer, args, out: compare(name, layer, args[0], out), name)
            )
    difference = (theirs(IDS).logits - ours(IDS).logits).abs().max()
    assert (compared, bool(difference < 0.3)) == (28, True)


BITSANDBYTES: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def write_bitsandbytes(config: dict[str, Any], folder: Path) -> torch.nn.Module:
    asked = BitsAndBytesConfig(**config)
    theirs: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        LLAMA, dtype=torch.float32, quantization_config=asked
    )
    theirs.save_pretrained(folder)
    return theirs


@torch.inference_mode()
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_is_read_as_it_was_saved(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # otherwise its layers round to bf16
    theirs = write_bitsandbytes(BITSANDBYTES[name], tmp_path)
    torch.testing.assert_close(kept(tmp_path)(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_reordered_inputs_are_refused(tmp_path: Path) -> None:
    write("gptq", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.g_idx"
    save_file(tensors | {name: tensors[name].flip(0).contiguous()}, path)
    with pytest.raises(CheckpointError, match="its inputs are reordered"):
        kept(tmp_path / "model")


@pytest.mark.slow
def test_engines_cut_what_is_stored_and_hold_the_planned_bytes(tmp_path: Path) -> None:
    """Two ranks give the logits of one rank, for each format that the plan does not refuse to split."""
    refused = {"gptq in order": "tensor_parallel", "nf4_dq": "tensor_parallel"}
    models, out = tmp_path / "models", tmp_path / "out"
    out.mkdir()
    for method in CONFIGS:
        write(method, models / method)
    for method, config in BITSANDBYTES.items():
        write_bitsandbytes(config, models / method)
    forms: dict[str, Quantization] = {}
    for folder in models.iterdir():
        fields = json.loads((folder / "config.json").read_text())
        stored, able = from_config(fields), ["transformers"]
        assert stored is not None
        for engine in ("tensor_parallel", "fsdp"):
            form, planner = engines()[engine].kept(stored), engines()[engine].planner_class()
            if form is None:
                assert (folder.name, engine) == ("nf4_dq", "fsdp")
                continue
            forms[f"{folder.name} {engine}"] = form
            request = PlanRequest(
                shape=known_shape(fields), engine=planner, devices=2, dtype_bytes=4, quantization=form
            )
            if (reason := planner.refusal(request)) is not None:
                assert (engine, reason.endswith("which cannot be cut.")) == (refused[folder.name], True)
            else:
                able.append(engine)
        (folder / "engines.json").write_text(json.dumps(able))
    ended = ranks_of("stored_program.py", 2, str(models), str(out), timeout=300)
    assert ended.code == 0, ended.err[-2000:]
    for rank in range(2):
        results = json.loads((out / f"rank_{rank}.json").read_text())
        assert len(results) == 3 * (len(CONFIGS) + len(BITSANDBYTES)) - 3
        for key, result in results.items():
            name, _, engine = key.rpartition(" ")
            if engine != "transformers":
                shape = known_shape(json.loads((models / name / "config.json").read_text()))
                storage = Storage(4, forms[key])
                planned = cut_up(shape, engines()[engine].planner_class().pieces, 2, storage)
                assert result["parameter_bytes"] == planned[rank], key
            # With quantized inputs, the last bit of a sum can change an integer, and LLM.int8 scales parts of rows.
            most = 0.3 if name in ("w8a8", "int8") and engine == "tensor_parallel" else 1e-3
            assert result["difference"] <= most, key


@pytest.mark.slow
def test_a_run_holds_the_planned_bytes_and_others_name_who_can(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write("gptq", folder)
    asked = ["model=tiny_llama", f"model.path={folder}", "devices=1", f"output_dir={tmp_path / 'runs'}"]
    ended = launcher(*asked, "backend=transformers", "measure.repeats=1", "measure.warmup=0")
    assert ended.code == 0, ended.err
    record = json.loads((Path(ended.last_json["run_dir"]) / "record.json").read_text())
    [device], [planned] = record["devices"], record["plan"]["devices"]
    assert device["parameter_bytes"] == planned["parameter_bytes"]
    ended = command_line(*asked, "backend=deepspeed")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "The checkpoint is quantized (gptq_int4_g64)" in ended.err
    assert "or backend=fsdp, or backend=tensor_parallel, or backend=vllm, or backend=transformers" in ended.err
    ended = command_line(*asked, "backend=transformers", "adapter.path=embedded:tiny_llama_adapter")
    assert "is not merged into weights that are quantized already (gptq_int4_g64). HINT: adapter.merge=" in ended.err
