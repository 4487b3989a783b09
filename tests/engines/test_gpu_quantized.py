"""Tests of quantized and pruned weights that need CUDA GPUs, for their kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import launcher
from test_gpu import CARDS, has
from test_stored import CONFIGS, IDS, write
from torch.nn.functional import linear

from launcher.compress.streamed import pruned
from shards.checkpoint.checkpoint import Checkpoint
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.load.quantized.stored import make_stored
from shards.model.quantization import as_kept
from shards.model.quantized_checkpoint import from_config
from shards.parallel.products import quantize_layers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CARDS, reason="no CUDA device")]
SCORED = ("measure.quality=builtin", "measure.repeats=1", "measure.warmup=0", "sampling.max_new_tokens=2", "devices=1")


def scored(out: Path, *asked: str) -> dict[str, Any]:
    """The record of a run that scores the built-in text."""
    ended = launcher(*asked, *SCORED, f"output_dir={out}", timeout=280)
    assert ended.code == 0, ended.err
    record: dict[str, Any] = json.loads((Path(ended.last_json["run_dir"]) / "record.json").read_text())
    held = [device["parameter_bytes"] for device in record["devices"]]
    assert held == [device["parameter_bytes"] for device in record["plan"]["devices"]]
    return record


@torch.inference_mode()
@pytest.mark.parametrize("method", CONFIGS)
def test_a_card_multiplies_what_is_stored_as_the_processor_does(method: str, tmp_path: Path) -> None:
    write(method, tmp_path / "model")
    stored = from_config(json.loads((tmp_path / "model" / "config.json").read_text()))
    assert stored is not None
    for by_rows in (False, True):
        form, logits = as_kept(stored, by_rows), []
        assert form is not None
        for place in ("cpu", "cuda:0"):
            model = build_meta(tmp_path / "model", torch.bfloat16)
            quantize_layers(model, make_stored(form, torch.bfloat16, zeros_from=1), form.chooses)
            load_weights(model, Checkpoint.open(tmp_path / "model"), place)
            logits.append(model(IDS.to(place)).logits.float().cpu())
        assert (logits[0] - logits[1]).abs().mean() < 0.1


@pytest.mark.parametrize("method", ["gptq", "gptq 8 bits", "awq", "w4a16", "w8a8", "float8"])
def test_vllms_kernels_score_a_stored_checkpoint_as_its_values_do(method: str, tmp_path: Path) -> None:
    """vLLM uses Marlin for weight-only integers, and CUTLASS for 8-bit weights and inputs."""
    if not has("vllm"):
        pytest.skip("backend=vllm is not installed for CUDA")
    write(method, tmp_path / "model")
    asked = ("model=tiny_llama", f"model.path={tmp_path / 'model'}")
    base = scored(tmp_path, *asked, "backend=transformers", "accelerator=cpu", "precision=fp32")
    found = scored(tmp_path, *asked, "backend=vllm", "accelerator=cuda", "precision=fp16")
    assert found["quality"]["perplexity"] == pytest.approx(base["quality"]["perplexity"], rel=0.05)


@pytest.mark.skipif(
    bool(CARDS) and torch.cuda.get_device_capability() < (8, 9), reason="fp8 is of compute 8.9 and above"
)
@pytest.mark.parametrize("quantization", ["fp8", "fp8_channel"])
def test_products_of_fp8_score_a_text_as_bf16_does(quantization: str, tmp_path: Path) -> None:
    if not has("vllm"):
        pytest.skip("backend=vllm is not installed for CUDA")
    asked = ("model=tiny_llama", "backend=vllm", "accelerator=cuda", "precision=bf16")
    base, found = scored(tmp_path, *asked), scored(tmp_path, *asked, f"quantization={quantization}")
    assert found["quality"]["perplexity"] == pytest.approx(base["quality"]["perplexity"], rel=0.05)


@torch.inference_mode()
def test_two_of_four_zeros_fit_the_kernels_for_them() -> None:
    """Weights pruned as by `launcher.compress pattern=2:4` can be converted for torch's semi-structured kernels."""
    torch.manual_seed(0)
    weight = pruned(torch.randn(256, 512), 0.5, "2:4").half().cuda()
    rows = torch.randn(128, 512, device="cuda").half()
    packed = torch.sparse.to_sparse_semi_structured(weight)
    torch.testing.assert_close(linear(rows, packed), linear(rows, weight), rtol=1e-2, atol=1e-1)
