"""Memory of each device for a model under an engine: weights and KV cache exactly, activations by formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from shards.model.known_shape import KNOWN_FAMILIES
from shards.plan.cuts import whole_bytes
from shards.plan.layout import Layout
from shards.plan.request import PlanRequest

KNOWN_TOLERANCE, OTHER_TOLERANCE = 0.01, 0.25


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Peak bytes on one device. Capacity and free bytes are None if the memory of the device is not known.

    `kv_cache_bytes` is what the sequences of a batch need, `kv_cache_reserved_bytes` what the engine reserves;
    `buffer_bytes` are parameters gathered, dequantized or packed; `overhead_bytes` are outside the engine's tensors.
    The bytes of a draft model and its cache come on top. `offloaded_bytes` are the device's parameters in main memory
    or on disk; no other field counts them.
    """

    rank: int
    parameter_bytes: int
    kv_cache_bytes: int
    kv_cache_reserved_bytes: int
    activation_bytes: int
    buffer_bytes: int
    overhead_bytes: int
    capacity_bytes: int | None
    draft_parameter_bytes: int = 0
    draft_cache_bytes: int = 0
    offloaded_bytes: int = 0

    @property
    def used_bytes(self) -> int:
        cache = max(self.kv_cache_bytes, self.kv_cache_reserved_bytes)
        draft = self.draft_parameter_bytes + self.draft_cache_bytes
        return self.parameter_bytes + cache + self.activation_bytes + self.buffer_bytes + self.overhead_bytes + draft

    @property
    def nvml_used_bytes(self) -> int:
        """Bytes in use as the driver reports them."""
        return self.used_bytes

    @property
    def peak_allocated_bytes(self) -> int:
        """The peak of the engine's tensors."""
        return self.used_bytes - self.overhead_bytes

    def peak_bytes(self, phase: Literal["load", "prefill", "decode"]) -> int:
        """The peak of tensors in a phase of a run."""
        loaded = self.parameter_bytes + self.draft_parameter_bytes
        if phase == "load":
            return loaded
        return self.peak_allocated_bytes

    @property
    def free_bytes(self) -> int | None:
        if self.capacity_bytes is None:
            return None
        return self.capacity_bytes - self.used_bytes


def make_layout(request: PlanRequest, ends_only: bool = False) -> Layout:
    """The engine's cut of the model; with `ends_only` if the fullest rank is enough."""
    layout = request.engine.layout(request, ends_only)
    if request.offload:
        return request.engine.offloaded(request, layout)
    return layout


def device_plans(request: PlanRequest, layout: Layout) -> tuple[DevicePlan, ...]:
    """Bytes on each device for the requested batch; `layout` is that of the request, or of one with other lengths."""
    engine, pool = request.engine, request.engine.pool(request)
    activations, overhead = engine.activation_bytes(request), engine.overhead_bytes(request)
    caches = {
        part: (cache_bytes(request, request.batch_size, *part), engine.unsliced_bytes(request, *part))
        for part in set(layout.layers)
    }
    offloaded = layout.offloaded_bytes or (0,) * len(layout.layers)
    plans = []
    for rank, (parameters, part) in enumerate(zip(layout.parameter_bytes, layout.layers, strict=True)):
        needed, unsliced = caches[part]
        draft, draft_cache = draft_bytes(request, rank)
        if pool is not None:
            needed, draft_cache = needed + draft_cache, 0
        others = parameters + activations + unsliced + layout.buffer_bytes + overhead + draft + draft_cache
        reserved = needed
        if pool is not None and pool.nbytes is not None:
            reserved = pool.nbytes
        elif pool is not None and request.capacity_bytes is not None:
            reserved = max(0, int(pool.share * request.capacity_bytes) - others)
        plans.append(
            DevicePlan(
                rank=rank,
                parameter_bytes=parameters,
                kv_cache_bytes=min(needed, reserved),
                kv_cache_reserved_bytes=reserved,
                activation_bytes=activations + unsliced,
                buffer_bytes=layout.buffer_bytes,
                overhead_bytes=overhead,
                capacity_bytes=request.capacity_bytes,
                draft_parameter_bytes=draft,
                draft_cache_bytes=draft_cache,
                offloaded_bytes=offloaded[rank],
            )
        )
    return tuple(plans)


