"""Compares planned and measured memory: `plan.json` for each device, and the record of a real run of each engine.

Two concurrent sweeps of real runs from the command line: a tiny model with random weights, and a Mistral of about 1 GB
with weights of a checkpoint and a sliding window shorter than the prompts.
"""

from __future__ import annotations

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, launcher

from launcher.config.engines import load_engine
from shards.load.meta import build_meta

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]

ENGINES = ("fsdp", "deepspeed", "tensor_parallel", "vllm", "transformers")
MODELS = ("tiny_llama", "mistral_1gb")
POINTS = [(model, engine) for model in MODELS for engine in ENGINES]
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 30, 2
WINDOW = 17
BLOCK_TOKENS = 128  # tokens per block of vLLM's KV cache on a CPU

MISTRAL_1GB = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "sliding_window": WINDOW,
    "max_position_embeddings": 333,  # so that the 64 sequences of vLLM's pool are not a whole number of blocks
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL_1GB_BYTES = 2 * (2 * 32000 * 2048 + 8 * (2048 * (2 * 2048 + 2 * 512 + 3 * 5504) + 2 * 2048) + 2048)
"""bf16 bytes: embedding and head; in each of 8 layers q and o, k and v, 3 MLP matrices, 2 norms; the last norm."""


def sweep(output_dir: Path, *overrides: str) -> None:
    """Run each installed engine with each model."""
    found = [name for name in ENGINES if all(find_spec(package) for package in load_engine(name).modules())]
    ended = launcher(
        "-m", f"backend={','.join(found)}", "devices=2", "accelerator=cpu", f"output_dir={output_dir}",
        "prompts=synthetic", f"prompts.count={PROMPTS}", f"prompts.input_tokens={PROMPT_TOKENS}",
        f"prompts.output_tokens={NEW_TOKENS}", "measure.warmup=0", "measure.repeats=1", *overrides, timeout=650,
    )  # fmt: skip
    assert ended.code == 0, ended.out[-3000:] + ended.err[-3000:]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """The record of each run by model and engine."""
    folder = tmp_path_factory.mktemp("mistral_1gb")
    (folder / "config.json").write_text(json.dumps(MISTRAL_1GB))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts" / "benchmarks")
        write_safetensors: Any = importlib.import_module("load").write_safetensors
    parameters = build_meta(folder, torch.bfloat16).named_parameters()
    noise = (torch.randn(8 << 20) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    write_safetensors(folder / "model.safetensors", [(n, list(p.shape), p.nbytes) for n, p in parameters], noise)
    large = ("model=tiny_llama", "model.name=mistral_1gb", f"model.path={folder}")
    with ThreadPoolExecutor() as pool:
        started = [
            pool.submit(sweep, folder / "runs", "model=tiny_llama", "model.weights=random"),
            pool.submit(sweep, folder / "runs_1gb", *large, "precision=bf16"),
        ]
        for one in started:
            one.result()
    found = [json.loads(path.read_text()) for path in folder.glob("runs*/*/record.json")]
    return {(record["model"], record["backend"]): record for record in found}


def devices(
    records: dict[tuple[str, str], dict[str, Any]], model: str, engine: str
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(planned, measured) for each device; skips if the engine is not installed."""
    if (model, engine) not in records:
        pytest.skip(f"{engine} is not installed")
    record = records[model, engine]
    assert record["status"] == "ok"
    assert record["num_devices"] == len(record["devices"]) == (1 if engine == "transformers" else 2)
    assert record["world_size"] == len(record["ranks"]) == (1 if engine in ("transformers", "vllm") else 2)
    return list(zip(record["plan"]["devices"], record["devices"], strict=True))


@pytest.mark.parametrize(("model", "engine"), POINTS)
def test_parameters_are_as_planned_to_the_byte(records: Any, model: str, engine: str) -> None:
    pairs = devices(records, model, engine)
    assert [held["parameter_bytes"] for _, held in pairs] == [planned["parameter_bytes"] for planned, _ in pairs]


@pytest.mark.parametrize("engine", ["fsdp", "transformers"])
def test_the_large_model_is_whole(records: Any, engine: str) -> None:
    """The devices together hold the whole model, in engines that neither duplicate nor pad parameters."""
    assert MISTRAL_1GB_BYTES > 950_000_000
    pairs = devices(records, "mistral_1gb", engine)
    assert sum(held["parameter_bytes"] for _, held in pairs) == MISTRAL_1GB_BYTES


@pytest.mark.parametrize(("model", "engine"), [point for point in POINTS if point[1] != "vllm"])
def test_the_slots_of_a_module_are_as_planned_to_the_byte(records: Any, model: str, engine: str) -> None:
    """A slot has room for a prompt and its answer; in layers with a sliding window, for at most the window."""
    places = WINDOW if model == "mistral_1gb" else PROMPT_TOKENS + NEW_TOKENS
    slots = PROMPTS // 2 if engine == "fsdp" else PROMPTS
    for planned, held in devices(records, model, engine):
        expected = slots * places * records[model, engine]["plan"]["kv_bytes_per_token"]
        assert planned["kv_cache_bytes"] == planned["kv_cache_reserved_bytes"] == expected
        assert held["kv_cache_bytes"] == held["kv_cache_reserved_bytes"] == expected


@pytest.mark.parametrize("model", MODELS)
def test_the_cache_of_vllm_is_as_planned(records: Any, model: str) -> None:
    """In use: the blocks of all prompts. Reserved: the whole blocks within the planned bytes."""
    pairs = devices(records, model, "vllm")
    block = BLOCK_TOKENS * records[model, "vllm"]["plan"]["kv_bytes_per_token"]
    for planned, held in pairs:
        assert held["kv_cache_bytes"] == planned["kv_cache_bytes"] == PROMPTS * block
        assert held["kv_cache_reserved_bytes"] == planned["kv_cache_reserved_bytes"] // block * block
    if model == "mistral_1gb":
        assert pairs[0][0]["kv_cache_reserved_bytes"] % block


@pytest.mark.parametrize(("model", "engine"), POINTS)
def test_a_run_has_its_bandwidth_or_the_reason(records: Any, model: str, engine: str) -> None:
    devices(records, model, engine)
    found = records[model, engine]["mbu"]
    assert (found["share"] is None) == (found["reason"] is not None)
    assert found["share"] is None or 0 < found["share"] < 1
