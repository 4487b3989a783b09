"""What a run asks of its plan: prompts answered at once, blocks of the cache, and the pool that vLLM is to reserve."""

from __future__ import annotations

import json

import pytest

from launcher.backend import Prompt
from launcher.compose import compose_run
from launcher.models import EMBEDDED
from launcher.planning import plan_of
from shards.plan import Plan

FIELDS = json.loads((EMBEDDED / "tiny_falcon" / "config.json").read_text())
TOKEN_BYTES = 2 * 2 * 4 * 32 * 4  # keys and values in 2 layers of 4 heads of 32 numbers in fp32
MIB = 2**20


def planned(prompts: int, on_cuda: bool, *overrides: str) -> Plan:
    """The plan of tiny_falcon on one device with prompts of 100 tokens that get 20 more."""
    config = compose_run(["model=tiny_falcon", "devices=1", "sampling.max_new_tokens=20", *overrides])
    return plan_of(config, FIELDS, None, [Prompt(place, "", (1,) * 100) for place in range(prompts)], on_cuda)


@pytest.mark.parametrize(
    ("prompts", "overrides", "tokens"),
    [
        (20, ["backend=transformers"], 4 * 120),
        (3, ["backend=deepspeed"], 3 * 120),
        (5, ["backend=fsdp", "devices=2"], 3 * 120),
        (20, ["backend=fsdp", "devices=2", "measure.batch_size=8"], 8 * 120),
        (20, ["backend=vllm"], 20 * 128),
        (20, ["backend=vllm", "backend.max_num_seqs=8"], 8 * 128),
        (20, ["backend=vllm", "+backend.extra={max_num_seqs: 6, block_size: 32}"], 6 * 128),
        (20, ["backend=vllm", "+backend.extra={block_size: 50}"], 20 * 150),
        (600, ["backend=vllm", "backend.kv_cache_memory_bytes=10000000000"], 256 * 128),
    ],
)
def test_the_cache_of_all_that_is_answered_at_once(prompts: int, overrides: list[str], tokens: int) -> None:
    assert planned(prompts, False, *overrides).devices[0].kv_cache_bytes == tokens * TOKEN_BYTES


@pytest.mark.parametrize(("card", "sequences"), [("a6000", 256), ("a100_80g", 256), ("h100", 1024), ("h200", 1024)])
def test_vllm_takes_more_at_once_on_large_cards(card: str, sequences: int) -> None:
    plan = planned(2000, True, "backend=vllm", "launch=slurm", f"cluster.device={card}")
    assert plan.devices[0].kv_cache_bytes == sequences * 128 * TOKEN_BYTES  # 16 tokens a block: 8 of them
    assert plan.kv_cache_memory_bytes is None


@pytest.mark.parametrize(
    ("overrides", "pool"),
    [
        (["backend=vllm"], 64 * 1024 * TOKEN_BYTES),
        (["backend=vllm", "backend.max_model_len=128"], 64 * MIB),
        (["backend=vllm", "backend.kv_cache_memory_bytes=12345678"], 12345678),
        (["backend=vllm", "launch=slurm"], None),  # only the nodes can see how much of their memory is free
        (["backend=fsdp"], None),
    ],
)
def test_the_pool_on_a_cpu(overrides: list[str], pool: int | None) -> None:
    plan = planned(1, False, *overrides)
    assert plan.kv_cache_memory_bytes == pool
    needed = (128 if "backend=vllm" in overrides else 120) * TOKEN_BYTES
    assert plan.devices[0].kv_cache_reserved_bytes == (pool or needed)
