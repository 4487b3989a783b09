"""Repeats of the prompt set -> the figures of a record: medians over the repeats, quantiles over the tokens."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import TYPE_CHECKING, Any

from shards.plan.roofline import Roofline, decode_step

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HEADLINES = ("new_tokens_per_s", "ttft_s", "itl_s", "totals", "partial", "metrics")


def measures(
    repeats: Sequence[Sequence[dict[str, Any]]], prompts: int, world_size: int, windows: Sequence[int | None] = ()
) -> dict[str, Any]:
    """The figures of a run from each repeat's measures by rank; None for all of them where nothing was measured.

    Only repeats of all `prompts` count. Where there is none, because the one repeat was split between attempts, its
    last part does, and `partial` says how many prompts that was. `windows` are those of the model's layers.
    """
    totals = [total(ranks) for ranks in repeats]
    whole = [place for place, one in enumerate(totals) if one["completions"] == prompts]
    chosen = whole or [place for place, one in enumerate(totals) if one["completions"]][-1:]
    if not chosen:
        return dict.fromkeys(HEADLINES)
    made = [totals[place] for place in chosen]
    metrics: dict[str, Any] = {
        name: spread(one[name] for one in made)
        for name in ("new_tokens_per_s", "prefill_tokens_per_s", "decode_tokens_per_s", "wall_s")
    }
    metrics["new_tokens_per_s_per_device"] = spread(one["new_tokens_per_s"] / world_size for one in made)
    for name in ("ttft_s", "itl_s"):
        metrics[name] = quantiles(value for place in chosen for rank in repeats[place] for value in rank[name])
    metrics["decode"] = decoding([repeats[place] for place in chosen], windows)
    return {
        "new_tokens_per_s": metrics["new_tokens_per_s"]["median"],
        "ttft_s": metrics["ttft_s"]["p50"],
        "itl_s": metrics["itl_s"]["p50"],
        "totals": {
            "repeats": len(made),
            "prompts": made[0]["completions"],
            "prompt_tokens": made[0]["prompt_tokens"],
            "new_tokens": made[0]["new_tokens"],
            "same_tokens_every_repeat": all(one["same_tokens"] for one in totals),
        },
        "partial": None if whole else {"prompts": made[0]["completions"], "of": prompts},
        "metrics": metrics,
    }


def total(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One repeat, over all ranks: tokens add up, the slowest rank sets the time."""
    sums = {key: sum(one[key] for one in ranks) for key in ("completions", "prompt_tokens", "new_tokens")}
    wall_s = max(one["wall_s"] for one in ranks)
    phases = {
        name: None if any(one[name] is None for one in ranks) else max(one[name] for one in ranks)
        for name in ("prefill_s", "decode_s")
    }
    later = sums["new_tokens"] - sums["completions"]  # the first token of each prompt is prefill's
    return {
        **sums,
        "wall_s": wall_s,
        "same_tokens": all(one["same_tokens"] for one in ranks),
        "new_tokens_per_s": sums["new_tokens"] / wall_s,
        "prefill_tokens_per_s": sums["prompt_tokens"] / phases["prefill_s"] if phases["prefill_s"] else None,
        "decode_tokens_per_s": later / phases["decode_s"] if phases["decode_s"] else None,
    }


def decoding(repeats: Sequence[Sequence[dict[str, Any]]], windows: Sequence[int | None]) -> dict[str, Any] | None:
    """What the decode steps of some repeats were, the first token of each prompt left out; None where there were none.

    `sequences_at_once` that a rank had in a step, and `cached_tokens` that each of them had in the cache of a layer, in
    the mean: of true lengths, without padding and without what came after an end; `windows` are those of the layers.
    With continuous batching `seconds` are all from the first token to the last.
    """
    ranks = [rank for repeat in repeats for rank in repeat]
    steps = sum(max(rank["decode_steps"] for rank in repeat) for repeat in repeats)
    tokens = sum(new - 1 for rank in ranks for _, new in rank["lengths"])
    seconds = sum(max(map(_decode_s, repeat)) for repeat in repeats)
    if not steps or not tokens or not seconds:
        return None
    cached = sum(_cached_tokens(prompt, new, windows) for rank in ranks for prompt, new in rank["lengths"])
    return {
        "steps": steps,
        "seconds": seconds,
        "tokens": tokens,
        "sequences_at_once": tokens / steps / len(repeats[0]),
        "cached_tokens": cached / tokens,
        "several_tokens_a_step": any(gap == 0 for rank in ranks for gap in rank["itl_s"]),
    }


