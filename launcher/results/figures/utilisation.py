"""Compare the decode steps of a run with its hardware's limits: bandwidth utilisation, and the share of the ceiling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.config.engines import NO_PLAN
from launcher.results.measured import BandwidthUse, CeilingShare
from shards.plan.roofline import decode_step

if TYPE_CHECKING:
    from launcher.results.measured import Metrics
    from shards.plan.plan import Plan

NO_STEP, SEVERAL_TOKENS = "no decode step was measured", "a step gave several tokens"
"""Reasons why a figure of decode steps is missing."""


def bandwidth_used(plan: Plan | None, metrics: Metrics | None, hint: str = "python -m launcher.probe") -> BandwidthUse:
    """Memory bandwidth utilisation (MBU) of a device, from the plan of a run and its metrics.

        MBU = (bytes of weights + bytes of KV cache that a decode step reads) / time of the step / bandwidth

    as Databricks define it in "LLM Inference Performance Engineering: Best Practices" (2023), averaged over all decode
    steps. Only necessary reads count: the weights that this device multiplies with (under FSDP those of the whole
    model, however often they are copied), and the cache of the sequences that are still decoding. If the scheduler
    also prefills prompts in decode steps (continuous batching), these take longer, and the true value is higher. A
    value over 1 means that a figure or the bandwidth is wrong. `hint` says how to find out the bandwidth.
    """
    if metrics is None or metrics.decode is None:
        return BandwidthUse(reason=NO_STEP)
    decode = metrics.decode
    if decode.several_tokens_a_step:
        return BandwidthUse(reason=SEVERAL_TOKENS)
    if plan is None:
        return BandwidthUse(reason=NO_PLAN)
    if not plan.step_bytes:
        return BandwidthUse(reason="no weights are read")
    if plan.bandwidth is None:
        return BandwidthUse(reason=f"no bandwidth is known of this machine: {hint}")
    cache = decode.sequences_at_once * decode.cached_tokens * plan.kv_bytes_per_token
    step_s = decode.seconds / decode.steps
    share = (plan.step_bytes + cache) / step_s / plan.bandwidth
    return BandwidthUse(
        share=share,
        impossible=share > 1,
        step_s=step_s,
        weight_bytes=plan.step_bytes,
        kv_cache_bytes=round(cache),
        bandwidth=plan.bandwidth,
    )


def against_ceiling(plan: Plan | None, metrics: Metrics | None, hint: str = "python -m launcher.probe") -> CeilingShare:
    """The measured decode speed as a share of what the hardware allows for these steps.

    `hint` says how to find out the hardware's rates.
    """
    if metrics is None or metrics.decode is None:
        return CeilingShare(reason=NO_STEP)
    decode = metrics.decode
    if decode.several_tokens_a_step:
        return CeilingShare(reason=SEVERAL_TOKENS)
    if plan is None:
        return CeilingShare(reason=NO_PLAN)
    limit = None
    if plan.roofline is not None:
        roof = plan.roofline
        limit = decode_step(
            roof.work, roof.machine, roof.scheme, batch=decode.sequences_at_once, context=decode.cached_tokens
        )
    if limit is None:
        return CeilingShare(reason=f"no rates are known of this machine: {hint}")
    share, pace = decode.steps * limit.seconds / decode.seconds, limit.tokens_per_s * decode.tokens_per_row
    return CeilingShare(share=share, impossible=share > 1, tokens_per_s=pace, bound=limit.bound)
