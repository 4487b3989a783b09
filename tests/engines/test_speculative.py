"""Speculative decoding: which tokens are guessed and accepted, and that only the target model determines the output."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, launcher
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.backends.base import Generation, Prompt
from launcher.backends.memory import PhasePeaks
from launcher.backends.slots.decoder import SlotDecoder
from launcher.backends.slots.drafting.acceptance import greedy, sampled
from launcher.backends.slots.drafting.guesses import Draft, Guesser, Lookup
from launcher.backends.slots.drafting.ngrams import Ngrams
from launcher.config.engines import load_engine
from launcher.config.schema import SamplingConfig
from launcher.results.figures.metrics import ROWS
from launcher.results.figures.speculation import ACCEPTED, GUESSED
from shards.machine.world import World

CPU = torch.device("cpu")
DRAWS = 20_000


@pytest.mark.parametrize(
    ("tokens", "most", "least", "count", "guess"),
    [
        ((1, 2, 3, 9, 1, 2), 2, 1, 3, [3, 9, 1]),
        ((1, 2, 3, 1, 2, 4, 1, 2), 2, 1, 1, [4]),  # the last occurrence
        ((5, 2, 3, 7, 2, 4, 5, 2), 2, 1, 2, [3, 7]),  # the longer match, although the shorter one is more recent
        ((7, 7, 7), 3, 1, 4, [7, 7, 7, 7]),  # a repetition continues
        ((1, 2, 1, 2), 2, 1, 5, [1, 2, 1, 2, 1]),
        ((1, 2, 3), 3, 1, 4, []),
        ((3, 1, 2, 3), 3, 2, 4, []),  # a match of one token is shorter than the minimum
        ((1, 1), 3, 1, 0, []),
    ],
)
def test_what_followed_the_newest_tokens_is_guessed(
    tokens: tuple[int, ...], most: int, least: int, count: int, guess: list[int]
) -> None:
    at_once, one_by_one = Ngrams(most, least), Ngrams(most, least)
    at_once.add(tokens)
    for token in tokens:
        one_by_one.add((token,))
    assert at_once.guess(count) == one_by_one.guess(count) == guess


def test_greedy_guesses_hold_up_to_the_first_that_is_not_the_best() -> None:
    best = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    guesses = torch.tensor([[5, 6, 7], [5, 0, 7], [5, 6, 7], [0, 6, 7]])
    tokens, accepted = greedy(best, guesses, torch.tensor([3, 3, 1, 3]))
    assert accepted.tolist() == [3, 1, 1, 0]
    assert [row[: count + 1] for row, count in zip(tokens.tolist(), accepted.tolist(), strict=True)] == [
        [5, 6, 7, 8], [5, 6], [5, 6], [5],
    ]  # fmt: skip


def distance(found: Counter[Any], expected: dict[Any, float], draws: int) -> float:
    """The total variation distance: half of the sum of the absolute differences."""
    return sum(abs(found[key] / draws - expected.get(key, 0.0)) for key in {*found, *expected}) / 2


P = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0], [0.1, 0.2, 0.3, 0.4, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]])
Q = torch.tensor([[0.1, 0.2, 0.2, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1, 0.0]])


@pytest.mark.parametrize("is_drawn", [True, False], ids=["a draft", "a lookup"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_what_is_accepted_or_drawn_instead_is_distributed_as_the_target_says(is_drawn: bool, count: int) -> None:
    """The distribution of the first two tokens of many sequences is that of drawing each from its target."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([torch.multinomial(q, DRAWS, True, generator=generator) for q in Q], 1)
    guesses = drawn if is_drawn else torch.tensor([3, 1]).expand(DRAWS, 2)
    uniform = torch.rand(DRAWS, 2, generator=generator)
    noise = torch.empty(DRAWS, 5).exponential_(generator=generator)
    target, drafted = P.expand(DRAWS, 3, 5), Q.expand(DRAWS, 2, 5) if is_drawn else None
    tokens, accepted = sampled(target, guesses, torch.full((DRAWS,), count), drafted, uniform, noise)
    first = Counter(tokens[:, 0].tolist())
    assert distance(first, dict(enumerate(P[0].tolist())), DRAWS) < 0.012
    second = Counter(tokens[accepted > 0, 1].tolist())  # sequences whose first guess was accepted have a second token
    if count:
        assert distance(second, dict(enumerate(P[1].tolist())), int((accepted > 0).sum())) < 0.03
    assert int(accepted.max()) == count
    rate = float((accepted > 0).double().mean())
    held = 0.0
    if count:
        held = float(torch.minimum(P[0], Q[0]).sum()) if is_drawn else float(P[0, 3])
    assert rate == pytest.approx(held, abs=0.012)


