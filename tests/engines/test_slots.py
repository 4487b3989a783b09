"""Continuous batching: the schedule of the slots, and the tokens of every model family."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from handed import Handed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from launcher.backends.base import Completion, Generation, Prompt
from launcher.backends.decode import Decoder
from launcher.backends.memory import PhasePeaks
from launcher.backends.sampling import Sampler
from launcher.backends.slots import decoder as slot_decoder
from launcher.backends.slots.decoder import Chosen, SlotDecoder
from launcher.backends.slots.drafting.guesses import Draft, Lookup
from launcher.backends.slots.families import FAMILIES, why_no_guesses, why_static
from launcher.backends.slots.queue import Queue
from launcher.backends.slots.schedule import Read, Schedule, Step
from launcher.backends.slots.static import Compiled
from launcher.config.schema import SamplingConfig
from launcher.results.figures.metrics import ROWS, SLOTS
from shards.machine.world import World
from shards.parallel.families import keep_kv_heads_only

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
USUAL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 256, **IDS,
}  # fmt: skip
GPT = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8, **IDS}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
MOE = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
WINDOW = 16
OTHERS: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": 300, "hidden_size": 64, "n_layer": 2, "n_head": 4, **IDS},
    "codegen": GPT, "gpt2": GPT, "gpt_bigcode": GPT, "gptj": GPT,
    "deepseek_v2": {**USUAL, **MLA, **MOE, "head_dim": 8}, "deepseek_v3": {**USUAL, **MLA, **MOE, "head_dim": 8},
    "falcon": {**USUAL, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": False},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 300, "expansion_ratio": 2, "max_seq_len": 256},
    "opt": {**USUAL, "ffn_dim": 96, "word_embed_proj_dim": 32},
    "xglm": {**USUAL, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96},
}  # fmt: skip
MIXTURES = ("glm4_moe", "gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe")
WINDOWS = ("cohere2", "gemma2", "gemma3_text", "gpt_oss", "ministral", "mistral", "olmo3", "starcoder2")
OLD_FALCON = {**USUAL, "new_decoder_architecture": False}
QWEN = {**USUAL, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
VARIANTS = {
    "falcon, one kv head": ("falcon", {**OLD_FALCON, "multi_query": True}),
    "falcon, ALiBi": ("falcon", {**OLD_FALCON, "multi_query": False, "alibi": True, "parallel_attn": False}),
    "qwen2, a window in some layers": ("qwen2", QWEN),
    "llama, all heads": ("llama", {**USUAL, "num_key_value_heads": 4}),
    "mistral, no window": ("mistral", {**USUAL, "sliding_window": None}),
}


def fields(family: str) -> dict[str, Any]:
    """The config of a small model of a family; sliding windows, if any, are shorter than the prompts."""
    if family in OTHERS:
        return OTHERS[family]
    more = MOE if family in MIXTURES else {}
    window = {"sliding_window": WINDOW} if family in WINDOWS else {}
    return {**USUAL, "head_dim": 16, **more, **window}


def made(family: str, config: dict[str, Any]) -> Any:
    """A random model whose answers do not just repeat one token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).eval()
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    return model


def prompts_of(lengths: tuple[int, ...]) -> list[Prompt]:
    draw = random.Random(1)
    return [Prompt(i, "", tuple(draw.randrange(3, 300) for _ in range(n))) for i, n in enumerate(lengths)]


def decoder(model: Any, slots: int, length: int, prefill_tokens: int, eos: tuple[int, ...] = ()) -> SlotDecoder:
    cpu = torch.device("cpu")
    return SlotDecoder(model, eos, cpu, World(), 0, PhasePeaks(()), slots, length, prefill_tokens, splits_prompts=False)


def answered(engine: SlotDecoder, prompts: list[Prompt], sampling: SamplingConfig) -> Generation:
    return engine.generate(prompts, sampling, lambda new_tokens, finished=(): None)


