"""What one device holds for a model under an engine: weights exactly, KV cache exactly, activations by formula."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil, prod

from shards.machine.hardware import MIB
from shards.plan.cuts import cut_up, padded_vocabulary, spread
from shards.plan.request import PlanRequest

LOAD_RING_BYTES = 64 * MIB
"""Buffers through which a rank reads its shards."""

_CUDA_CONTEXT_BYTES = 512 * MIB
_NCCL_BYTES = 384 * MIB
_VLLM_GRAPHS_BYTES = 768 * MIB


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Bytes on one device at their peak. Capacity and free are None where a device has no memory of its own.

    `kv_cache_bytes` is what the sequences of a batch need, `kv_cache_reserved_bytes` what the engine sets aside;
    `buffer_bytes` are parameters gathered, widened or packed; `overhead_bytes` lie outside the engine's tensors.
    """

    rank: int
    parameter_bytes: int
    kv_cache_bytes: int
    kv_cache_reserved_bytes: int
    activation_bytes: int
    buffer_bytes: int
    overhead_bytes: int
    capacity_bytes: int | None

    @property
    def used_bytes(self) -> int:
        cache = max(self.kv_cache_bytes, self.kv_cache_reserved_bytes)
        return self.parameter_bytes + cache + self.activation_bytes + self.buffer_bytes + self.overhead_bytes

    @property
    def free_bytes(self) -> int | None:
        return None if self.capacity_bytes is None else self.capacity_bytes - self.used_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """What does not depend on batch and lengths, by rank: bytes of parameters, decoder layers; and gathered bytes."""

    parameter_bytes: tuple[int, ...]
    layers: tuple[int, ...]
    buffer_bytes: int


def make_layout(request: PlanRequest, ends_only: bool = False) -> Layout:
    """How the engine cuts the model; bytes of parameters are exact. `ends_only`: of the first and the last rank where
    the engine cuts every layer, one of which is always the fullest."""
    n, num_layers = request.num_devices, request.shape.num_layers
    if request.engine == "dummy":
        return Layout((0,) * n, (num_layers,) * n, 0)
    if request.engine == "transformers":
        held, layers = spread(request.shape, n, request.storage)
        return Layout(held, layers, _buffer_bytes(request))
    held = cut_up(request.shape, request.engine, n, request.storage, {0, n - 1} if ends_only else None)
    return Layout(held, (num_layers,) * len(held), _buffer_bytes(request))


def device_plans(request: PlanRequest, layout: Layout) -> tuple[DevicePlan, ...]:
    """What each device holds of a batch as asked for; `layout` is that of the request, or of one with other lengths."""
    activations, overhead = _activation_bytes(request), _overhead_bytes(request)
    parts = [(0, request.shape.num_layers)] * len(layout.layers)
    if request.engine == "transformers":
        ends = tuple(accumulate(layout.layers))
        parts = list(zip((0, *ends), ends, strict=False))
    caches = {
        part: (cache_bytes(request, request.batch_size, *part), _unsliced_bytes(request, *part)) for part in set(parts)
    }
    return tuple(
        _device_plan(request, rank, held, caches[part][0], activations + caches[part][1], overhead, layout)
        for rank, (held, part) in enumerate(zip(layout.parameter_bytes, parts, strict=True))
    )


def _device_plan(
    request: PlanRequest, rank: int, held: int, needed: int, activations: int, overhead: int, layout: Layout
) -> DevicePlan:
    reserved = _reserved_bytes(request, held + activations + layout.buffer_bytes + overhead)
    return DevicePlan(
        rank=rank,
        parameter_bytes=held,
        kv_cache_bytes=needed if reserved is None else min(needed, reserved),
        kv_cache_reserved_bytes=needed if reserved is None else reserved,
        activation_bytes=activations,
        buffer_bytes=layout.buffer_bytes,
        overhead_bytes=overhead,
        capacity_bytes=request.device.capacity_bytes,
    )


