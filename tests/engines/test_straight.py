"""Straight decode steps: bit-exact with the model's own steps, and not used if they would differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_slots import answered, decoder, fields, made, prompts_of

from launcher.backends.slots.device import Slots
from launcher.backends.slots.drafting.guesses import Lookup
from launcher.backends.slots.straight import StraightStep, straight_step
from launcher.config.schema import SamplingConfig
from shards.parallel.families import keep_kv_heads_only
from shards.parallel.fused import fuse_norms, fuse_rotations
from shards.parallel.products import fuse_projections

PROMPTS = prompts_of((5, 9, 7, 12))
SAMPLING = SamplingConfig(max_new_tokens=12, ignore_eos=True)


def model_of(family: str, **changed: Any) -> Any:
    model = made(family, fields(family) | changed)
    keep_kv_heads_only(model)
    return model


@pytest.mark.parametrize("ahead", [0, 3], ids=["one token", "guesses"])
@pytest.mark.parametrize("is_fused", [False, True], ids=["as it is", "fused"])
@pytest.mark.parametrize("family", ["arcee", "ernie4_5", "falcon", "helium", "llama", "mistral", "qwen2"])
def test_logits_are_those_of_the_model(
    monkeypatch: pytest.MonkeyPatch, family: str, is_fused: bool, ahead: int
) -> None:
    model, unequal, steps = model_of(family), [], 0
    if is_fused:
        fuse_projections(model, 1)
        fuse_norms(model)
        fuse_rotations(model)

    def compared(self: Slots, ids: torch.Tensor, positions: torch.Tensor, mask: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        logits = decode(self, ids, positions, mask).clone()
        if not torch.equal(logits, self._all_logits(ids, positions, mask, ids.shape[1])):
            unequal.append(steps)
        return logits

    decode = Slots.decode
    monkeypatch.setattr(Slots, "decode", compared)
    engine = decoder(model, 3, 40, 2048)
    if ahead:
        engine.guesser, engine.ahead = Lookup(3, 1, engine.device), ahead
    answered(engine, PROMPTS, SAMPLING)
    assert engine.slots is not None
    assert isinstance(engine.slots.straight, StraightStep)
    assert steps > 5
    assert unequal == []


def test_a_step_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("llama")
    expected = answered(decoder(model, 3, 40, 2048), PROMPTS, SAMPLING)
    step = StraightStep.__call__

    def misplaced(self: StraightStep, ids: torch.Tensor, positions: torch.Tensor, *others: Any) -> torch.Tensor:
        return step(self, ids, positions.clamp(max=0), *others)

    monkeypatch.setattr(StraightStep, "__call__", misplaced)
    engine = decoder(model, 3, 40, 2048)
    answers = answered(engine, PROMPTS, SAMPLING)
    assert engine.slots is not None
    assert engine.slots.straight is None
    for answer, other in zip(answers.completions, expected.completions, strict=True):
        assert (answer.token_ids, answer.top2_gaps) == (other.token_ids, other.top2_gaps), "keys of it are left"
    assert "the straight one has other logits" in capsys.readouterr().out


OLD_FALCON = {"new_decoder_architecture": False, "multi_query": True}


@pytest.mark.parametrize("changed", [OLD_FALCON, {"bias": True}, {"num_ln_in_parallel_attn": 1}])
def test_falcons_of_all_kinds_have_one(changed: dict[str, Any]) -> None:
    engine = decoder(model_of("falcon", **changed), 3, 40, 2048)
    answered(engine, PROMPTS, SAMPLING)
    assert engine.slots is not None
    assert engine.slots.straight is not None, "checked against the model's own step"


@pytest.mark.parametrize("changed", [{"alibi": True}, {"parallel_attn": False, **OLD_FALCON}])
def test_falcons_whose_layers_are_others_have_none(changed: dict[str, Any]) -> None:
    assert decoder(model_of("falcon", **changed), 3, 40, 2048).ready(40).straight is None


@pytest.mark.parametrize("family", ["gemma", "gemma2", "olmo2", "qwen3"])
def test_other_families_have_none(family: str) -> None:
    engine = decoder(model_of(family), 3, 40, 2048)
    assert engine.ready(40).straight is None


def test_layers_of_several_kinds_have_none() -> None:
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    assert decoder(model_of("qwen2", **window), 3, 40, 2048).ready(40).straight is None


def test_modules_with_hooks_or_other_forwards_have_none() -> None:
    model = model_of("llama")
    assert decoder(model, 3, 40, 2048).ready(40).straight is not None
    hook = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert straight_step(model) is None
    hook.remove()
    assert straight_step(model) is not None
    model.model.layers[1].mlp.forward = model.model.layers[0].mlp.forward
    assert straight_step(model) is None
