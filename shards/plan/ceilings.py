"""The limits of a plan: what a request asks of its devices and link, given to `shards.plan.roofline`."""

from __future__ import annotations

from dataclasses import replace

from shards.plan.cuts import whole_bytes
from shards.plan.memory import Layout, device_plans, kv_bytes_per_token
from shards.plan.request import PlanRequest
from shards.plan.roofline import Limit, Machine, Roofline, Scheme, Work, decode_step, prefill


def roofline(request: PlanRequest, layout: Layout) -> Roofline | None:
    """What the limits of a plan follow from; None for an engine that does no work."""
    if request.engine == "dummy":
        return None
    return Roofline(_work(request, layout), _machine(request), _scheme(request))


def ceilings(request: PlanRequest, layout: Layout) -> tuple[Limit | None, Limit | None]:
    """Of a decode step halfway through answers of full length, and of the prefill of a batch; None where no rates are
    known. No step reads more cache than vLLM's pool holds."""
    roof = roofline(request, layout)
    if roof is None:
        return None, None
    work, machine, scheme = roof.work, roof.machine, roof.scheme
    prompt = request.mean_prompt_tokens or request.prompt_tokens
    batch = request.mean_batch_size or request.batch_size
    context = request.shape.kept_tokens(prompt + request.max_new_tokens / 2)
    if request.engine == "vllm":
        pool = min(device.kv_cache_reserved_bytes for device in device_plans(request, layout))
        batch = min(batch, pool / (context * kv_bytes_per_token(request)))
    return (
        decode_step(work, machine, scheme, batch=batch, context=context),
        prefill(work, machine, scheme, batch=batch, tokens=prompt),
    )


def step_bytes(request: PlanRequest, layout: Layout) -> int:
    """Weights that a device reads for a decode step of one token (of a pipeline: all of them, one after the other)."""
    shape, n = request.shape, request.tensor_parallel_size
    table = sum(p.numel for p in shape.parameters if p.cut == "embedding") * request.dtype_bytes
    if request.engine == "dummy":
        return 0
    idle = sum(map(request.storage.nbytes, shape.idle))
    if n == 1:
        return whole_bytes(shape, request.storage) - (0 if shape.tied else table) - idle
    if request.engine == "deepspeed":
        return layout.parameter_bytes[0] - table - idle // n
    return layout.parameter_bytes[0] - (0 if shape.tied else table // n) - idle // n


def _work(request: PlanRequest, layout: Layout) -> Work:
    shape, n = request.shape, request.tensor_parallel_size
    gathers = request.engine == "fsdp" and request.num_devices > 1 and request.reshard_after_forward
    return Work(
        step_bytes=n * step_bytes(request, layout),
        step_parameters=shape.step_parameters,
        layer_parameters=shape.layer_parameters - sum(p.numel for p in shape.idle),
        kv_bytes_per_token=n * kv_bytes_per_token(request),
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        dtype_bytes=request.dtype_bytes,
        gathered_bytes=shape.layer_parameters * request.dtype_bytes if gathers else 0,
        all_reduces=_all_reduces(request) if n > 1 else 0,
        gathered_logits=0 if n == 1 else 2 * shape.vocab_size if request.engine == "deepspeed" else shape.vocab_size,
    )


def _all_reduces(request: PlanRequest) -> int:
    """How often the ranks add up hidden states. DeepSpeed keeps the embedding whole, does not add attention and MLP of
    a Falcon first, and adds up logits as well, which carries twice what gathering them does."""
    layers = request.shape.num_layers
    if request.engine == "deepspeed":
        return 2 * layers
    return 1 + layers * (1 if request.shape.parallel_attention else 2)


def _scheme(request: PlanRequest) -> Scheme:
    if request.engine == "fsdp" and request.num_devices > 1:
        return "fsdp"
    return "tensor_parallel" if request.tensor_parallel_size > 1 else "pipeline"


def _machine(request: PlanRequest) -> Machine:
    together = 1 if _scheme(request) == "pipeline" else request.num_devices
    device, quantization = request.device, request.quantization
    if quantization is not None and quantization.eight_bit_products and device.flops_16 is not None:
        device = replace(device, flops_16=2 * device.flops_16)  # A100, RTX A6000 and H100: int8 or fp8 at twice bf16
    return Machine(device, together, request.link)
