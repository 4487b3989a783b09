"""Speculative decoding in a plan: bytes of the draft model per device, and a ceiling with several tokens per step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml
from planners import PLANNERS
from running import ROOT

from shards.errors import PlanError
from shards.machine.hardware import DEVICES, LINKS
from shards.model.known_shape import known_shape
from shards.model.shape import ModelShape
from shards.plan.plan import Plan, make_plan
from shards.plan.request import PlanRequest


def preset(name: str) -> ModelShape:
    return known_shape(yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text())["config"])


LARGE, DRAFT = preset("llama2_13b"), preset("llama2_7b")
WINDOW = 100
BATCH, PROMPT, NEW, GUESSES = 3, 500, 100, 5


def planned(engine: str, devices: int, draft: ModelShape | None = None, guesses: int = 0, **changes: Any) -> Plan:
    return make_plan(
        PlanRequest(
            shape=LARGE,
            engine=replace(PLANNERS[engine], prefill_tokens=2048),
            devices=devices,
            device=DEVICES["h200"],
            link=LINKS["nvlink4"],
            batch_size=BATCH,
            prompt_tokens=PROMPT,
            max_new_tokens=NEW,
            guessed_tokens=guesses,
            draft=draft,
            **changes,
        )
    )


@pytest.mark.parametrize(("engine", "on"), [("fsdp", 2), ("tensor_parallel", 2), ("transformers", 1)])
def test_a_draft_is_whole_in_each_process_and_has_a_cache_of_its_own(engine: str, on: int) -> None:
    devices = 2
    plain, drafted = planned(engine, devices), planned(engine, devices, DRAFT, GUESSES)
    weights, places = 2 * DRAFT.num_parameters, PROMPT + NEW + GUESSES
    cache = BATCH * places * 2 * 32 * 32 * 128 * 2  # keys and values, layers, heads, head dimension, bytes
    held = [(device.draft_parameter_bytes, device.draft_cache_bytes) for device in drafted.devices]
    assert held == [(weights, cache)] * on + [(0, 0)] * (devices - on)
    assert drafted.slot_tokens == places
    before, after = plain.devices[0], drafted.devices[0]
    assert after.kv_cache_bytes * (PROMPT + NEW) == before.kv_cache_bytes * places
    more = after.kv_cache_bytes - before.kv_cache_bytes + after.activation_bytes - before.activation_bytes
    assert after.used_bytes - before.used_bytes == weights + cache + more
    assert drafted.load_device_bytes - plain.load_device_bytes == weights
    assert Plan.from_dict(drafted.to_dict()) == drafted


def test_a_window_keeps_its_tokens_beside_the_guesses() -> None:
    windowed = replace(DRAFT, windows=(WINDOW,) * DRAFT.num_layers)
    cache = planned("fsdp", 2, windowed, GUESSES).devices[0].draft_cache_bytes
    assert cache == BATCH * (WINDOW + GUESSES) * 2 * 32 * 32 * 128 * 2


def test_the_ceiling_is_that_of_guesses_which_all_hold() -> None:
    plain, looked_up, drafted = (
        planned("transformers", 1, shape, guesses).limit for shape, guesses in ((None, 0), (None, 5), (DRAFT, 5))
    )
    assert plain is not None
    assert looked_up is not None
    assert drafted is not None
    assert looked_up.tokens_per_s == pytest.approx(6 * plain.tokens_per_s)
    assert looked_up.seconds == plain.seconds
    drafting = 5 * 2 * DRAFT.step_parameters / (DEVICES["h200"].bandwidth or 0)
    assert drafted.seconds == pytest.approx(plain.seconds + drafting)
    assert drafted.tokens_per_s == pytest.approx(6 * plain.tokens_per_s * plain.seconds / drafted.seconds)
    slow = planned("transformers", 1, LARGE, 5).limit
    assert slow is not None
    assert slow.tokens_per_s <= plain.tokens_per_s * 1.05, "a draft as large as its target gains nothing"


def test_vllm_cuts_a_draft_as_it_does_the_model_and_keeps_its_cache_in_the_pool() -> None:
    request = PlanRequest(
        shape=LARGE, engine=PLANNERS["vllm"], devices=2, device=DEVICES["h200"], link=LINKS["nvlink4"],
        guessed_tokens=GUESSES, draft=DRAFT,
    )  # fmt: skip
    plan, plain = make_plan(request), make_plan(replace(request, draft=None))
    for device, before in zip(plan.devices, plain.devices, strict=True):
        assert DRAFT.num_parameters < device.draft_parameter_bytes < 1.01 * DRAFT.num_parameters, (
            "half, and norms whole"
        )
        assert device.draft_cache_bytes == 0
        assert device.kv_cache_bytes > before.kv_cache_bytes
        assert device.kv_cache_reserved_bytes < before.kv_cache_reserved_bytes - device.draft_parameter_bytes + 1
    uneven = replace(DRAFT, num_attention_heads=31)
    with pytest.raises(PlanError, match="The draft model: 31 attention heads cannot be divided by 2 devices"):
        make_plan(replace(request, draft=uneven))