def by_generate(model: Any, prompt: Prompt, new_tokens: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt.token_ids])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
    )
    return tuple(found[0, ids.shape[1] :].tolist())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config"),
    [pytest.param(family, fields(family), id=family) for family in sorted(FAMILIES)]
    + [pytest.param(*variant, id=name) for name, variant in VARIANTS.items()],
)
def test_a_family_in_slots_gives_the_tokens_of_generate(family: str, config: dict[str, Any]) -> None:
    """With prompts shorter and longer than the window and than a chunk, and more prompts than slots."""
    new_tokens = 10
    prompts = prompts_of((5, 24, 1, 17, 16, 15, 30))
    model = made(family, config)
    assert why_static(model.config.to_dict()) is None
    expected = [by_generate(model, prompt, new_tokens) for prompt in prompts]
    assert len({token for tokens in expected for token in tokens}) > 5, "a model that says nothing shows nothing"
    keep_kv_heads_only(model)
    for slots, prefill_tokens, is_static in ((3, 2048, False), (4, 7, False), (4, 7, True)):
        engine = decoder(model, slots, 40, prefill_tokens)
        if is_static:  # each step computes all rows, also free ones and those whose prompt is still being read
            ready = engine.ready(40)
            ready.static = Compiled(ready, ready.forward)
        generation = answered(engine, prompts, SamplingConfig(max_new_tokens=new_tokens, ignore_eos=True))
        assert [item.token_ids for item in generation.completions] == expected, (slots, prefill_tokens, is_static)
    if why_no_guesses(model.config.to_dict()) is None:
        for guesser in (Lookup(3, 1, torch.device("cpu")), Draft(disturbed(model), torch.device("cpu"))):
            engine = decoder(model, 4, 43, 7)
            engine.guesser, engine.ahead = guesser, 3
            generation = answered(engine, prompts, SamplingConfig(max_new_tokens=new_tokens, ignore_eos=True))
            assert [item.token_ids for item in generation.completions] == expected, guesser


