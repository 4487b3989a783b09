"""Figures of a record: memory bandwidth utilisation, compared with numbers calculated by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plans import plan as any_plan

from launcher.results.figures import metrics
from launcher.results.figures.metrics import figures
from launcher.results.figures.utilisation import against_ceiling, bandwidth_used
from launcher.results.measured import BandwidthUse, Metrics, Repeat
from shards.machine.hardware import DEVICES, LINKS
from shards.plan.plan import Plan
from shards.plan.roofline import Machine, Roofline, Work

FALCON_7B = 13_843_441_408  # bytes of its 6,921,720,704 parameters in 16 bits, all read in a step: the head is tied
FALCON_40B = 82_606_587_904


def one_repeat(
    *sequences: tuple[int, list[float]], decode_s: float | None, wall_s: float = 10.0, steps: int | None = None
) -> Repeat:
    """A rank's measurements of a repeat. For each prompt: its number of tokens, and the gaps between the new tokens,
    the first of which comes at 1 s."""
    return Repeat(
        number=0,
        decode_steps=max((len(gaps) for _, gaps in sequences), default=0) if steps is None else steps,
        lengths=tuple((tokens, len(gaps) + 1) for tokens, gaps in sequences),
        completions=len(sequences),
        prompt_tokens=sum(tokens for tokens, _ in sequences),
        new_tokens=sum(len(gaps) + 1 for _, gaps in sequences),
        wall_s=wall_s,
        prefill_s=None if decode_s is None else 1.0,
        decode_s=decode_s,
        ttft_s=(1.0,) * len(sequences),
        itl_s=tuple(gap for _, gaps in sequences for gap in gaps),
        same_tokens=True,
    )


def plan(step_bytes: int, kv_bytes_per_token: int, bandwidth: float | None) -> Plan:
    return any_plan(step_bytes=step_bytes, kv_bytes_per_token=kv_bytes_per_token, bandwidth=bandwidth)


def metrics_of(repeats: list[list[Repeat]], prompts: int, windows: tuple[int | None, ...] = ()) -> Metrics:
    measured = figures(repeats, prompts, 1, windows)
    assert measured is not None
    return measured.metrics


@pytest.mark.parametrize(
    ("ranks", "planned", "expected", "cache"),
    [
        # 42.03 tokens/s of Falcon-7B on an RTX A6000 of 768 GB/s, without the cache: 13.84 GB x 42.03 / 768 GB/s
        ([one_repeat((7, [1 / 42.03] * 49), decode_s=49 / 42.03)], plan(FALCON_7B, 0, 768e9), 0.7576, 0),
        # 52.0 tokens/s of Falcon-40B on an H200 is its limit at 512 tokens: (82.607 + 512 x 122880 B) x 52 / 4300 GB/s
        ([one_repeat((487, [1 / 52] * 49), decode_s=49 / 52)], plan(FALCON_40B, 122_880, 4.3e12), 0.9997, 62_914_560),
        # two rows of 100 + 100 tokens: (10 GB + 2 x 150 x 1 MB) / 10.3 ms = 1000 GB/s of 2000
        ([one_repeat(*[(100, [0.0103] * 99)] * 2, decode_s=99 * 0.0103)], plan(10**10, 10**6, 2e12), 0.5, 300_000_000),
        # rows of 3 and 1 steps of 0.25 s read 7 + 8 + 9 and 9 cached tokens, 11 per step: (89 + 11) B / 0.25 s / 1 kB/s
        ([one_repeat((6, [0.25] * 3), (8, [0.25]), decode_s=0.75)], plan(89, 1, 1000.0), 0.4, 11),
        # a second data-parallel rank without prompts takes part in the steps: half a sequence per device
        (
            [one_repeat((8, [0.1] * 3), decode_s=0.3), one_repeat(decode_s=0.3)],
            plan(95, 1, 2000.0),
            0.5,
            5,
        ),
        # continuous batching: 9 s and 9 steps from the first to the last token, with 2 to 10 and 2 to 4 cached tokens
        ([one_repeat((1, [1.0] * 9), (1, [1.0] * 3), decode_s=None)], plan(93, 1, 1000.0), 0.1, 7),
        # faster than the memory bandwidth allows
        ([one_repeat((1, [0.1] * 9), decode_s=0.9)], plan(101, 0, 1000.0), 1.01, 0),
    ],
    ids=[
        "Falcon-7B",
        "Falcon-40B",
        "two rows",
        "a row that ends",
        "a rank without prompts",
        "continuous",
        "impossible",
    ],
)
def test_mbu(ranks: list[Repeat], planned: Plan, expected: float, cache: int) -> None:
    prompts = sum(rank.completions for rank in ranks)
    assert bandwidth_used(planned, metrics_of([ranks, ranks], prompts)) == BandwidthUse(
        share=pytest.approx(expected, rel=1e-4),
        impossible=expected > 1,
        step_s=pytest.approx(ranks[0].itl_s[0]),
        weight_bytes=planned.step_bytes,
        kv_cache_bytes=cache,
        bandwidth=planned.bandwidth,
    )


@pytest.mark.parametrize(
    ("ranks", "planned", "reason"),
    [
        ([one_repeat((7, []), decode_s=0.0)], plan(1, 1, 1.0), "no decode step was measured"),
        ([one_repeat((7, []), decode_s=None)], plan(1, 1, 1.0), "no decode step was measured"),
        ([], plan(1, 1, 1.0), "no decode step was measured"),
        ([one_repeat((7, [0.0, 0.0, 1.0]), decode_s=None)], plan(1, 1, 1.0), "a step gave several tokens"),
        ([one_repeat((7, [1.0]), decode_s=1.0)], plan(0, 0, 1.0), "no weights are read"),
        ([one_repeat((7, [1.0]), decode_s=1.0)], None, "no plan: this engine's memory is not known here"),
        (
            [one_repeat((7, [1.0]), decode_s=1.0)],
            plan(1, 1, None),
            "no bandwidth is known of this machine: python -m launcher.probe",
        ),
    ],
)
def test_no_mbu_has_its_reason(ranks: list[Repeat], planned: Plan | None, reason: str) -> None:
    measured = figures([ranks] if ranks else [], 1, 1)
    assert bandwidth_used(planned, measured and measured.metrics) == BandwidthUse(reason=reason)


WORK = Work(
    step_bytes=10**9,
    step_parameters=5 * 10**8,
    layer_parameters=1,
    kv_bytes_per_token=10**6,
    num_layers=1,
    hidden_size=1,
)
CARD = DEVICES["a6000"]
BANDWIDTH = 768e9


def ended(*steps: list[tuple[int, int]], work: Work = WORK, pace: float = 1.0) -> tuple[list[Repeat], float]:
    """A rank's repeat of consecutive batches, and its seconds. A batch has (prompt tokens, decode steps until its end)
    for each row; the steps run at the share `pace` of the memory bandwidth."""
    rows, seconds = [], 0.0
    for batch in steps:
        taken = []
        for step in range(1, max(steps for _, steps in batch) + 1):
            cached = sum(tokens + step for tokens, until in batch if until >= step)
            taken.append((work.step_bytes + cached * work.kv_bytes_per_token) / BANDWIDTH / pace)
        rows += [(tokens, taken[:until]) for tokens, until in batch]
        seconds += sum(taken)
    count = sum(max(until for _, until in batch) for batch in steps)
    return [one_repeat(*rows, decode_s=seconds, steps=count)], seconds


RAGGED: list[list[list[tuple[int, int]]]] = [
    [[(1500, 127)] + [(7, 127)] * 255],
    [[(1500, 1)] + [(7, 127)] * 255],
    [[(1500, 127)] + [(7, 1)] * 255],
    [[(10, 127)] * 255, [(100_000, 127)]],
    [[(10, 1)] * 64] * 3 + [[(2000, 300)]],
]


@pytest.mark.parametrize("pace", [1.0, 0.5])
@pytest.mark.parametrize("batches", RAGGED)
def test_the_share_of_the_ceiling_is_of_the_steps_that_were_made(
    batches: list[list[tuple[int, int]]], pace: float
) -> None:
    """A run limited only by memory bandwidth reaches its ceiling, for any prompts, even if answers end early."""
    ranks, _ = ended(*batches, pace=pace)
    measured = metrics_of([ranks, ranks], sum(map(len, batches)))
    planned = replace(plan(WORK.step_bytes, 10**6, BANDWIDTH), roofline=Roofline(WORK, Machine(CARD), "single"))
    ceiling = against_ceiling(planned, measured)
    assert (ceiling.share, ceiling.bound) == (pytest.approx(pace), "memory")
    assert bandwidth_used(planned, measured).share == pytest.approx(pace)


def test_a_figure_over_the_ceiling_is_impossible() -> None:
    planned = any_plan(roofline=Roofline(WORK, Machine(CARD), "single"))
    ranks, seconds = ended([(7, 9)], pace=1.25)
    ceiling = against_ceiling(planned, metrics_of([ranks], 1))
    assert ceiling.impossible
    assert ceiling.share == pytest.approx(1.25)
    assert ceiling.tokens_per_s == pytest.approx(9 / seconds / 1.25)


def test_a_ceiling_of_several_ranks_is_that_of_all_of_them() -> None:
    """Two data-parallel ranks with one prompt each, and one rank with a batch on two devices."""
    ranks, seconds = ended([(7, 9)])
    machine = Machine(CARD, 2, LINKS["nvlink4"])
    fsdp, tensor_parallel = Roofline(WORK, machine, "gathered"), Roofline(WORK, machine, "split")
    for roof, repeat, tokens in ((fsdp, ranks * 2, 18), (tensor_parallel, ranks, 9)):
        ceiling = against_ceiling(any_plan(roofline=roof), metrics_of([repeat], len(repeat)))
        at_best = seconds if roof is fsdp else seconds / 2
        assert ceiling.tokens_per_s == pytest.approx(tokens / at_best), roof.scheme


def test_windows_forget() -> None:
    """One of two layers keeps 15 tokens: steps that read 13 to 22 cached tokens read 13, 14 and 8 times 15 in it."""
    ranks = [one_repeat((12, [0.1] * 10), decode_s=1.0)]
    decode = metrics_of([ranks], 1, (None, 16)).decode
    assert decode is not None
    assert decode.cached_tokens == (sum(range(13, 23)) + 13 + 14 + 8 * 15) / 2 / 10


def test_no_ceiling_has_its_reason() -> None:
    ranks, _ = ended([(7, 9)])
    measured = metrics_of([ranks], 1)
    unknown = any_plan(roofline=Roofline(WORK, Machine(DEVICES["cpu"]), "single"))
    for planned, known, reason in (
        (unknown, measured, "no rates are known of this machine: python -m launcher.probe"),
        (any_plan(), measured, "no rates are known of this machine: python -m launcher.probe"),
        (unknown, None, "no decode step was measured"),
    ):
        assert against_ceiling(planned, known).reason == reason


def test_counters_of_an_engine_add_up_over_calls_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics.COUNTERS, "accepted_tokens", "accepted draft tokens")
    rank = replace(one_repeat((7, [1.0]), decode_s=1.0), counters={"accepted_tokens": 3})
    repeats = [[rank, rank], [rank, replace(rank, counters={"accepted_tokens": 5})]]
    spread = metrics_of(repeats, 2).counters["accepted_tokens"]
    assert (spread.median, spread.min, spread.max, spread.values) == (7, 6, 8, (6, 8))
    with pytest.raises(ValueError, match="accepted is not a counter"):
        metrics.summed([{"accepted": 1}])


def guessed(rank: Repeat, **counters: float) -> Repeat:
    return replace(rank, counters={"guessed_tokens": 0, "accepted_guesses": 0, "guessing_s": 0.0, **counters})


def test_tokens_of_one_step_are_one_step() -> None:
    """Two rows of 6 and 3 tokens after the first, in 3 steps of 0.1 s, which read 7 and 8 cached tokens, 10 and 10, and
    12."""
    rank = guessed(
        one_repeat((6, [0.1, 0.0, 0.0, 0.1, 0.0, 0.1]), (7, [0.1, 0.0, 0.1]), decode_s=0.3, steps=3),
        guessed_tokens=12, accepted_guesses=4, guessing_s=0.06, slots_in_decode_steps=6, rows_in_decode_steps=5,
    )  # fmt: skip
    measured = metrics_of([[rank]], 2)
    decode, guesses = measured.decode, measured.speculation
    assert decode is not None
    assert guesses is not None
    assert (decode.tokens, decode.sequences_at_once, decode.tokens_per_row) == (9, 5 / 3, 9 / 5)
    assert decode.cached_tokens == (7 + 8 + 10 + 10 + 12) / 5
    assert guesses.acceptance.median == pytest.approx(4 / 12)
    assert guesses.tokens_per_step.median == pytest.approx(9 / 5)
    assert guesses.guessing.median == pytest.approx(0.2)
    assert measured.slots_in_use is not None
    assert measured.slots_in_use.median == pytest.approx(5 / 6)
    assert measured.rows_in_use is None
    assert metrics_of([[rank]], 2, (None, 10)).decode != decode, "a window sees less"
    assert metrics_of([[one_repeat((6, [0.1]), decode_s=0.1)]], 1).speculation is None


def test_a_run_with_guesses_is_held_against_the_steps_that_it_made() -> None:
    """At full memory bandwidth, a row that gains 4 tokens per step reaches its ceiling, which is 4 times as high."""
    seconds = [(WORK.step_bytes + (7 + found) * WORK.kv_bytes_per_token) / BANDWIDTH for found in (1, 5, 9)]
    gaps = [gap for step in seconds for gap in (step, 0.0, 0.0, 0.0)]
    rank = guessed(one_repeat((7, gaps), decode_s=sum(seconds), steps=3))
    planned = replace(plan(WORK.step_bytes, 10**6, BANDWIDTH), roofline=Roofline(WORK, Machine(CARD), "single"))
    measured = metrics_of([[rank]], 1)
    ceiling = against_ceiling(planned, measured)
    assert (ceiling.share, ceiling.impossible) == (pytest.approx(1), ceiling.impossible)
    assert ceiling.tokens_per_s == pytest.approx(12 / sum(seconds))
    assert bandwidth_used(planned, measured).share == pytest.approx(1)
    assert measured.speculation is not None
    assert measured.speculation.acceptance.median is None, "nothing was guessed"
