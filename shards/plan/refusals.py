"""Reasons why an engine does not support a request, regardless of memory."""

from __future__ import annotations

from dataclasses import replace

from shards.plan.request import PlanRequest


def illegal(request: PlanRequest) -> str | None:
    """The reason why the engine cannot cut the model like this, None if it can."""
    engine, quantization = request.engine, request.quantization
    if request.mixed_bytes is not None and not engine.mixes_precision:
        return f"{engine.name} multiplies weights in the type that they have, and has no mixed precision."
    if request.mixed_bytes is not None and quantization is not None:
        return f"Mixed precision is of fp32 weights, and these are in {quantization.name}."
    if quantization is not None and not engine.runs(quantization):
        return f"{engine.name} cannot run {quantization.name} weights: {engine.plain_only}."
    problem = no_offload(request) or engine.refusal(request)
    if problem or request.draft is None or engine.pool(request) is None:
        return problem
    # An engine with a pool cuts a draft model like the model itself.
    draft_problem = engine.refusal(replace(request, shape=request.draft, draft=None, quantization=None))
    if draft_problem:
        return f"The draft model: {draft_problem}"
    return None


def no_offload(request: PlanRequest) -> str | None:
    """The reason why weights cannot be offloaded as requested, None if they can."""
    engine, storage = request.engine, request.offload
    if storage is None:
        return None
    if storage not in engine.offloads:
        fact = f"{engine.name} offloads no weights to {storage}"
        if engine.offloads:
            fact += f", but to {engine.offloads[0]}"
        return f"{fact}."
    if storage == "cpu" and request.device.kind == "cpu":
        return "offload=cpu is of no use here: the device is the CPU already."
    if request.quantization is not None:
        return f"Weights are offloaded as they are stored, and these are in {request.quantization.name}."
    return None