def disturbed(model: Any) -> Any:
    """A model that often, but not always, predicts the same tokens."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape) * float(parameter.data.float().std(correction=0))
    return other


@pytest.mark.parametrize("is_continuous", [True, False], ids=["slots", "static"])
@pytest.mark.parametrize(
    ("family", "config", "kv_heads"),
    [("falcon", fields("falcon"), 2), ("falcon", {**OLD_FALCON, "multi_query": True}, 1), ("llama", USUAL, 2)],
    ids=["falcon", "falcon, one kv head", "llama"],
)
def test_rows_of_one_length_are_attended_to_without_a_mask(
    family: str, config: dict[str, Any], kv_heads: int, is_continuous: bool
) -> None:
    """CUDA's flash attention supports no mask; and for grouped heads, unless keys are repeated for all heads, CUDA
    stores all scores."""
    model = made(family, config)
    keep_kv_heads_only(model)
    cpu = torch.device("cpu")
    engine = decoder(model, 3, 40, 2048) if is_continuous else Decoder(model, (), cpu, 0)
    sampling = SamplingConfig(max_new_tokens=4, ignore_eos=True)
    engine.generate(prompts_of((7, 7, 7)), sampling, lambda new_tokens, finished=(): None)
    masks = {}
    for lengths in ((7, 7, 7), (7, 5, 7)):
        with Handed() as handed:
            engine.generate(prompts_of(lengths), sampling, lambda new_tokens, finished=(): None)
        reads = 2 * (3 if is_continuous and lengths[1] == 5 else 1)  # 2 layers; packed prompts attend one by one
        assert len(handed.calls) == reads + 2 * 3, "layers, tokens"
        masks[lengths] = [call.get("attn_mask") is not None for call in handed.calls]
        steps = handed.calls[reads:]
        if is_continuous or family == "falcon":
            assert {call["shapes"][1][1] for call in steps} == {kv_heads}, "a step copies no keys"
            assert {call["shapes"][0] for call in steps} == {(3, kv_heads, 4 // kv_heads, 16)}
    assert not any(masks[7, 7, 7])
    assert masks[7, 5, 7] == ([False] * 6 if is_continuous else [True] * 2) + [True] * 6


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "mamba"}, "mamba is not one of the families"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, "frequencies of type dynamic"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "frequencies of type longrope"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ],
)
def test_what_cannot_lie_in_slots_says_why(config: dict[str, Any], why: str) -> None:
    assert why in (why_static(config) or "")


def simulate(schedules: list[Schedule], queue: Queue, ends: dict[int, int], prefill_tokens: int) -> tuple[int, int]:
    """Run schedules without a model, with answers of the lengths `ends`; returns the total (steps, rows)."""
    steps = rows = 0
    answers: dict[int, int] = {}
    read: dict[int, int] = {}
    held: list[dict[int, tuple[int, int]]] = [{} for _ in schedules]  # slot -> (prompt, tokens)
    while queue.fill():
        for schedule, slots in zip(schedules, held, strict=True):
            forward = schedule.next()
            if forward is None:
                continue
            for source, target in forward.moves:
                slots[target] = slots[source]
            for one in forward.sequences:
                index, length = one.prompt.index, len(one.prompt.token_ids)
                if isinstance(forward, Read):
                    taken = min(forward.width, length - forward.start)
                    assert forward.start == read.get(index, 0)
                    read[index] = forward.start + taken
                    slots[one.row] = index, read[index]
                else:
                    assert slots[one.row] == (index, one.length)
                    slots[one.row] = index, one.length + 1
            if isinstance(forward, Step):
                assert [one.row for one in forward.sequences] == list(range(len(forward.sequences)))
                steps, rows = steps + 1, rows + len(forward.sequences)
            else:
                longest = max(len(one.prompt.token_ids) - forward.start for one in forward.sequences)
                assert forward.width == min(longest, prefill_tokens)
                assert forward.width * len(forward.sequences) <= prefill_tokens or len(forward.sequences) == 1
            schedule.begin(forward)
            for one in forward.sequences:
                if isinstance(forward, Step) or forward.is_last:
                    answers[one.prompt.index] = answers.get(one.prompt.index, 0) + 1
                    if answers[one.prompt.index] == ends[one.prompt.index]:
                        schedule.end(one)
            assert schedule.free == len(schedule.seats) - len(schedule.waiting) - sum(map(bool, schedule.seats))
    assert answers == ends
    assert {index: read[index] for index in ends} == {prompt.index: len(prompt.token_ids) for prompt in PROMPTS}
    return steps, rows


PROMPTS = prompts_of(tuple(random.Random(2).choices(range(1, 40), k=64)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("slots", "prefill_tokens"), [(1, 64), (3, 8), (8, 64), (8, 1000), (64, 20)])
def test_every_prompt_is_read_and_answered_in_a_slot_of_its_own(slots: int, prefill_tokens: int, seed: int) -> None:
    draw = random.Random(seed)
    ends = {prompt.index: draw.randint(1, 30) for prompt in PROMPTS}
    schedule = Schedule(slots, 30, prefill_tokens, near=4)
    steps, rows = simulate([schedule], Queue(PROMPTS, [schedule], 0, votes=False), ends, prefill_tokens)
    assert rows == sum(ends.values()) - len(PROMPTS), "no row is computed for nothing"
    assert steps >= -(-rows // slots)


def test_prompts_of_like_lengths_are_read_together_wherever_they_wait() -> None:
    schedule = Schedule(6, 30, 20, near=4)
    for prompt in prompts_of((10, 3, 12, 30, 9, 5)):
        schedule.add(prompt)
    reads = []
    while isinstance(forward := schedule.next(), Read):
        reads.append(([one.prompt.index for one in forward.sequences], forward.start, forward.width))
        schedule.begin(forward)
        schedule.budget = 24  # as after a decode step
    assert reads == [([0], 0, 10), ([1, 5], 0, 5), ([2], 0, 12), ([3], 0, 20), ([3], 20, 10), ([4], 0, 9)]
    schedule = Schedule(6, 30, 40, near=4)
    for prompt in prompts_of((10, 3, 12, 30, 9, 5)):
        schedule.add(prompt)
    forward = schedule.next()
    assert isinstance(forward, Read)
    assert ([one.prompt.index for one in forward.sequences], forward.width) == ([0, 2, 4], 12)


def test_packed_prompts_are_read_in_the_order_in_which_they_wait() -> None:
    """As many prompts as fit the token budget of a forward; a longer one is read in chunks, later prompts after it."""
    schedule = Schedule(6, 30, 20, near=None)
    for prompt in prompts_of((10, 3, 8, 30, 9, 5)):
        schedule.add(prompt)
    reads = []
    while isinstance(forward := schedule.next(), Read):
        rows = [one.row for one in forward.sequences]
        reads.append(([one.prompt.index for one in forward.sequences], forward.is_packed, forward.num_tokens, rows))
        schedule.begin(forward)
        schedule.budget = 20  # as after a decode step
    assert reads == [
        ([0, 1], True, 13, [0, 1]), ([2], False, 8, [2]), ([3], False, 20, [5]), ([3], False, 10, [5]),
        ([4, 5], True, 14, [3, 4]),
    ]  # fmt: skip


def test_answers_of_unlike_lengths_leave_few_slots_empty() -> None:
    """Answers of 10 to 100 tokens, in 8 slots and in static batches of 8."""
    draw = random.Random(0)
    ends = {prompt.index: draw.randint(10, 100) for prompt in PROMPTS}
    schedule = Schedule(8, 100, 2048, near=16)
    steps, rows = simulate([schedule], Queue(PROMPTS, [schedule], 0, votes=False), ends, 2048)
    useful = sum(ends.values()) - len(PROMPTS)
    assert rows == useful
    assert useful / (8 * steps) >= 0.9
    lengths = list(ends.values())
    static = sum(8 * max(lengths[place : place + 8]) for place in range(0, 64, 8))
    assert useful / static < 0.65


def test_ranks_that_know_when_answers_end_follow_each_other() -> None:
    """Each rank simulates the others: all agree on which rank gets which prompt, and make equally many forwards."""
    pictures = [[Schedule(3, 6, 16, near=4) for _ in range(3)] for _ in range(3)]
    queues = [Queue(PROMPTS, schedules, rank, votes=False) for rank, schedules in enumerate(pictures)]
    given: list[list[int]] = [[], [], []]
    rounds = [0, 0, 0]
    for rank, queue in enumerate(queues):
        while queue.fill():
            forward = queue.own.next()
            queue.follow()
            if isinstance(forward, Read) and forward.is_last:
                given[rank] += [one.prompt.index for one in forward.sequences]
            if forward is not None:
                queue.own.begin(forward)
            rounds[rank] += 1
    assert sorted(index for indices in given for index in indices) == list(range(64))
    assert len(set(rounds)) == 1
    tokens = [sum(len(PROMPTS[index].token_ids) for index in indices) for indices in given]
    assert max(tokens) - min(tokens) <= 40, "no more than the longest prompt"
    assert max(map(len, given)) - min(map(len, given)) <= 3


def test_ranks_that_need_no_other_end_with_their_own_answers() -> None:
    """Prompts are divided as among ranks in lockstep, but no rank makes forwards only because another needs them."""
    pictures = [[Schedule(3, 6, 16, near=4) for _ in range(2)] for _ in range(2)]
    queues = [Queue(PROMPTS[:7], schedules, rank, False, is_apart=True) for rank, schedules in enumerate(pictures)]
    given: list[list[int]] = [[], []]
    for rank, queue in enumerate(queues):
        while queue.fill():
            forward = queue.own.next()
            queue.follow()
            assert forward is not None
            if isinstance(forward, Read) and forward.is_last:
                given[rank] += [one.prompt.index for one in forward.sequences]
            queue.own.begin(forward)
    assert sorted(given[0] + given[1]) == list(range(7))
    assert min(map(len, given)) == 3


@pytest.fixture(scope="module")
def model() -> Any:
    return made("llama", USUAL)


def test_the_cache_is_exact_and_stays_where_it_is(model: Any) -> None:
    engine = decoder(model, 3, 40, 2048)
    addresses = set()
    for lengths in ((5, 30, 1, 7), (2, 2), (30,) * 6):
        answered(engine, prompts_of(lengths), SamplingConfig(max_new_tokens=10, ignore_eos=True))
        assert engine.slots is not None
        addresses.add(tuple(tensor.data_ptr() for tensor in engine.slots.cache.tensors()))
        assert sum(engine.kv_cache_bytes.values()) == 3 * 40 * (2 * 2 * 2 * 16 * 4)  # layers, k and v, heads, dim, fp32
    assert len(addresses) == 1


def test_answers_are_said_once_as_they_end_and_times_begin_with_the_call(model: Any) -> None:
    prompts = prompts_of((5, 30, 1, 7, 12))
    said: list[Completion] = []
    tokens: list[int] = []

    def on_step(new_tokens: int, finished: Any = ()) -> None:
        tokens.append(new_tokens)
        said.extend(finished)

    sampling = SamplingConfig(max_new_tokens=10, ignore_eos=True)
    generation = decoder(model, 2, 40, 2048).generate(prompts, sampling, on_step)
    assert sorted(item.index for item in said) == [0, 1, 2, 3, 4]
    assert {item.index: item.token_ids for item in said} == {c.index: c.token_ids for c in generation.completions}
    assert sum(tokens) == 50
    waited = [item.ttft_s for item in generation.completions]
    assert generation.prefill_s is not None
    assert generation.decode_s is not None
    assert waited[0] is not None
    assert waited[4] is not None
    assert waited[4] > waited[0], "it waited for a slot"
    for item in generation.completions:
        assert len(item.itl_s) == 9
        assert item.ttft_s is not None
        assert item.ttft_s + sum(item.itl_s) <= generation.prefill_s + generation.decode_s + 1e-6


def test_what_is_not_a_number_stays_with_its_prompt(model: Any) -> None:
    """A prompt whose values become NaN does not affect the next prompt in its slot."""
    prompts = prompts_of((20, 3))
    sampling = SamplingConfig(max_new_tokens=5, ignore_eos=True)
    expected = answered(decoder(model, 1, 40, 2048), prompts[1:], sampling).completions[0].token_ids
    engine = decoder(model, 1, 40, 2048)
    answered(engine, prompts[:1], sampling)
    assert engine.slots is not None
    with torch.inference_mode():
        for tensor in engine.slots.cache.tensors():
            tensor.fill_(torch.nan)
    engine.must_clear = True
    assert answered(engine, prompts[1:], sampling).completions[0].token_ids == expected


def test_a_call_that_is_ended_leaves_the_slots_for_the_next(model: Any) -> None:
    prompts = prompts_of((5, 30, 1, 7, 12))
    sampling = SamplingConfig(max_new_tokens=10, ignore_eos=True)
    engine = decoder(model, 2, 40, 2048)
    steps = 0

    def stop(new_tokens: int, finished: Any = ()) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        engine.generate(prompts, sampling, stop)
    found = answered(engine, prompts, sampling)
    assert (
        found.completions[0].token_ids
        == answered(decoder(model, 5, 40, 2048), prompts, sampling).completions[0].token_ids
    )


@pytest.mark.parametrize("late", [0, 4])
def test_an_end_that_is_read_late_costs_few_rows_and_changes_no_answer(
    model: Any, late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the host sees that a row has reached EOS only some forwards later."""
    monkeypatch.setitem(slot_decoder.LATE, "cpu", late)
    of = Chosen.of
    monkeypatch.setattr(
        Chosen, "of", lambda forward, number, *tensors: of(forward, number, *(tensor.clone() for tensor in tensors))
    )
    prompts, most = prompts_of((5, 30, 1, 7, 12, 9, 22, 4, 3, 17)), 20
    whole = {prompt.index: by_generate(model, prompt, most) for prompt in prompts}
    eos = {tokens[place] for tokens, place in zip(whole.values(), (0, 3, 7, 11), strict=False)}
    ends = {index: next((n for n, token in enumerate(row, 1) if token in eos), most) for index, row in whole.items()}
    assert len(set(ends.values())) > 3
    generation = answered(decoder(model, 3, 52, 8, tuple(eos)), prompts, SamplingConfig(max_new_tokens=most))
    assert {item.index: item.token_ids for item in generation.completions} == {i: whole[i][: ends[i]] for i in whole}
    useful, rows = sum(ends.values()) - len(ends), generation.counters[ROWS]
    assert useful <= rows <= useful + sum(min(late, most - end) for end in ends.values())
    assert (rows > useful) == (late > 0)
    assert rows <= generation.counters[SLOTS]


