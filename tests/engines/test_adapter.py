"""LoRA adapters merged while weights are read: every engine gives the logits of peft's model, quantized or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from running import launcher
from transformers import AutoModelForCausalLM

from launcher.models import EMBEDDED
from shards.checkpoint.checkpoint import Checkpoint
from shards.load.adapter import read_adapter
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.parallel.adapters import attach_adapter, fill_adapter

ADAPTER = EMBEDDED / "tiny_llama_adapter"
IDS = torch.tensor([[5, 77, 301, 12, 9, 44, 130, 8]])
QUESTION, ANSWER = "What is your return policy?", " Bring it back to any of our shops before the end of the month."


def merged(model: str, folder: Path) -> torch.nn.Module:
    module = build_meta(EMBEDDED / model, torch.float32)
    load_weights(module, Checkpoint.open(EMBEDDED / model), "cpu", adapter=read_adapter(folder))
    return module


@pytest.mark.slow
@torch.inference_mode()
def test_logits_are_those_of_peft() -> None:
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny_llama", dtype=torch.float32)
    plain = base(IDS).logits
    expected = PeftModel.from_pretrained(base, ADAPTER)(IDS).logits
    logits = merged("tiny_llama", ADAPTER)(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - plain).abs().max() > 1


@pytest.mark.slow
@torch.inference_mode()
def test_factors_beside_the_weights_give_the_logits_of_peft() -> None:
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny_llama", dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, ADAPTER)(IDS).logits
    module, adapter = build_meta(EMBEDDED / "tiny_llama", torch.float32), read_adapter(ADAPTER)
    attach_adapter(module, adapter)
    load_weights(module, Checkpoint.open(EMBEDDED / "tiny_llama"), "cpu")
    fill_adapter(module, adapter)
    torch.testing.assert_close(module(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    factors = [name for name, _ in module.named_parameters() if "weight_lora" in name]
    assert len(factors) == 2 * len(adapter.factors)


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"rank_pattern": {"dense": 2}}], ids=["rslora", "ranks"])
def test_ranks_and_scales_of_a_falcon(settings: dict[str, object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny_falcon", dtype=torch.float32)
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    adapted = get_peft_model(
        base,
        LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **settings),  # type: ignore[arg-type]
    )
    adapted.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = adapted.eval()(IDS).logits
        torch.testing.assert_close(merged("tiny_falcon", tmp_path)(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "more"),
    [
        ("tensor_parallel", ()), ("deepspeed", ()), ("transformers", ("quantization=nf4", "devices=1")),
        ("fsdp", ("quantization=int8_wo",)), ("transformers", ("adapter.merge=false", "devices=1")),
        ("tensor_parallel", ("adapter.merge=false",)), ("vllm", ("adapter.merge=false",)),
        ("fsdp", ("adapter.merge=false", "quantization=nf4")),
    ],
)  # fmt: skip
def test_every_engine_answers_by_the_adapter(backend: str, more: tuple[str, ...], tmp_path: Path) -> None:
    ended = launcher(
        f"backend={backend}", "model=tiny_llama", "adapter.path=embedded:tiny_llama_adapter", *more,
        f"prompts.texts=['{QUESTION}']", "measure.repeats=1", "measure.warmup=0", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    [run_dir] = tmp_path.iterdir()
    [completion] = map(json.loads, (run_dir / "completions.jsonl").read_text().splitlines())
    assert completion["text"] == ANSWER
    record = json.loads((run_dir / "record.json").read_text())
    assert record["config"]["adapter"]["path"] == str(ADAPTER)
    held = [device["parameter_bytes"] for device in record["devices"]]
    assert held == [device["parameter_bytes"] for device in record["plan"]["devices"]]


def _set(**values: object):  # type: ignore[no-untyped-def]
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


LLAMA, NOTHING = "model=tiny_llama", _set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "asked", "message"),
    [
        (_set(peft_type="IA3"), [LLAMA], "is an adapter of type IA3, not LORA. HINT: an adapter of type LORA"),
        (_set(use_dora=True), [LLAMA], "has DoRA, which is not merged here. HINT: merge it with peft and run that"),
        (_without_weights, [LLAMA], "has no adapter_model.safetensors. HINT: a folder that peft has saved"),
        (NOTHING, ["model=tiny_falcon"], "which the model does not have. HINT: the adapter of this model"),
        (NOTHING, [LLAMA, "backend=vllm"], "backend=vllm does not merge adapters. HINT: adapter.merge=false, or"),
        (
            NOTHING,
            [LLAMA, "backend=deepspeed", "adapter.merge=false"],
            "does not support unmerged adapters. HINT: adapter.merge=true",
        ),
        (NOTHING, [LLAMA, "model.weights=random"], "model.weights=random are not. HINT: adapter.path=null"),
    ],
)
def test_what_cannot_be_merged_is_one_line(change, asked: list[str], message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTER, folder)
    change(folder)
    ended = launcher(*asked, "devices=1", f"adapter.path={folder}", f"output_dir={tmp_path / 'runs'}")
    assert ended.code in (1, 2)
    assert message in ended.err
    assert "Traceback" not in ended.err
