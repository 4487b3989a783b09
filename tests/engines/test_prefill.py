"""A long prompt read in chunks: the peak memory of its activations, as reported by the CPU allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_slots import IDS, answered, decoder, prompts_of
from torch.profiler import ProfilerActivity, profile

from launcher.composition.compose import compose_run
from launcher.config.schema import SamplingConfig
from launcher.prepare.planning import plan_of
from shards.load.meta import build_meta
from shards.load.random_weights import fill_random
from shards.parallel.collectives import Collectives
from shards.parallel.families import keep_kv_heads_only
from shards.parallel.tensor_parallel import tensor_parallel_model

SHAPE: dict[str, Any] = {
    "vocab_size": 304, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, **IDS,
}  # fmt: skip
FAMILIES = {
    "llama": {**SHAPE, "model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 768},
    "falcon": {
        **SHAPE, "model_type": "falcon", "num_kv_heads": 2, "new_decoder_architecture": True, "bias": False,
        "ffn_hidden_size": 1152,
    },
}  # fmt: skip
SAMPLING = SamplingConfig(max_new_tokens=2, ignore_eos=True)
LENGTH = 2000
CHUNK, WHOLE = 160, 4096


def rank_of(fields: dict[str, Any], size: int) -> torch.nn.Module:
    """The first of `size` ranks of a tensor-parallel model, without the others: an all-reduce adds nothing, and an
    all-gather repeats its own part."""
    ways = Collectives("alone", lambda tensor: None, lambda out, part: out.copy_(part.expand_as(out)))
    model = build_meta(fields, torch.float32)
    keep_kv_heads_only(model)
    tensor_parallel_model(model, 0, size, ways)
    fill_random(model, 0, "cpu")
    return model


def peak_bytes(model: torch.nn.Module, length: int, chunk: int) -> int:
    """The peak of allocated bytes while a prompt is read, relative to the bytes before."""
    engine = decoder(model, 1, length + 2, chunk)
    answered(engine, prompts_of((1,)), SAMPLING)  # allocates the cache
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        answered(engine, prompts_of((length,)), SAMPLING)
    now = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def planned_bytes(engine: str, fields: dict[str, Any], size: int, length: int, chunk: int) -> int:
    asked = [f"backend={engine}", f"devices={size}", "accelerator=cpu", f"measure.prefill_tokens={chunk}"]
    config = compose_run([*asked, "measure.batch_size=1", "sampling.max_new_tokens=2"])
    plan = plan_of(config, fields, None, prompts_of((length,)), on_cuda=False)
    assert plan is not None
    return plan.devices[0].activation_bytes


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("engine", "size"), [("transformers", 1), ("tensor_parallel", 2)])
def test_chunks_bound_the_activations_of_a_long_prompt(engine: str, size: int, family: str) -> None:
    fields = FAMILIES[family]
    model = rank_of(fields, size)
    found = {chunk: peak_bytes(model, LENGTH, chunk) for chunk in (CHUNK, WHOLE)}
    assert found[CHUNK] < 0.25 * found[WHOLE]
    for chunk, most in found.items():
        assert most <= planned_bytes(engine, fields, size, LENGTH, chunk)
