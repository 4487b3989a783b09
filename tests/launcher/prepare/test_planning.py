"""The plan of a run: prompts answered at once, blocks of the KV cache, and the pool that vLLM reserves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest

from launcher.backends.base import Prompt
from launcher.composition.compose import compose_run
from launcher.models import EMBEDDED
from launcher.prepare.planning import plan_of
from launcher.prepare.prepare import prepare
from shards.errors import PlanError, UserError
from shards.plan.plan import Plan

FIELDS = json.loads((EMBEDDED / "tiny_falcon" / "config.json").read_text())
TOKEN_BYTES = 2 * 2 * 4 * 32 * 4  # keys and values, 2 layers, 4 heads, head dimension 32, fp32
MIB = 2**20


def planned(prompts: int | list[int], on_cuda: bool, *overrides: str) -> Plan:
    """The plan of tiny_falcon on one device, with prompts of 100 tokens or of the given lengths, and 20 new tokens."""
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
    assert plan.devices[0].kv_cache_bytes == sequences * 128 * TOKEN_BYTES  # blocks of 16 tokens: 8 for 120 tokens
    assert plan.kv_cache_memory_bytes is None


@pytest.mark.parametrize(
    ("overrides", "pool"),
    [
        (["backend=vllm"], 64 * 1024 * TOKEN_BYTES),
        (["backend=vllm", "backend.max_model_len=128"], 64 * MIB),
        (["backend=vllm", "backend.kv_cache_memory_bytes=12345678"], 12345678),
        (["backend=vllm", "launch=slurm"], None),  # only the nodes know how much of their memory is free
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
    """Tokens/s of `tokens` new tokens in `steps` steps, which read `cached` tokens from the cache in total."""
    return tokens / ((steps * plan.step_bytes + cached * plan.kv_bytes_per_token) / RATE)


def test_ceilings_are_those_of_the_prompts_as_they_are() -> None:
    """One long prompt and 255 short ones, with 20 new tokens each."""
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


def test_what_ranks_without_gpus_need_has_to_fit_the_memory_that_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("backend=fsdp", "measure.batch_size=32", "devices=2")
    devices = planned(64, False, *asked).devices
    needed, memory = sum(device.used_bytes for device in devices), psutil.virtual_memory()

    def machine(total: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=total))

    machine(needed)
    plan = planned(64, False, *asked)
    assert [device.capacity_bytes for device in plan.devices] == [needed // 2] * 2
    assert plan.largest_batch == 32, "of each of the two ranks"
    machine(needed - 2)
    with pytest.raises(PlanError, match=r"of main memory \(weights 0\.\d, .*, the machine has 0\.\d GiB") as caught:
        planned(64, False, *asked)
    assert "measure.batch_size=" in caught.value.hint
    planned(64, False, *asked, "launch=slurm")


def test_a_hint_for_what_fits_no_memory_is_a_machine_that_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=24 * 2**30))
    with pytest.raises(PlanError, match=r"need .* GiB of main memory .*, the machine has 24\.0 GiB") as caught:
        prepare(compose_run(["model=falcon_40b", "dry_run=true"]), ())
    assert caught.value.hint == "machine=2xa6000 precision=bf16 dry_run=true"
    run = prepare(compose_run(["model=falcon_40b", *caught.value.hint.split()]), ())
    assert run.plan is not None
    assert (run.plan.device_name, run.plan.num_devices) == ("RTX A6000", 2)


def test_another_machine_is_planned_for_without_its_packages_and_devices() -> None:
    asked = ["model=falcon_40b", "dry_run=true", "machine=8xH100", "precision=bf16", "backend=vllm"]
    plan = prepare(compose_run([*asked, "backend.python=/nowhere/python"]), ()).plan
    assert plan is not None
    assert (plan.device_name, plan.num_devices, plan.smallest_devices) == ("H100 80 GB", 8, 2)
    assert plan.limit is not None
    apart = prepare(compose_run([*asked, "num_nodes=2"]), ()).plan
    assert apart is not None
    assert apart.limit is None, "what joins the nodes is not known"
    joined = prepare(compose_run([*asked, "num_nodes=2", "link=infiniband_hdr"]), ()).plan
    assert joined is not None
    assert joined.limit is not None


def test_a_device_is_as_it_is_described() -> None:
    figures = ("device.memory=12GiB", "device.bandwidth=300GB/s", "device.flops=50TFLOP/s")
    plan = prepare(
        compose_run(["model=llama_7b", "dry_run=true", "machine=2xgpu", "precision=bf16", *figures]), ()
    ).plan
    assert plan is not None
    assert plan.devices[0].capacity_bytes == 12 * 2**30
    assert plan.bandwidth == 300e9
    assert plan.limit is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["machine=2xa6000"], "machine=2xa6000 is only used with dry_run=true. HINT: dry_run=true"),
        (["dry_run=true", "machine=a6000"], "machine=a6000 has no number of devices. HINT: machine=2xa6000"),
        (["dry_run=true", "machine=2xa600"], "machine=2xa600: a600 is not one of the devices "),
        (
            ["dry_run=true", "machine=2xa6000", "devices=4"],
            "devices=4 is not the number of devices of machine=2xa6000. HINT: devices=2",
        ),
        (["device.memory=48"], "device.memory=48 is not a number with its unit. HINT: device.memory=48GiB"),
        (["device.flops=1e3"], "device.flops=1000.0 is not a number with its unit. HINT: device.flops="),
        (["link=ethernet"], "ethernet is not one of the links "),
    ],
)
def test_a_machine_that_there_is_not_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_run(overrides)
    assert str(caught.value).startswith(message)


def test_engines_are_held_against_each_other_with_as_many_prompts_at_once() -> None:
    """With one prompt at a time, engines that answer it on all devices together have the highest ceiling."""
    asked = ["model=falcon_40b", "dry_run=true", "machine=4xa100_80g", "precision=bf16", "measure.batch_size=1"]
    paces = prepare(compose_run(asked), ()).paces
    assert paces["tensor_parallel"] == pytest.approx(paces["vllm"], rel=0.01)
    assert paces["fsdp"] < paces["transformers"] < paces["vllm"]


def test_a_folder_with_only_a_config_is_planned(tmp_path: Path) -> None:
    shutil.copy(EMBEDDED / "tiny_llama" / "config.json", tmp_path)
    run = prepare(compose_run([f"model.path={tmp_path}", "dry_run=true"]), ())
    assert run.plan is not None
    assert run.plan.num_parameters == 1_049_728
    assert f"{tmp_path} has no weights: the plan is made from its config.json" in run.notes