@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0.7), SamplingConfig(temperature=1.3, top_k=5)])
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling: SamplingConfig) -> None:
    """Pearson's chi-squared test of 20,000 draws against the probabilities, at a significance level of one in a
    million."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -3.0]])
    sampler = Sampler(sampling, 7, torch.device("cpu"))
    likely = (logits / sampling.temperature)[0]
    likely[likely < likely.topk(sampling.top_k or 8).values[-1]] = -torch.inf
    expected = likely.softmax(0) * 20_000
    generator = sampler.generator(Prompt(0, "", (1,)))
    tokens, _ = sampler.choose(logits.repeat(20_000, 1), [generator] * 20_000)
    drawn = tokens.bincount(minlength=8)
    possible = expected > 0
    assert drawn[~possible].sum() == 0
    statistic = ((drawn - expected) ** 2 / expected)[possible].sum()
    assert statistic < 45, "the quantile of chi-squared with 7 degrees of freedom at 1 - 1e-6 is 40"


class Operators(TorchDispatchMode):
    """Records the names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


READ_A_VALUE = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::equal",
    "aten::multinomial",
}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (7, 5, 9)], ids=["even", "uneven"])
def test_nothing_waits_for_the_device(model: Any, lengths: tuple[int, ...], sampling: dict[str, Any]) -> None:
    """No operator of a call needs a value on the host: on a GPU each of these would wait for the device."""
    engine = decoder(model, 2, 40, 4)
    answered(engine, prompts_of(lengths), SamplingConfig(max_new_tokens=4))  # only a first call compares a step
    with Operators() as operators:
        answered(engine, prompts_of(lengths), SamplingConfig(max_new_tokens=4, **sampling))
    assert "aten::linear" in operators.names
    assert operators.names & READ_A_VALUE == set()


