"""Every real engine on a CPU: the same tokens for the same prompts, and the memory that each rank should hold."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from rank_program import UNLIKE, UNLIKE_SLOTS, unlike_texts
from running import ROOT, launcher, ranks_of, run
from safetensors import safe_open

from launcher.config.engines import load_engine, names
from launcher.models import EMBEDDED

pytestmark = pytest.mark.slow  # every test starts engines in separate processes

MODELS = ("tiny_falcon", "tiny_llama")
SIZES = {"transformers": (1,), "deepspeed": (2,), "endpoint": (), "litgpt": ()}
"""Numbers of devices for engines that are not tested on one and on two; an endpoint needs a server (test_endpoint.py),
LitGPT a separate environment (test_litgpt.py)."""

WORLDS = [(name, size) for name in names() for size in SIZES.get(name, (1, 2))]
REAL = [(name, size) for name, size in WORLDS if load_engine(name).needs_weights]

UNLIKE_WORLDS = [(name, size) for name, size in REAL] + [("deepspeed", 1)]
ONLY = {("fsdp", 3): ["greedy"], ("deepspeed", 1): ["unlike"]}
"""The only scenarios to run in worlds that a single test uses."""


@cache
def ranks(name: str, size: int, model: str) -> list[dict[str, Any]]:
    """The results of all ranks of one engine."""
    processes = size if load_engine(name).one_process_per_device else 1
    with TemporaryDirectory() as out:
        limit = 280  # the first run of DeepSpeed compiles an operation
        asked = (name, model, out, str(size), *ONLY.get((name, size), ()))
        ended = ranks_of("rank_program.py", processes, *asked, timeout=limit)
        assert ended.code == 0, ended.err[-3000:]
        return [json.loads((Path(out) / f"rank_{rank}.json").read_text()) for rank in range(processes)]


def completions(name: str, size: int, model: str, scenario: str) -> list[dict[str, Any]]:
    """The completions of all ranks in prompt order."""
    seen = ranks(name, size, model)
    answering = seen if load_engine(name)().data_parallel else seen[:1]
    made = [item for rank in answering for item in rank["completions"][scenario]]
    return sorted(made, key=lambda item: item["index"])


def tokens(name: str, size: int, model: str, scenario: str) -> list[list[int]]:
    return [item["token_ids"] for item in completions(name, size, model, scenario)]


@pytest.mark.parametrize("model", MODELS)
def test_the_reference_gives_the_tokens_of_model_generate(model: str) -> None:
    ended = run([sys.executable, str(ROOT / "tests" / "programs" / "generate_program.py"), str(EMBEDDED / model)])
    assert ended.code == 0, ended.err
    expected = ended.last_json
    for scenario in expected:
        assert tokens("transformers", 1, model, scenario) == expected[scenario]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "size"), REAL[1:])
def test_every_engine_gives_the_tokens_of_the_reference(name: str, size: int, model: str) -> None:
    for scenario in ("greedy", "ignore_eos", "one prompt", "ended prompt"):
        assert tokens(name, size, model, scenario) == tokens("transformers", 1, model, scenario), scenario


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "size"), [world for world in REAL if load_engine(world[0]).has_slots])
def test_guesses_change_no_token(name: str, size: int, model: str) -> None:
    """With n-gram and draft-model speculation, with and without EOS: the tokens of the same engine without it."""
    for kind in ("ngram", "draft"):
        for scenario in ("greedy", "ignore_eos"):
            with_guesses = completions(name, size, model, f"{kind} {scenario}")
            assert [item["token_ids"] for item in with_guesses] == tokens(name, size, model, scenario), kind
            ends = [item["finish_reason"] for item in completions(name, size, model, scenario)]
            assert [item["finish_reason"] for item in with_guesses] == ends
            assert any(gap == 0 for item in with_guesses for gap in item["itl_s"]), "no step gave several tokens"
        sampled = tokens("transformers", 1, model, f"{kind} sampled")
        assert tokens(name, size, model, f"{kind} sampled") == sampled, "whatever the ranks"


@pytest.mark.parametrize(("name", "size"), UNLIKE_WORLDS)
def test_answers_of_unlike_lengths_leave_few_slots_empty(name: str, size: int) -> None:
    """64 prompts in 8 slots, the longest answer more than ten times the shortest; lengths are not known in advance."""
    found = tokens(name, size, "tiny_llama", "unlike")
    assert found == tokens("transformers", 1, "tiny_llama", "unlike"), "which are those of one prompt at a time"
    lengths = list(map(len, found))
    assert max(lengths) > 10 * min(lengths)
    if load_engine(name).has_slots:
        seen = ranks(name, size, "tiny_llama")
        assert in_use(seen if load_engine(name)().data_parallel else seen[:1], lengths) >= 0.9


def in_use(seen: list[dict[str, Any]], lengths: list[int]) -> float:
    """The share of the slots of all decode steps that gave a token."""
    return (sum(lengths) - len(lengths)) / sum(rank["counters"]["slots_in_decode_steps"] for rank in seen)


def test_the_record_says_how_many_slots_were_in_use(tmp_path: Path) -> None:
    """For the same prompts: with continuous batching by data-parallel ranks, and with static batches."""
    (tmp_path / "prompts.txt").write_text("\n".join(unlike_texts()))
    shares = []
    continuous = ("backend=fsdp", "devices=2", f"measure.batch_size={UNLIKE_SLOTS // 2}")
    static = ("backend=transformers", "devices=1", f"measure.batch_size={UNLIKE_SLOTS}", "measure.scheduling=static")
    for asked in (continuous, static):
        ended = launcher(
            *asked, "model=tiny_llama", "accelerator=cpu", "prompts=file", f"prompts.path={tmp_path / 'prompts.txt'}",
            f"sampling.max_new_tokens={UNLIKE.max_new_tokens}", "measure.repeats=1", "measure.warmup=0",
            f"output_dir={tmp_path / 'runs'}",
        )  # fmt: skip
        assert ended.code == 0, ended.err
        record = json.loads((Path(ended.last_json["run_dir"]) / "record.json").read_text())
        shares.append(record["metrics"]["slots_in_use"]["median"])
    assert shares[0] >= 0.9
    assert 0.4 < shares[1] < 0.6


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "size"), REAL)
def test_lengths_and_ends(name: str, size: int, model: str) -> None:
    stopped = completions(name, size, model, "greedy")
    assert [item["index"] for item in stopped] == list(range(20))
    assert {item["finish_reason"] for item in stopped} == {"stop", "length"}
    assert all((len(item["token_ids"]) == 24) for item in stopped if item["finish_reason"] == "length")
    full = completions(name, size, model, "ignore_eos")
    assert {(len(item["token_ids"]), item["finish_reason"]) for item in full} == {(24, "length")}
    [empty] = completions(name, size, model, "ended prompt")
    assert (len(empty["token_ids"]), empty["finish_reason"]) == (1, "stop")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "size"), WORLDS)
def test_each_token_has_its_time(name: str, size: int, model: str) -> None:
    for item in completions(name, size, model, "greedy"):
        assert item["ttft_s"] > 0
        assert len(item["itl_s"]) == len(item["token_ids"]) - 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "size"), REAL)
def test_a_seed_gives_the_same_sample_again(name: str, size: int, model: str) -> None:
    sampled = tokens(name, size, model, "sampled")
    assert sampled == tokens(name, size, model, "sampled again")
    assert sampled != tokens(name, size, model, "greedy")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "size"), [world for world in REAL if world[0] != "vllm"])
def test_the_sample_does_not_depend_on_the_ranks(name: str, size: int, model: str) -> None:
    assert tokens(name, size, model, "sampled") == tokens("transformers", 1, model, "sampled")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "size"), WORLDS)
def test_memory_has_a_number_or_a_reason(name: str, size: int, model: str) -> None:
    devices = [device for rank in ranks(name, size, model) for device in rank["memory"]]
    assert [device["rank"] for device in devices] == list(range(size))
    for device in devices:
        unread = {key for key, value in device.items() if key.endswith("_bytes") and value is None}
        assert unread <= set(device["reasons"]), device


def whole_bytes(model: str) -> int:
    """Bytes of all parameters in float32, tied ones counted once, from the checkpoint's files."""
    total = 0
    for path in (EMBEDDED / model).glob("*.safetensors"):
        with safe_open(path, "np") as file:
            total += sum(4 * _numel(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total


def _numel(shape: list[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_fsdp_holds_its_share(size: int, model: str) -> None:
    for rank in ranks("fsdp", size, model):
        assert rank["memory"][0]["parameter_bytes"] <= 1.05 * whole_bytes(model) / size
    assert sum(rank["memory"][0]["parameter_bytes"] for rank in ranks("fsdp", size, model)) == whole_bytes(model)


@pytest.mark.parametrize("model", MODELS)
def test_deepspeed_holds_its_share(model: str) -> None:
    for rank in ranks("deepspeed", 2, model):
        assert rank["memory"][0]["parameter_bytes"] <= 0.75 * whole_bytes(model)
