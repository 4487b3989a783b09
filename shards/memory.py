"""What one device holds for a model under an engine: weights exactly, KV cache exactly, activations by formula."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod

from shards.cuts import cut_up, spread
from shards.hardware import CPU, MIB, Device, Link
from shards.model import ModelShape
from shards.quantization import Quantization, Storage

LOAD_RING_BYTES = 64 * MIB
"""Buffers through which a rank reads its shards."""

_CUDA_CONTEXT_BYTES = 512 * MIB
_NCCL_BYTES = 384 * MIB
_VLLM_GRAPHS_BYTES = 768 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is to be put where. `devices` are those of each node; `batch_size` is that of each rank under fsdp.

    `kv_heads_only`: module engines keep keys and values of kv heads only, not as transformers' own Falcon expands them.
    `kv_block_tokens`: the tokens of a sequence for which an engine takes up its cache at a time.
    """

    shape: ModelShape
    engine: str
    devices: int = 1
    num_nodes: int = 1
    dtype_bytes: int = 2
    quantization: Quantization | None = None
    batch_size: int = 1
    prompt_tokens: int = 512
    max_new_tokens: int = 128
    device: Device = CPU
    link: Link | None = None
    kv_heads_only: bool = True
    reshard_after_forward: bool = True
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    kv_block_tokens: int = 1
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256

    @property
    def storage(self) -> Storage:
        return Storage(self.dtype_bytes, self.quantization)

    @property
    def num_devices(self) -> int:
        """Devices that hold parts of the model: transformers on a CPU is one process, and so one device."""
        alone = self.engine == "transformers" and self.device.kind == "cpu"
        return 1 if alone else self.devices * self.num_nodes

    @property
    def tensor_parallel_size(self) -> int:
        return self.num_devices if self.engine in ("deepspeed", "tensor_parallel", "vllm") else 1

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.max_new_tokens

    @property
    def cached_tokens(self) -> int:
        """Tokens of a sequence for which there is cache at its end."""
        return ceil(self.context / self.kv_block_tokens) * self.kv_block_tokens


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Bytes on one device at their peak. Capacity and free are None where a device has no memory of its own.

    `kv_cache_bytes` is what the sequences of a batch need, `kv_cache_reserved_bytes` what the engine sets aside;
    `buffer_bytes` are parameters gathered or widened for a while; `overhead_bytes` lie outside the engine's tensors.
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


def make_layout(request: PlanRequest) -> Layout:
    """How the engine cuts the model; bytes of parameters are exact."""
    n, num_layers = request.num_devices, request.shape.num_layers
    if request.engine == "dummy":
        return Layout((0,) * n, (num_layers,) * n, 0)
    if request.engine == "transformers":
        held, layers = spread(request.shape, n, request.storage)
        return Layout(held, layers, _buffer_bytes(request))
    held = cut_up(request.shape, request.engine, n, request.storage)
    return Layout(held, (num_layers,) * n, _buffer_bytes(request))


def device_plans(request: PlanRequest, layout: Layout) -> tuple[DevicePlan, ...]:
    """What each device holds of a batch as asked for; `layout` is that of the request, or of one with other lengths."""
    per_token, activations, overhead = kv_bytes_per_token(request), _activation_bytes(request), _overhead_bytes(request)
    return tuple(
        _device_plan(request, rank, held, per_token * layers // request.shape.num_layers, activations, overhead, layout)
        for rank, (held, layers) in enumerate(zip(layout.parameter_bytes, layout.layers, strict=True))
    )


def _device_plan(
    request: PlanRequest, rank: int, held: int, per_token: int, activations: int, overhead: int, layout: Layout
) -> DevicePlan:
    needed = per_token * request.batch_size * request.cached_tokens
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
    return 2 * shape.num_layers * heads * shape.head_dim * request.dtype_bytes


def load_peaks(request: PlanRequest, layout: Layout) -> tuple[int, int]:
    """Bytes at the worst moment of loading: of anonymous memory on the host of one node, and on one device.

    Every process reads its own shards through small buffers into place: there is never more than the shards themselves.
    """
    processes = 1 if request.engine == "transformers" else min(request.devices, request.num_devices)
    rings = 0 if request.engine == "dummy" else processes * LOAD_RING_BYTES
    if request.quantization is not None:
        layout = make_layout(replace(request, quantization=request.quantization.while_loading()))
    return rings, max(layout.parameter_bytes) + _overhead_bytes(request)


def _buffer_bytes(request: PlanRequest) -> int:
    """FSDP2's gathered parameters: the root group for good, beside it two layers (the next is gathered ahead), or the
    root's own copy while it is gathered. Of a quantization that widens its weights: the largest matrix."""
    n, quantization = request.num_devices, request.quantization
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
    sequences = request.max_num_seqs if vllm else request.batch_size
    rows = request.max_num_batched_tokens if vllm else request.batch_size * request.prompt_tokens
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
