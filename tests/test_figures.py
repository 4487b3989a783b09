"""Figures of a record: memory bandwidth utilisation against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.figures import at_once, bandwidth_used, measures

FALCON_7B = 13_843_441_408  # bytes of its 6,921,720,704 parameters in 16 bits, all read in a step: the head is tied
FALCON_40B = 82_606_587_904


def one_repeat(*sequences: tuple[int, list[float]], decode_s: float | None, wall_s: float = 10.0) -> dict[str, Any]:
    """What a rank measured in a repeat of prompts of so many tokens, with such gaps after each first token at 1 s."""
    return {
        "completions": len(sequences),
        "prompt_tokens": sum(tokens for tokens, _ in sequences),
        "new_tokens": sum(len(gaps) + 1 for _, gaps in sequences),
        "wall_s": wall_s,
        "prefill_s": None if decode_s is None else 1.0,
        "decode_s": decode_s,
        "ttft_s": [1.0] * len(sequences),
        "itl_s": [gap for _, gaps in sequences for gap in gaps],
        "same_tokens": True,
    }


def plan(step_bytes: int, kv_bytes_per_token: int, bandwidth: float | None) -> dict[str, Any]:
    return {"step_bytes": step_bytes, "kv_bytes_per_token": kv_bytes_per_token, "bandwidth": bandwidth}


@pytest.mark.parametrize(
    ("ranks", "planned", "expected", "cache"),
    [
        # 42.03 tokens/s of Falcon-7B on an RTX A6000 of 768 GB/s, the cache left out: 13.84 GB x 42.03 / 768 GB/s
        ([one_repeat((7, [1 / 42.03] * 49), decode_s=49 / 42.03)], plan(FALCON_7B, 0, 768e9), 0.7576, 0),
        # 52.0 tokens/s of Falcon-40B on an H200 is its limit at 512 tokens: (82.607 + 512 x 122880 B) x 52 / 4300 GB/s
        ([one_repeat((487, [1 / 52] * 49), decode_s=49 / 52)], plan(FALCON_40B, 122_880, 4.3e12), 0.9997, 62_914_560),
        # two rows of 100 + 100 tokens: (10 GB + 2 x 150 x 1 MB) / 10.3 ms = 1000 GB/s of 2000
        ([one_repeat(*[(100, [0.0103] * 99)] * 2, decode_s=99 * 0.0103)], plan(10**10, 10**6, 2e12), 0.5, 300_000_000),
        # rows of 3 and 1 steps of 0.25 s: 4/3 at once, of 7.5 + 3 / 2 tokens in the mean; (88 + 12) B / 0.25 s / 1 kB/s
        ([one_repeat((6, [0.25] * 3), (9, [0.25]), decode_s=0.75)], plan(88, 1, 1000.0), 0.4, 12),
        # a second data-parallel rank without prompts of its own takes the steps with it: half a sequence a device
        (
            [one_repeat((8, [0.1] * 3), decode_s=0.3), one_repeat(decode_s=0.3)],
            plan(95, 1, 2000.0),
            0.5,
            5,
        ),
        # continuous batching, 9 s from the first token to the last, 12 s of gaps: 4/3 at once, of 1 + 7 / 2 tokens
        ([one_repeat((1, [1.0] * 9), (1, [1.0] * 3), decode_s=None)], plan(94, 1, 1000.0), 0.1, 6),
        # faster than the memory
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
def test_mbu(ranks: list[dict[str, Any]], planned: dict[str, Any], expected: float, cache: int) -> None:
    prompts = sum(rank["completions"] for rank in ranks)
    found = bandwidth_used(planned, measures([ranks, ranks], prompts, len(ranks)))
    assert found == {
        "share": pytest.approx(expected, rel=1e-4),
        "impossible": expected > 1,
        "step_s": pytest.approx(ranks[0]["itl_s"][0]),
        "weight_bytes": planned["step_bytes"],
        "kv_cache_bytes": cache,
        "bandwidth": planned["bandwidth"],
    }


@pytest.mark.parametrize(
    ("ranks", "planned", "reason"),
    [
        ([one_repeat((7, []), decode_s=0.0)], plan(1, 1, 1.0), "no decode step was measured"),
        ([one_repeat((7, []), decode_s=None)], plan(1, 1, 1.0), "no decode step was measured"),
        ([], plan(1, 1, 1.0), "no decode step was measured"),
        ([one_repeat((7, [0.0, 0.0, 1.0]), decode_s=None)], plan(1, 1, 1.0), "a step gave several tokens"),
        ([one_repeat((7, [1.0]), decode_s=1.0)], plan(0, 0, 1.0), "no weights are read"),
        ([one_repeat((7, [1.0]), decode_s=1.0)], None, "no weights are read"),
        (
            [one_repeat((7, [1.0]), decode_s=1.0)],
            plan(1, 1, None),
            "no bandwidth is known of this machine: python -m launcher.probe",
        ),
    ],
)
def test_no_mbu_has_its_reason(ranks: list[dict[str, Any]], planned: dict[str, Any] | None, reason: str) -> None:
    figures = measures([ranks] if ranks else [], 1, 1)
    assert bandwidth_used(planned, figures) == {"share": None, "impossible": False, "reason": reason}


def test_sequences_at_once_of_static_batches_of_different_lengths() -> None:
    """Batches one after the other: 2 rows for 4 s, then 1 row for 4 s."""
    assert at_once(one_repeat((1, [2.0] * 2), (1, [2.0] * 2), (1, [2.0] * 2), decode_s=8.0)) == 1.5