def _decode_s(rank: dict[str, Any]) -> float:
    found: float | None = rank["decode_s"]
    return rank["wall_s"] - min(rank["ttft_s"], default=rank["wall_s"]) if found is None else found


def _cached_tokens(prompt: int, new: int, windows: Sequence[int | None]) -> float:
    """What the decode steps of one sequence find in the cache of a layer, summed over the steps, a mean of the layers.

    Step t finds prompt + t tokens, or what a window has kept of them.
    """
    total, steps = 0, new - 1
    for window, layers in Counter(windows or (None,)).items():
        growing = steps if window is None else min(max(window - 1 - prompt, 0), steps)
        kept = 0 if window is None else (steps - growing) * (window - 1)
        total += layers * (growing * prompt + growing * (growing + 1) // 2 + kept)
    return total / max(len(windows), 1)


def bandwidth_used(plan: dict[str, Any] | None, metrics: dict[str, Any] | None) -> dict[str, Any]:
    """Memory bandwidth utilisation (MBU) of a device, from the plan of a run and its `measures`.

        MBU = (bytes of weights + bytes of KV cache that a decode step reads) / time of the step / bandwidth

    as Databricks define it in "LLM Inference Performance Engineering: Best Practices" (2023), in the mean over all
    decode steps. Counted is what a step cannot do without: the weights that this device multiplies with (under FSDP
    those of the whole model, however often they are copied), and the cache of the sequences that still decode. Where a
    scheduler reads prompts in the same steps (continuous batching) these last longer, and the true value is higher.
    Over 1 a figure or the bandwidth is wrong.
    """
    decode = (metrics or {}).get("decode")
    bandwidth, weights = (plan or {}).get("bandwidth"), (plan or {}).get("step_bytes")
    reason = _not_measured(decode)
    if reason is None and not weights:
        reason = "no weights are read"
    if reason is None and bandwidth is None:
        reason = "no bandwidth is known of this machine: python -m launcher.probe"
    if reason is not None:
        return {"share": None, "impossible": False, "reason": reason}
    assert plan is not None
    assert decode is not None
    cache = decode["sequences_at_once"] * decode["cached_tokens"] * plan["kv_bytes_per_token"]
    step_s = decode["seconds"] / decode["steps"]
    share = (weights + cache) / step_s / bandwidth
    found = {"step_s": step_s, "weight_bytes": weights, "kv_cache_bytes": round(cache), "bandwidth": bandwidth}
    return {"share": share, "impossible": share > 1, **found}


def against_ceiling(plan: dict[str, Any] | None, metrics: dict[str, Any] | None) -> dict[str, Any]:
    """Measured decode speed as a share of what the machine allows for the steps that were really made; over 1 a figure
    or a rate is wrong. The ceiling is of all ranks together, in tokens/s."""
    decode, roof = (metrics or {}).get("decode"), (plan or {}).get("roofline")
    reason, limit = _not_measured(decode), None
    if decode is not None and roof is not None:
        known = Roofline.from_dict(roof)
        at_once, cached = decode["sequences_at_once"], decode["cached_tokens"]
        limit = decode_step(known.work, known.machine, known.scheme, batch=at_once, context=cached)
    if reason is None and limit is None:
        reason = "no rates are known of this machine: python -m launcher.probe"
    if reason is not None:
        return {"decode_tokens_per_s": None, "bound": None, "share": None, "impossible": False, "reason": reason}
    assert decode is not None
    assert limit is not None
    share = decode["steps"] * limit.seconds / decode["seconds"]
    ceiling = {"decode_tokens_per_s": limit.tokens_per_s, "bound": limit.bound}
    return {**ceiling, "share": share, "impossible": share > 1}


def _not_measured(decode: dict[str, Any] | None) -> str | None:
    if decode is None:
        return "no decode step was measured"
    return "a step gave several tokens" if decode["several_tokens_a_step"] else None


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Median, extremes and the raw values over the repeats; a value that does not exist makes all of them None."""
    raw = list(values)
    known = [value for value in raw if value is not None]
    if not known or len(known) < len(raw):
        reason = "continuous batching interleaves prefill and decode, or nothing was decoded"
        return {"median": None, "min": None, "max": None, "values": raw, "reason": reason}
    return {"median": statistics.median(known), "min": min(known), "max": max(known), "values": raw}


def quantiles(values: Iterable[float]) -> dict[str, Any]:
    """p50, p90 and p99 by linear interpolation, with the count; None where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return {"p50": None, "p90": None, "p99": None, "count": 0, "reason": "no such value was measured"}

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "count": len(ordered)}
