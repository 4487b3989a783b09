"""The speed limits of a plan: the work of a request on its devices and links, passed to `shards.plan.roofline`."""

from __future__ import annotations

from dataclasses import replace

from shards.plan.cuts import whole_bytes
from shards.plan.layout import Layout
from shards.plan.memory import device_plans, kv_bytes_per_token
from shards.plan.request import PlanRequest
from shards.plan.roofline import Limit, Machine, Roofline, Work, decode_step, prefill


def roofline(request: PlanRequest, layout: Layout) -> Roofline | None:
    """The work, machine and scheme that determine the limits of a plan; None for an engine that does no work."""
    scheme = request.engine.scheme(request)
    if scheme is None:
        return None
    device, quantization = request.device, request.quantization
    if quantization is not None and quantization.eight_bit_products and device.flops_16 is not None:
        device = replace(device, flops_16=2 * device.flops_16)  # A100, RTX A6000, H100: twice the rate of bf16
    num_devices = request.num_devices
    if scheme == "pipeline":
        num_devices = 1
    shape, n, traffic = request.shape, request.tensor_parallel_size, request.engine.traffic(request)
    work = Work(
        step_bytes=n * step_bytes(request, layout),
        step_parameters=shape.step_parameters,
        layer_parameters=shape.layer_parameters - sum(p.numel for p in shape.idle),
        kv_bytes_per_token=n * kv_bytes_per_token(request),
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        dtype_bytes=request.product_bytes,
        gathered_bytes=traffic.gathered_bytes,
        gathered_over=traffic.gathered_over,
        gathered_in_place=traffic.gathered_in_place,
        all_reduces=traffic.all_reduces,
        gathered_logits=traffic.gathered_logits,
        offloaded_bytes=request.engine.sent_bytes(request, layout),
    )
    return Roofline(work, Machine(device, num_devices, request.link), scheme)


def ceilings(request: PlanRequest, layout: Layout) -> tuple[Limit | None, Limit | None]:
    """The limits of a decode step halfway through answers of full length, and of the prefill of a batch; None if no
    rates are known. No step reads more cache than the engine's pool holds."""
    roof = roofline(request, layout)
    if roof is None:
        return None, None
    work, machine, scheme = roof.work, roof.machine, roof.scheme
    prompt = request.mean_prompt_tokens or request.prompt_tokens
    batch = request.mean_batch_size or request.batch_size
    context = request.shape.kept_tokens(prompt + request.max_new_tokens / 2)
    if request.engine.pool(request) is not None:
        pool = min(device.kv_cache_reserved_bytes for device in device_plans(request, layout))
        batch = min(batch, pool / (context * kv_bytes_per_token(request)))
    return (
        _with_guesses(request, decode_step(work, machine, scheme, batch=batch, context=context)),
        prefill(work, machine, scheme, batch=batch, tokens=prompt),
    )


def _with_guesses(request: PlanRequest, limit: Limit | None) -> Limit | None:
    """The limit of a decode step whose draft tokens are all accepted, or of a plain step if drafting takes too long.

    The draft model is read once for each draft token, before the step that checks them all.
    """
    guesses = request.guessed_tokens
    if limit is None or not guesses:
        return limit
    bandwidth = request.device.bandwidth
    drafting = 0.0
    if request.draft is not None and bandwidth:
        drafting = guesses * request.draft.step_parameters * request.dtype_bytes / bandwidth
    seconds = limit.seconds + drafting
    tokens_per_s = limit.tokens_per_s * (guesses + 1) * limit.seconds / seconds
    if tokens_per_s > limit.tokens_per_s:
        return Limit(seconds, limit.bound, tokens_per_s)
    return limit


def step_bytes(request: PlanRequest, layout: Layout) -> int:
    """Bytes of weights that a device reads for a decode step of one token (in a pipeline: all of them, one device after
    the other)."""
    shape, n = request.shape, request.tensor_parallel_size
    if request.engine.scheme(request) is None:
        return 0
    table = sum(p.numel for p in shape.parameters if p.cut == "embedding") * request.dtype_bytes
    idle = sum(map(request.storage.nbytes, shape.idle))
    weights = layout.parameter_bytes[0] + (layout.offloaded_bytes or (0,))[0]
    if n == 1:
        weights = whole_bytes(shape, request.storage)
    return weights - request.engine.unread_bytes(request, table) - idle // n