class Allocations(TorchDispatchMode):
    """Records the operators that allocate memory in the decode loop or the cache, but not those in the model."""

    def __init__(self, engine: SlotDecoder) -> None:
        super().__init__()
        assert engine.slots is not None
        self.names: list[str] = []
        self.in_model = False
        update = engine.slots.cache.update

        def updated(*args: Any, **kwargs: Any) -> Any:
            self.in_model = False
            found = update(*args, **kwargs)
            self.in_model = True
            return found

        engine.slots.cache.update = updated
        engine.model.register_forward_pre_hook(lambda *_: setattr(self, "in_model", True))
        engine.model.register_forward_hook(lambda *_: setattr(self, "in_model", False))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        new = [each for each in tree_leaves(made) if torch.is_tensor(each)]
        if not self.in_model and any(each.untyped_storage().data_ptr() not in given for each in new):
            self.names.append(func.name())
        return made


@pytest.mark.parametrize(
    ("family", "drawing"),
    [(family, {}) for family in ("llama", "falcon", "mistral", "bloom")]
    + [("llama", {"temperature": 1.0}), ("llama", {"temperature": 0.7, "top_k": 5, "top_p": 0.9})],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(7, 7, 7), (7, 5, 9)], ids=["even", "uneven"])
def test_no_step_allocates(family: str, drawing: dict[str, Any], lengths: tuple[int, ...]) -> None:
    """The activations of transformers' modules are not counted."""
    model = made(family, fields(family))
    keep_kv_heads_only(model)
    engine = decoder(model, 3, 40, 2048)
    sampling = SamplingConfig(max_new_tokens=20, ignore_eos=True, **drawing)
    answered(engine, prompts_of(lengths), sampling)
    counted: list[int] = []
    with Allocations(engine) as allocations:
        engine.generate(prompts_of(lengths), sampling, lambda *_: counted.append(len(allocations.names)))
    first = len(counted) - 18  # after the prompts, and after the step that allocates the sampler's tensors
    assert counted[0] > 0, "reading prompts does allocate"
    assert counted[first:] == [counted[first]] * 18, allocations.names[counted[first] :]


