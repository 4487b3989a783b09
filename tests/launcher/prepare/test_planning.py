"""What a run asks of its plan: prompts answered at once, blocks of the cache, and the pool that vLLM is to reserve."""

from __future__ import annotations

import json

import psutil
import pytest

from launcher.backends.base import Prompt
from launcher.config.compose import compose_run
from launcher.models import EMBEDDED
from launcher.prepare.planning import plan_of
from shards.errors import PlanError
from shards.plan.plan import Plan

FIELDS = json.loads((EMBEDDED / "tiny_falcon" / "config.json").read_text())
TOKEN_BYTES = 2 * 2 * 4 * 32 * 4  # keys and values in 2 layers of 4 heads of 32 numbers in fp32
MIB = 2**20


def planned(prompts: int | list[int], on_cuda: bool, *overrides: str) -> Plan:
    """The plan of tiny_falcon on one device with prompts of 100 tokens, or of these lengths, that get 20 more."""
    config = compose_run(["model=tiny_falcon", "devices=1", "sampling.max_new_tokens=20", *overrides])
    lengths = [100] * prompts if isinstance(prompts, int) else prompts
    asked = [Prompt(place, "", (1,) * length) for place, length in enumerate(lengths)]
    return plan_of(config, FIELDS, None, asked, on_cuda)


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


def test_options_of_vllm_that_change_the_plan() -> None:
    card = ("backend=vllm", "launch=slurm", "cluster.device=a6000")
    plain, fewer, narrow = (
        planned(20, True, *card, *more)
        for more in ([], ["+backend.extra.max_num_batched_tokens=100"], ["+backend.extra.kv_cache_dtype=fp8"])
    )
    assert fewer.devices[0].activation_bytes < plain.devices[0].activation_bytes
    assert 4 * narrow.kv_bytes_per_token == plain.kv_bytes_per_token == TOKEN_BYTES
    assert 4 * narrow.devices[0].kv_cache_bytes == plain.devices[0].kv_cache_bytes


@pytest.mark.parametrize("option", ["pipeline_parallel_size=2", "data_parallel_size=2", "kv_cache_dtype=nvfp4"])
def test_what_a_plan_cannot_follow_is_refused(option: str) -> None:
    with pytest.raises(PlanError, match=f"backend.extra.{option}"):
        planned(1, True, "backend=vllm", f"+backend.extra.{option}")


CARD = ("precision=bf16", "launch=slurm", "cluster.device=a6000")
RATE = 768e9


def decode_ceiling(plan: Plan, steps: int, tokens: int, cached: int) -> float:
    """Tokens/s of `tokens` in so many steps that find so many tokens in the cache, all of them together."""
    return tokens / ((steps * plan.step_bytes + cached * plan.kv_bytes_per_token) / RATE)


def test_ceilings_are_those_of_the_prompts_as_they_are() -> None:
    """One long prompt and 255 short ones, which get 20 tokens each."""
    lengths = [7] * 255 + [900]
    for engine, scheduling, steps, cached in (
        ("vllm", "continuous", 20, 900 + 255 * 7),
        ("transformers", "continuous", 20 * 64, 900 + 255 * 7),
        ("transformers", "static", 20 * 64, 4 * 900 + 252 * 7),
        ("fsdp", "static", 20 * 64, 4 * 900 + 252 * 7),
    ):
        plan = planned(lengths, True, *CARD, f"backend={engine}", f"measure.scheduling={scheduling}")
        assert plan.limit is not None
        expected = decode_ceiling(plan, steps, 20 * 256, 20 * (cached + 256 * 10))
        assert plan.limit.tokens_per_s == pytest.approx(expected), engine


def test_no_step_reads_more_cache_than_the_pool_holds() -> None:
    pool = 400 * TOKEN_BYTES // 2
    plan = planned(256, True, *CARD, "backend=vllm", f"backend.kv_cache_memory_bytes={pool}")
    assert plan.limit is not None
    assert plan.limit.seconds == pytest.approx((plan.step_bytes + pool) / RATE)


def test_a_ceiling_is_of_the_ranks_that_have_a_prompt() -> None:
    two, one = (planned(prompts, True, *CARD, "backend=fsdp") for prompts in (2, 1))
    assert one.limit is not None
    assert one.limit.tokens_per_s == pytest.approx(1 / one.limit.seconds)
    assert two.limit is not None


def test_what_ranks_without_gpus_hold_of_their_own_has_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 sequences the cache alone; weights where they are made, not where they are mapped."""
    sequences, weights = 64 * 120 * TOKEN_BYTES, planned(1, False, "backend=fsdp").devices[0].parameter_bytes
    asked = ("backend=fsdp", "measure.batch_size=64")
    memory = psutil.virtual_memory()

    def machine(total: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=total))

    machine(sequences)
    planned(64, False, *asked)
    with pytest.raises(
        PlanError, match=r"The ranks here need 0\.0 GiB of their own, and this machine has 0\.0 GiB total"
    ):
        planned(64, False, *asked, "model.weights=random")
    planned(64, False, *asked, "model.weights=random", "launch=slurm")
    machine(sequences + weights)
    planned(64, False, *asked, "model.weights=random")
    machine(sequences - 1)
    with pytest.raises(PlanError, match="HINT: more nodes, fewer prompts at once, or a narrower precision"):
        planned(64, False, *asked)