def draft_bytes(request: PlanRequest, rank: int) -> tuple[int, int]:
    """Parameters, and keys and values, of a draft model on a device. Every process holds the whole draft model on its
    first device.

    An engine with a pool cuts the draft model like the model, and keeps its cache in the pool.
    """
    if request.draft is None or (request.engine.one_process and rank > 0):
        return 0, 0
    alone = replace(request, shape=request.draft, quantization=None)
    if request.engine.pool(request) is not None:
        return request.engine.layout(alone, ends_only=True).parameter_bytes[0], cache_bytes(alone, request.batch_size)
    windows = request.draft.windows or (None,) * request.draft.num_layers
    tokens = request.batch_size * sum(map(alone.kept_tokens, windows))
    width = 2 * request.draft.cached_heads() * request.draft.head_dim * request.product_bytes
    return whole_bytes(request.draft, alone.storage), tokens * width


def kv_bytes_per_token(request: PlanRequest) -> int:
    """Bytes of keys and values of one token in all layers, on a device that holds all of them."""
    shape, engine = request.shape, request.engine
    return 2 * shape.num_layers * engine.kv_heads(request) * shape.head_dim * engine.kv_value_bytes(request)


def cache_bytes(request: PlanRequest, batch: int, first: int = 0, end: int | None = None) -> int:
    """The peak of keys and values of `batch` sequences, on a device with the layers [first, end).

    Layers with a sliding window hold more while an engine with a scheduler reads prompts: all tokens of a step.
    """
    shape, step = request.shape, request.engine.step_tokens(request)
    windows = (shape.windows or (None,) * shape.num_layers)[first:end]
    tokens = 0
    for window, layers in Counter(windows).items():
        tokens += layers * (batch * request.kept_tokens(window) + min(batch * request.lost_tokens(window), step))
    return kv_bytes_per_token(request) // shape.num_layers * tokens


def load_peaks(request: PlanRequest, layout: Layout) -> tuple[int | None, int]:
    """Peak bytes of loading: anonymous memory on the host of one node, and on one device."""
    if request.quantization is not None:
        layout = make_layout(replace(request, quantization=request.quantization.while_loading()))
    device = max(layout.parameter_bytes) + draft_bytes(request, 0)[0] + request.engine.overhead_bytes(request)
    if request.device.kind != "cpu":
        device += request.engine.packing_bytes(request)
    host = request.engine.load_host_bytes(request)
    if host is not None and request.offload == "cpu":
        host += sum(layout.offloaded_bytes[: request.devices])
    return host, device


def usable_bytes(request: PlanRequest, capacity: int) -> int:
    """The part of a device that the engine may use: its share of the GPU if its pool is what is left of it."""
    pool = request.engine.pool(request)
    if pool is None or pool.nbytes is not None:
        return capacity
    return int(pool.share * capacity)


def missing_bytes(request: PlanRequest, device: DevicePlan) -> int:
    """Bytes that the device lacks. An engine with a pool needs room for a single sequence: the others wait."""
    if device.capacity_bytes is None:
        return 0
    used, pool = device.used_bytes, request.engine.pool(request)
    if pool is not None:
        used += max(cache_bytes(request, 1), pool.nbytes or 0) - device.kv_cache_reserved_bytes
    return used - usable_bytes(request, device.capacity_bytes)


def fits(request: PlanRequest, layout: Layout | None = None) -> bool:
    """True if every device has room for its part."""
    devices = device_plans(request, layout or make_layout(request, ends_only=True))
    return all(missing_bytes(request, device) <= 0 for device in devices)


def largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` for which `holds`, by bisection: it must be true up to some number and then
    false. 0 if none."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def plan_tolerance(model_type: str | None) -> float:
    """The relative error allowed for planned parameter bytes; for unknown families it is an estimate."""
    if model_type in KNOWN_FAMILIES:
        return KNOWN_TOLERANCE
    return OTHER_TOLERANCE
