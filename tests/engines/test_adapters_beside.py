"""Unmerged adapters in vLLM, one for all prompts or several by name: peft's tokens, and bytes as planned."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from running import ROOT, command_line, launcher, run
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from launcher.models import EMBEDDED
from shards.engines.vllm import VllmPlanner
from shards.errors import PlanError
from shards.model.known_shape import known_shape

ADAPTER, MODEL = EMBEDDED / "tiny_llama_adapter", EMBEDDED / "tiny_llama"
QUESTION = "What is your return policy?"


def second_adapter(folder: Path) -> Path:
    """An adapter with another rank and fewer modules than the embedded one."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    wanted = LoraConfig(r=12, lora_alpha=360, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(base, wanted).save_pretrained(folder)
    return folder


def prompt_file(path: Path, *adapters: str | None) -> Path:
    rows = [{"prompt": QUESTION} | ({"adapter": name} if name else {}) for name in adapters]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_each_prompt_is_answered_by_the_adapter_that_it_names(devices: int, tmp_path: Path) -> None:
    other = second_adapter(tmp_path / "other")
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(QUESTION).ids
    program = [sys.executable, str(ROOT / "tests" / "programs" / "peft_program.py"), str(MODEL)]
    expected = run([*program, ",".join(map(str, ids)), f"ours={ADAPTER}", f"other={other}"]).last_json
    assert len({tuple(answer) for answer in expected.values()}) == 3
    asked = ("ours", None, "other", "ours")
    ended = launcher(
        "backend=vllm", "model=tiny_llama", f"devices={devices}", f"adapter.paths={{ours: {ADAPTER}, other: {other}}}",
        "prompts=file", f"prompts.path={prompt_file(tmp_path / 'prompts.jsonl', *asked)}", "sampling.max_new_tokens=24",
        "measure.repeats=1", "measure.warmup=0", f"output_dir={tmp_path / 'runs'}", timeout=240,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    [run_dir] = (tmp_path / "runs").iterdir()
    made = [json.loads(line)["token_ids"] for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    assert made == [expected[name or ""][: len(tokens)] for name, tokens in zip(asked, made, strict=True)]
    assert all(len(tokens) == 24 or tokens[-1] == 0 for tokens in made)
    record = json.loads((run_dir / "record.json").read_text())
    held = [device["parameter_bytes"] for device in record["devices"]]
    assert held == [device["parameter_bytes"] for device in record["plan"]["devices"]]


def test_vllm_has_room_for_all_adapters_in_whole_modules() -> None:
    shape = known_shape(json.loads((MODEL / "config.json").read_text()))
    q_proj = "model.layers.0.self_attn.q_proj"
    added = VllmPlanner(adapter_slots=2).factors(shape, [{(q_proj, "A"): (12, 128), (q_proj, "B"): (128, 12)}] * 2)
    modules = {parameter.name.split(".")[-2] for parameter in added}
    assert modules == {"q_proj", "k_proj", "v_proj"}
    assert {parameter.shape for parameter in added if parameter.name.endswith("lora_a")} == {(2 * 16, 128)}
    assert len(added) == 2 * 3 * shape.num_layers


def test_what_vllm_does_not_adapt_is_refused() -> None:
    falcon = known_shape(json.loads((EMBEDDED / "tiny_falcon" / "config.json").read_text()))
    dense = "transformer.h.0.self_attention.dense"
    with pytest.raises(PlanError, match="keeps no adapter beside the weights of falcon, but of llama, mistral"):
        VllmPlanner().factors(falcon, [{(dense, "A"): (4, 128), (dense, "B"): (128, 4)}])
    llama = known_shape(json.loads((MODEL / "config.json").read_text()))
    with pytest.raises(PlanError, match="for lm_head, which the model does not have or vllm adapts otherwise"):
        VllmPlanner().factors(llama, [{("lm_head", "A"): (4, 128), ("lm_head", "B"): (768, 4)}])
    down = "model.layers.0.mlp.down_proj"
    with pytest.raises(PlanError, match="An adapter has rank 600, and vllm takes 512 at most"):
        VllmPlanner().factors(llama, [{(down, "A"): (600, 384), (down, "B"): (128, 600)}])


NAMED = "adapter.paths={a: embedded:tiny_llama_adapter}"
REFUSALS = {
    "backend=fsdp supports one adapter for all prompts. HINT: backend=vllm": ("backend=fsdp", NAMED),
    "prompts=seed assigns no adapter to a prompt. HINT: prompts=file": ("backend=vllm", NAMED),
    "beside which adapter.path and adapter.merge are not read": (
        "backend=vllm", NAMED, "adapter.path=embedded:tiny_llama_adapter",
    ),
    "names the adapter 'b', and adapter.paths has a. HINT: ": ("backend=vllm", NAMED, "b"),
    "No prompt of ": ("backend=vllm", NAMED, ""),
    "backend=vllm does not merge adapters. HINT: adapter.merge=false": (
        "backend=vllm", "adapter.path=embedded:tiny_llama_adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSALS)
def test_names_that_cannot_be_had_are_one_line(message: str, tmp_path: Path) -> None:
    *words, last = REFUSALS[message]
    if "=" not in last:
        words += ["prompts=file", f"prompts.path={prompt_file(tmp_path / 'prompts.jsonl', last or None)}"]
    else:
        words.append(last)
    ended = command_line("model=tiny_llama", "devices=1", *words, f"output_dir={tmp_path}", "dry_run=true")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert message in ended.err