def test_the_tokens_of_rows_stop_where_their_guesses_do() -> None:
    """Padding in place of a guess is neither accepted nor subtracted from the distribution."""
    target = torch.tensor([0.0, 1.0, 0.0]).expand(2, 3, 3)
    guesses = torch.tensor([[1, 1], [1, 0]])
    tokens, accepted = sampled(target, guesses, torch.tensor([1, 2]), None, torch.zeros(2, 2), torch.ones(2, 3))
    assert accepted.tolist() == [1, 1]
    assert tokens[:, :2].tolist() == [[1, 1], [1, 1]]


def small_model(seed: int, vocabulary: int = 40) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    return model


def disturbed(model: Any, by: float) -> Any:
    other = small_model(0, model.config.vocab_size)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(7)
    for parameter in other.parameters():
        parameter.data += by * torch.randn(parameter.shape) * float(parameter.data.std(correction=0))
    return other


def prompts_of(lengths: tuple[int, ...], vocabulary: int = 40) -> list[Prompt]:
    draw = random.Random(1)
    return [Prompt(i, "", tuple(draw.randrange(3, vocabulary) for _ in range(n))) for i, n in enumerate(lengths)]


def answered(
    model: Any, guesser: Guesser | None, prompts: list[Prompt], sampling: SamplingConfig, slots: int = 3, ahead: int = 3
) -> Generation:
    eos = () if sampling.ignore_eos else tuple(range(3, 9))
    engine = SlotDecoder(model, eos, CPU, World(), 0, PhasePeaks(()), slots, 8, 2048, splits_prompts=False)
    engine.guesser, engine.ahead = guesser, ahead if guesser else 0
    return engine.generate(prompts, sampling, lambda new_tokens, finished=(): None)


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("new_tokens", [1, 2, 17])
def test_the_tokens_are_those_without_guesses(new_tokens: int, ignore_eos: bool) -> None:
    """Even if an answer ends in the middle of the accepted tokens: those after its end are dropped."""
    model, prompts = small_model(3), prompts_of((5, 24, 1, 17, 16, 15, 30, 2))
    sampling = SamplingConfig(max_new_tokens=new_tokens, ignore_eos=ignore_eos)
    plain = answered(model, None, prompts, sampling)
    if not ignore_eos and new_tokens == 17:
        assert {item.finish_reason for item in plain.completions} == {"stop", "length"}
    for guesser in (Lookup(3, 1, CPU), Draft(disturbed(model, 0.1), CPU), Draft(model, CPU)):
        found = answered(model, guesser, prompts, sampling)
        assert [(c.index, c.token_ids, c.finish_reason) for c in found.completions] == [
            (c.index, c.token_ids, c.finish_reason) for c in plain.completions
        ]
        assert [len(c.itl_s) for c in found.completions] == [len(c.token_ids) - 1 for c in found.completions]
        for here, there in zip(found.completions, plain.completions, strict=True):
            assert here.top2_gaps == pytest.approx(there.top2_gaps, abs=1e-3)


def test_a_draft_that_is_the_target_is_right_each_time() -> None:
    """Each step then gives a row all guessed tokens and one more, so the draft's cache must match the target's."""
    model, prompts = small_model(3), prompts_of((5, 24, 1, 17, 16))
    found = answered(model, Draft(model, CPU), prompts, SamplingConfig(max_new_tokens=17, ignore_eos=True))
    assert found.counters[ACCEPTED] == found.counters[GUESSED] == 5 * 12
    assert found.counters[ROWS] == 5 * 4, "16 tokens after the first by fours"


def test_what_was_looked_up_for_answers_that_ended_is_forgotten() -> None:
    lookup = Lookup(3, 1, CPU)
    answered(small_model(3), lookup, prompts_of((4,) * 30), SamplingConfig(max_new_tokens=3, ignore_eos=True), slots=2)
    assert 0 < len(lookup.known) <= 2


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_a_sample_depends_on_the_seed_and_its_prompt_only(kind: str) -> None:
    model, prompts = small_model(3), prompts_of((5, 24, 1, 17, 16, 2))
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.9, top_k=20, top_p=0.95, ignore_eos=True)

    def guesser() -> Guesser:
        return Lookup(3, 1, CPU) if kind == "lookup" else Draft(disturbed(model, 0.1), CPU)

    together = answered(model, guesser(), prompts, sampling, slots=4)
    again = answered(model, guesser(), prompts, sampling, slots=2)
    alone = [answered(model, guesser(), [prompt], sampling).completions[0] for prompt in prompts]
    tokens = [item.token_ids for item in together.completions]
    assert tokens == [item.token_ids for item in again.completions] == [item.token_ids for item in alone]
    assert 0 < together.counters[ACCEPTED] < together.counters[GUESSED]


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_samples_with_guesses_are_distributed_as_those_without(kind: str) -> None:
    """A chi-squared test of the first three tokens of many answers to one prompt, in a tiny vocabulary."""
    model, draws = small_model(5, 12), 3000
    ids = prompts_of((9,), 12)[0].token_ids * 2
    prompts = [Prompt(index, "", ids) for index in range(draws)]
    sampling = SamplingConfig(max_new_tokens=3, temperature=0.7, top_k=4, ignore_eos=True)
    guesser: Guesser = Lookup(2, 1, CPU) if kind == "lookup" else Draft(disturbed(model, 0.1), CPU)
    found = answered(model, guesser, prompts, sampling, slots=250, ahead=2)
    expected = {tokens: draws * weight for tokens, weight in _sequences(model, ids, sampling)}
    seen = Counter(item.token_ids for item in found.completions)
    assert set(seen) <= set(expected), "no token that the sampling leaves out"
    assert len(expected) == 4**3
    square = sum((seen[tokens] - count) ** 2 / count for tokens, count in expected.items())
    assert square < 110, "which 63 degrees of freedom pass once in ten thousand times"
    assert found.counters[ACCEPTED] > 0


