"""Mixed precision on every engine that supports it: Fabric's logits and the planned bytes; other engines refuse it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from running import command_line, ranks_of
from transformers import AutoModelForCausalLM

from launcher.config.engines import load_engine
from launcher.models import EMBEDDED

MODELS = ("tiny_falcon", "tiny_llama")
WORLDS = (("transformers", 1), ("fsdp", 1), ("fsdp", 2), ("tensor_parallel", 2))
IDS = torch.tensor([[5, 77, 301, 12, 9, 44, 130, 8]])


@cache
def ranks(name: str, size: int) -> list[dict[str, Any]]:
    """The results of all ranks of one engine, by model and dtype."""
    with TemporaryDirectory() as out:
        ended = ranks_of("precision_program.py", size, name, str(size), out)
        assert ended.code == 0, ended.err[-3000:]
        return [torch.load(Path(out) / f"rank_{rank}.pt") for rank in range(size)]


@cache
@torch.inference_mode()
def of_fabric(model: str, precision: str) -> torch.Tensor:
    """The logits of transformers' model under Fabric, which supports fp16 on a CPU only with an explicit plugin."""
    whole = AutoModelForCausalLM.from_pretrained(EMBEDDED / model, dtype=torch.float32)
    if precision == "fp16_mixed":
        fabric = Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu")])
    else:
        fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    logits: torch.Tensor = fabric.setup(whole)(IDS).logits[0]
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16_mixed", "fp16_mixed"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "size"), WORLDS)
def test_logits_are_those_of_fabric(name: str, size: int, model: str, precision: str) -> None:
    """Bit-exact if each rank computes whole products; sums over ranks are rounded differently."""
    expected = of_fabric(model, precision)
    for rank in ranks(name, size):
        logits = rank[f"{model} {precision}"]["logits"]
        if load_engine(name)().data_parallel or size == 1:
            assert torch.equal(logits, expected)
        else:
            torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), WORLDS)
def test_bytes_are_those_of_the_plan(name: str, size: int) -> None:
    for rank in ranks(name, size):
        for point in rank.values():
            for what in ("parameters", "cache", "gathered"):
                measured, planned = point[what]
                assert measured == planned, what


@pytest.mark.parametrize("backend", ["vllm", "deepspeed", "dummy"])
def test_an_engine_without_it_names_one_that_has_it(backend: str, tmp_path: Path) -> None:
    ended = command_line(f"backend={backend}", "precision=bf16_mixed", f"output_dir={tmp_path}", "dry_run=true")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert f"{backend} multiplies weights in the type that they have" in ended.err
    assert "HINT: backend=fsdp" in ended.err


def test_quantized_weights_are_not_those_of_mixed_precision(tmp_path: Path) -> None:
    asked = ("backend=transformers", "precision=bf16_mixed", "quantization=nf4", "dry_run=true")
    ended = command_line(*asked, f"output_dir={tmp_path}")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "Mixed precision is of fp32 weights, and these are in nf4. HINT: precision=bf16" in ended.err