def test_a_static_batch_of_one_length_waits_for_nothing_either(model: Any) -> None:
    with Operators() as operators:
        sampling = SamplingConfig(max_new_tokens=4, ignore_eos=True)
        Decoder(model, (), torch.device("cpu"), 0).generate(prompts_of((7, 7)), sampling, lambda *_: None)
    assert operators.names & READ_A_VALUE == set()


@pytest.mark.parametrize("wanted", [(0.7, 0, 1.0), (1.0, 7, 1.0), (1.3, 900, 0.3), (0.9, 0, 0.95), (0.5, 20, 0.8)])
def test_probabilities_are_those_of_transformers(wanted: tuple[float, int, float]) -> None:
    """Bit-exact, for changing numbers of rows, and with equal logits among the values."""
    temperature, top_k, top_p = wanted
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
    if top_k:
        warpers.insert(1, TopKLogitsWarper(top_k))
    sampler = Sampler(config, 0, torch.device("cpu"))
    for rows in (5, 2, 9):
        logits = torch.randn(rows, 50, generator=torch.Generator().manual_seed(rows)).mul(3).round(decimals=1)
        expected = LogitsProcessorList(warpers)(None, logits.clone()).softmax(-1)
        assert torch.equal(sampler.weights(logits), expected)


def test_a_draw_is_that_of_multinomial() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(SamplingConfig(temperature=1.0), 3, torch.device("cpu"))
    prompts = prompts_of((1, 1, 1))
    found, gaps = sampler.choose(logits, [sampler.generator(prompt) for prompt in prompts])
    for row, prompt, token in zip(logits, prompts, found, strict=True):
        generator = torch.Generator().manual_seed((3 << 32) + prompt.index)
        assert torch.multinomial(row.softmax(-1), 1, generator=generator) == token
    top = logits.topk(2).values
    assert torch.equal(gaps, top[:, 0] - top[:, 1])