def _sequences(model: Any, ids: tuple[int, ...], sampling: SamplingConfig) -> Iterator[tuple[tuple[int, ...], float]]:
    """All answers that can be sampled, with their probabilities, by forwards of the model without a cache."""
    states: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    for _ in range(sampling.max_new_tokens):
        with torch.inference_mode():
            logits = model(torch.tensor([ids + tokens for tokens, _ in states])).logits[:, -1] / sampling.temperature
        values, places = logits.topk(sampling.top_k)
        weights = values.softmax(-1)
        states = [
            ((*tokens, int(place)), weight * float(share))
            for (tokens, weight), row, shares in zip(states, places, weights, strict=True)
            for place, share in zip(row, shares, strict=True)
        ]
    yield from states


RAGGED = str(ROOT / "tests" / "ragged_prompts.txt")
ENGINES = tuple(
    name for name in ("transformers", "fsdp", "tensor_parallel", "deepspeed", "vllm")
    if all(find_spec(package) for package in load_engine(name).modules())
)  # fmt: skip


def sweep(folder: Path, *overrides: str) -> dict[str, tuple[dict[str, Any], list[list[int]]]]:
    """Real runs on the ragged prompts: the record and tokens of each, by engine and kind of speculation."""
    ended = launcher(
        "-m", "accelerator=cpu", f"output_dir={folder}", "prompts=file", f"prompts.path={RAGGED}",
        "measure.warmup=0", "measure.repeats=1", *overrides, timeout=650,
    )  # fmt: skip
    assert ended.code == 0, ended.out[-3000:] + ended.err[-3000:]
    found = {}
    for path in folder.glob("*/record.json"):
        record = json.loads(path.read_text())
        lines = map(json.loads, (path.parent / "completions.jsonl").read_text().splitlines())
        tokens = [line["token_ids"] for line in sorted(lines, key=lambda line: line["index"])]
        found[f"{record['backend']} {record['config']['speculative']['name']}"] = record, tokens
    return found


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_runs_hold_what_was_planned_and_say_what_guesses_gave(tmp_path: Path) -> None:
    """With a draft model in each engine: its bytes are as planned, the tokens per step match the accepted guesses, and
    the answers are the same."""
    draft = ("speculative=draft", "speculative.model=embedded:tiny_draft", "model=tiny_llama")
    runs = sweep(tmp_path, f"backend={','.join(ENGINES)}", "devices=2", *draft)
    assert set(runs) == {f"{name} draft" for name in ENGINES}
    expected = runs["transformers draft"][1]
    for name, (record, tokens) in runs.items():
        assert tokens == expected, name
        for planned, held in zip(record["plan"]["devices"], record["devices"], strict=True):
            for key in ("parameter_bytes", "draft_parameter_bytes", "draft_cache_bytes", "kv_cache_bytes"):
                assert held[key] == planned[key], (name, key)
            assert held["draft_parameter_bytes"] > 0
            assert (held["draft_cache_bytes"] > 0) == (name != "vllm draft"), "vLLM keeps it in its pool"
        figures = record["metrics"]["speculation"]
        assert 0.5 < figures["acceptance"]["median"] < 1
        assert 2 < figures["tokens_per_step"]["median"] < 5
        assert record["metrics"]["decode"]["tokens_per_row"] == pytest.approx(figures["tokens_per_step"]["median"])
        assert not record["ceiling"]["impossible"]
        assert not record["mbu"]["impossible"]


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.skipif("vllm" not in ENGINES, reason="vllm is not installed")
def test_vllm_looks_up_by_the_same_keys(tmp_path: Path) -> None:
    """A sweep over kinds of speculation accepts the keys of all of them."""
    guesses = ("speculative=none,ngram", "speculative.tokens=3")
    runs = sweep(tmp_path, "backend=vllm", "devices=1", *guesses, "model=tiny_falcon")
    (plain, tokens), (guessed, others) = runs["vllm none"], runs["vllm ngram"]
    assert tokens == others
    assert guessed["config"]["speculative"]["tokens"] == 3
    assert plain["metrics"]["speculation"] is None
    assert guessed["metrics"]["counters"]["guessed_tokens"]["median"] > 0
    assert guessed["metrics"]["speculation"]["tokens_per_step"]["median"] >= 1
