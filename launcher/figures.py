"""Repeats of the prompt set -> the figures of a record: medians over the repeats, quantiles over the tokens."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HEADLINES = ("new_tokens_per_s", "ttft_s", "itl_s", "totals", "partial", "metrics")


def measures(repeats: Sequence[Sequence[dict[str, Any]]], prompts: int, world_size: int) -> dict[str, Any]:
    """The figures of a run from each repeat's measures by rank; None for all of them where nothing was measured.

    Only repeats of all `prompts` count. Where there is none, because the one repeat was split between attempts, its
    last part does, and `partial` says how many prompts that was.
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
    metrics["sequences_at_once"] = statistics.mean(at_once(rank) for place in chosen for rank in repeats[place])
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


def at_once(rank: dict[str, Any]) -> float:
    """How many sequences a rank decoded at once, on average over the time from the first token to the last.

    With static batches that is the time of the decode phases, in which a row that has ended no longer counts.
    """
    busy: float | None = rank["decode_s"]
    if busy is None:
        busy = rank["wall_s"] - min(rank["ttft_s"], default=rank["wall_s"])
    return sum(rank["itl_s"]) / busy if busy > 0 else 0.0


def bandwidth_used(plan: dict[str, Any] | None, figures: dict[str, Any]) -> dict[str, Any]:
    """Memory bandwidth utilisation (MBU) of a device, from the plan of a run and its `measures`.

        MBU = (bytes of weights + bytes of KV cache that a decode step reads) / time of the step / bandwidth

    as Databricks define it in "LLM Inference Performance Engineering: Best Practices" (2023). Counted is what the step
    cannot do without: the weights that this device multiplies with (under FSDP those of the whole model, however often
    they are copied), and the cache of the sequences that still decode, halfway through their answers, without padding.
    The time is the median gap between two tokens of a sequence: a step gives each of them one token. Where a scheduler
    reads prompts in the same steps (continuous batching) these last longer, and the true value is higher. Over 1 a
    figure or the bandwidth is wrong.
    """
    step_s = (figures["metrics"] or {"itl_s": {"p50": None}})["itl_s"]["p50"]
    bandwidth, weights = (plan or {}).get("bandwidth"), (plan or {}).get("step_bytes")
    reasons = {
        "no decode step was measured": step_s is None,
        "a step gave several tokens": step_s == 0,
        "no weights are read": not weights,
        "no bandwidth is known of this machine: python -m launcher.probe": bandwidth is None,
    }
    if reason := next((text for text, holds in reasons.items() if holds), None):
        return {"share": None, "impossible": False, "reason": reason}
    assert plan is not None
    totals, sequences = figures["totals"], figures["metrics"]["sequences_at_once"]
    context = (totals["prompt_tokens"] + totals["new_tokens"] / 2) / totals["prompts"]
    cache = sequences * context * plan["kv_bytes_per_token"]
    share = (weights + cache) / step_s / bandwidth
    found = {"step_s": step_s, "weight_bytes": weights, "kv_cache_bytes": round(cache), "bandwidth": bandwidth}
    return {"share": share, "impossible": share > 1, **found}


def against_ceiling(plan: dict[str, Any] | None, metrics: dict[str, Any] | None) -> dict[str, Any]:
    """Measured decode speed as a share of what the machine allows by plan; over 1 a figure or a rate is wrong.

    A batch of the plan is one rank's where prompts are split over ranks: there the ceiling is of all ranks together.
    """
    limit = (plan or {}).get("limit")
    measured = metrics and (metrics["decode_tokens_per_s"]["median"] or metrics["new_tokens_per_s"]["median"])
    if limit is None or not measured:
        reason = "nothing was measured" if limit else "no rates are known of this machine: python -m launcher.probe"
        return {"decode_tokens_per_s": None, "bound": None, "share": None, "impossible": False, "reason": reason}
    share = measured / limit["tokens_per_s"]
    ceiling = {"decode_tokens_per_s": limit["tokens_per_s"], "bound": limit["bound"]}
    return {**ceiling, "share": share, "impossible": share > 1}


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