def kv_bytes_per_token(request: PlanRequest) -> int:
    """Keys and values of one token of one sequence in all layers, on a device that holds all of them."""
    if request.engine == "dummy":
        return 0
    shape, n = request.shape, request.tensor_parallel_size
    heads = max(1, shape.cached_heads(request.kv_heads_only or request.engine == "vllm") // n)
    return 2 * shape.num_layers * heads * shape.head_dim * (request.kv_dtype_bytes or request.dtype_bytes)


def cache_bytes(request: PlanRequest, batch: int, first: int = 0, end: int | None = None) -> int:
    """The most keys and values of `batch` sequences, on a device that holds the layers from `first` to before `end`.

    Layers with a window hold more while vLLM reads prompts: all tokens of a step.
    """
    shape, step = request.shape, request.batched_tokens if request.engine == "vllm" else 0
    windows = (shape.windows or (None,) * shape.num_layers)[first:end]
    tokens = sum(batch * request.kept_tokens(one) + min(batch * request.lost_tokens(one), step) for one in windows)
    return kv_bytes_per_token(request) // shape.num_layers * tokens


def _unsliced_bytes(request: PlanRequest, first: int, end: int) -> int:
    """Beside the cache after the prompts: transformers cuts sliding layers to their window by views, which hold on to
    all keys and values of a prompt until the next step."""
    if request.engine in ("vllm", "dummy"):
        return 0
    lost = sum(request.lost_tokens(window) for window in request.shape.windows[first:end])
    return request.batch_size * lost * kv_bytes_per_token(request) // request.shape.num_layers


def load_peaks(request: PlanRequest, layout: Layout) -> tuple[int | None, int]:
    """Bytes at the worst moment of loading: of anonymous memory on the host of one node, and on one device.

    Every process reads its own shards through small buffers into place: there is never more than the shards themselves.
    None for the host under vLLM, whose own loaders (backend.load_format) map or read files as they see fit.
    """
    processes = 1 if request.engine == "transformers" else min(request.devices, request.num_devices)
    rings = {"dummy": 0, "vllm": None}.get(request.engine, processes * LOAD_RING_BYTES)
    if request.quantization is not None:
        layout = make_layout(replace(request, quantization=request.quantization.while_loading()))
    return rings, max(layout.parameter_bytes) + _overhead_bytes(request)


def _buffer_bytes(request: PlanRequest) -> int:
    """FSDP2's gathered parameters: the root group for good, beside it two layers (the next is gathered ahead), or the
    root's own copy while it is gathered. Of a quantization that widens its weights: the largest matrix. On a CPU vLLM
    packs embedding and head for its kernels, also tied ones, and keeps both (vocab_parallel_embedding.py)."""
    n, quantization = request.num_devices, request.quantization
    if request.engine == "vllm" and request.device.kind == "cpu":
        return 2 * padded_vocabulary(request.shape.vocab_size) // n * request.shape.hidden_size * request.dtype_bytes
    if quantization is not None and quantization.unpacks:
        return request.dtype_bytes * max(
            (p.numel for p in request.shape.parameters if quantization.applies(p)), default=0
        )
    if request.engine != "fsdp" or n == 1:
        return 0
    groups = request.shape.groups()
    sizes = {layer: sum(_gathered_numel(p.shape, n) for p in members) for layer, members in groups.items()}
    root = sizes.pop(None, 0)
    layers = 2 * max(sizes.values(), default=0) if request.reshard_after_forward else sum(sizes.values())
    return request.dtype_bytes * (root + max(root, layers))


def _gathered_numel(shape: tuple[int, ...], n: int) -> int:
    rows = shape[0] if shape else 1
    return ceil(rows / n) * n * prod(shape[1:])


def _activation_bytes(request: PlanRequest) -> int:
    """Estimate of the largest set of temporaries: of a prefill through one layer, or of the logits of the last tokens.

    A layer holds for each token its input, the norms and their sum (4 h); in attention the fused, the ordered and the
    rotated heads and their output; in the MLP the inner activations (2 I, gated 3 I). Module engines add the mask, and
    one layer's keys and values once more, joined or expanded to the query heads. Logits are there in fp32 as well.
    """
    if request.engine == "dummy":
        return 0
    shape, e, n = request.shape, request.dtype_bytes, request.tensor_parallel_size
    vllm = request.engine == "vllm"
    sequences = request.sequences if vllm else request.batch_size
    rows = request.batched_tokens if vllm else request.batch_size * request.prompt_tokens
    heads = shape.num_attention_heads + 2 * shape.cached_heads(request.kv_heads_only)
    attention = (3 * heads + shape.num_attention_heads) * shape.head_dim
    mlp = (3 if shape.gated_mlp else 2) * shape.intermediate_size
    layer = rows * e * (4 * shape.hidden_size + max(attention, mlp) // n)
    logits = sequences * shape.vocab_size * (e + 4)
    if vllm:
        return max(layer, logits)
    mask = request.batch_size * request.prompt_tokens * request.context * (1 + e)
    again = 2 * request.batch_size * request.context * shape.num_attention_heads * shape.head_dim * e // n
    return max(layer + mask + again, again + logits)


def _overhead_bytes(request: PlanRequest) -> int:
    """What the driver and the engine keep beside tensors on a CUDA device: context, NCCL's buffers, vLLM's graphs."""
    if request.device.kind == "cpu" or request.engine == "dummy":
        return 0
    several = request.num_devices > 1 and request.engine != "transformers"
    graphs = _VLLM_GRAPHS_BYTES if request.engine == "vllm" else 0
    return _CUDA_CONTEXT_BYTES + (_NCCL_BYTES if several else 0) + graphs


def _reserved_bytes(request: PlanRequest, others: int) -> int | None:
    """The pool that vLLM sets aside for keys and values: what was asked for, or its share of the card less the rest."""
    if request.engine != "vllm":
        return None
    if request.kv_cache_memory_bytes is not None:
        return request.kv_cache_memory_bytes
    if request.device.capacity_bytes is None:
        return None
    return max(0, int(request.gpu_memory_utilization * request.device.capacity_bytes) - others)
