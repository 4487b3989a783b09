"""Who holds what, before a process starts: bytes of each device, what fits, what is not possible, how fast at best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from shards.errors import PlanError
from shards.machine.hardware import GIB
from shards.plan.ceilings import ceilings, roofline, step_bytes
from shards.plan.cuts import misfit, padded_vocabulary, uncuttable
from shards.plan.memory import (
    DevicePlan,
    Layout,
    cache_bytes,
    device_plans,
    kv_bytes_per_token,
    load_peaks,
    make_layout,
)
from shards.plan.request import MOST_DEVICES, PlanRequest
from shards.plan.roofline import Limit, Roofline

__all__ = ["DevicePlan", "Plan", "PlanError", "PlanRequest", "make_plan"]

_LARGEST = 2**20
_ONLY_PLAIN = {
    "fsdp": "FSDP2 cuts plain weights by rows, which packed ones do not have",
    "deepspeed": "AutoTP cuts plain weights only",
    "tensor_parallel": "its layers multiply plain weights only",
    "vllm": "vLLM no longer has bitsandbytes",
    "transformers": "of quantized weights, a transformers model is planned with those of bitsandbytes only",
}
"""Why engines do not run a quantization. vllm: its methods, of release 0.32, are in layers/quantization/__init__.py."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every device will hold and the ceiling of speed, for one request. Bytes are at their peak.

    `largest_batch` and `longest_context` fit where the rest stays as asked; with no known capacity there is no largest
    batch. `smallest_devices` is the least number of devices a node on which this batch fits. `limit` is of a decode
    step halfway through answers of full length, `prefill_limit` of the prompts of one batch; None where no rates are
    known. `roofline` and the `windows` of the layers are what the limit of any other step follows from.
    `load_host_bytes` are of all ranks of a node, None where not known, `step_bytes` the weights that a device reads for
    a decode step and `bandwidth` the bytes/s at which it can; `kv_cache_memory_bytes` is the pool that the engine is
    told to reserve.
    """

    engine: str
    num_devices: int
    device_name: str
    num_parameters: int
    kv_bytes_per_token: int
    step_bytes: int
    bandwidth: float | None
    kv_cache_memory_bytes: int | None
    devices: tuple[DevicePlan, ...]
    load_host_bytes: int | None
    load_device_bytes: int
    largest_batch: int | None
    longest_context: int | None
    smallest_devices: int | None
    limit: Limit | None
    prefill_limit: Limit | None
    roofline: Roofline | None
    windows: tuple[int | None, ...]
    quantization: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as plan.json keeps them."""
        found = asdict(self)
        for values, device in zip(found["devices"], self.devices, strict=True):
            values["free_bytes"] = device.free_bytes
        found |= {name: list(found[name]) for name in ("devices", "windows")}
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` gave."""
        fields = dict(values)
        fields["devices"] = tuple(
            DevicePlan(**{name: value for name, value in device.items() if name != "free_bytes"})
            for device in values["devices"]
        )
        for name in ("limit", "prefill_limit"):
            fields[name] = None if values[name] is None else Limit(**values[name])
        fields["roofline"] = values["roofline"] and Roofline.from_dict(values["roofline"])
        fields["windows"] = tuple(values["windows"])
        return cls(**fields)


def make_plan(request: PlanRequest) -> Plan:
    """The plan for `request`; PlanError for what the engine cannot do or what does not fit, with hints that hold."""
    problem = _illegal(request) or _too_large(request)
    if problem is not None:
        raise PlanError(problem, _hint(request))
    layout, ends = make_layout(request), make_layout(request, ends_only=True)
    host, device = load_peaks(request, layout)
    decode, prefill = ceilings(request, layout)
    return Plan(
        engine=request.engine,
        num_devices=request.num_devices,
        device_name=request.device.name,
        num_parameters=request.shape.num_parameters,
        kv_bytes_per_token=kv_bytes_per_token(request),
        step_bytes=step_bytes(request, layout),
        bandwidth=request.device.bandwidth,
        kv_cache_memory_bytes=request.kv_cache_memory_bytes,
        devices=device_plans(request, layout),
        load_host_bytes=host,
        load_device_bytes=device,
        largest_batch=_largest_batch(request, ends),
        longest_context=_longest_context(request, ends),
        smallest_devices=_smallest_devices(request),
        limit=decode,
        prefill_limit=prefill,
        roofline=roofline(request, layout),
        windows=request.shape.windows,
        quantization=request.quantization.name if request.quantization else None,
    )


def _illegal(request: PlanRequest) -> str | None:
    """Why the engine cannot cut the model so, None if it can."""
    shape, n, engine = request.shape, request.tensor_parallel_size, request.engine
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    if request.quantization is not None and engine not in (*request.quantization.engines, "dummy"):
        return f"{engine} cannot run {request.quantization.name} weights: {_ONLY_PLAIN[engine]}."
    if engine == "transformers" and request.num_nodes > 1:
        return f"The transformers engine is one process and cannot reach over {request.num_nodes} nodes."
    if engine == "tensor_parallel":
        return uncuttable(shape, n)
    if engine == "deepspeed" and n > 1 and shape.idle:
        return f"DeepSpeed's AutoTP does not cut the {shape.experts[0]} experts of a layer, which are one tensor."
    if heads % n:
        return f"{heads} attention heads cannot be divided by {n} devices, as tensor parallelism with {engine} needs."
    if kv_heads % n and (engine == "deepspeed" or n % kv_heads):
        return f"{kv_heads} key and value heads cannot be divided by {n} devices, as {engine} needs."
    padded = padded_vocabulary(shape.vocab_size)
    for what, size in (("inner MLP columns", shape.intermediate_size), ("rows of the padded vocabulary", padded)):
        if engine == "vllm" and size % n:
            return f"{size} {what} cannot be divided by {n} devices, as vllm needs."
    if engine == "vllm" and shape.family in ("qwen2", "qwen3") and len(set(shape.windows)) > 1:
        return "vllm runs no Qwen of which only some layers have a sliding window."
    why = misfit(shape, n, request.storage) if engine == "vllm" else None
    return f"{why}, as vllm needs." if why else None


def _too_large(request: PlanRequest) -> str | None:
    """Why it does not fit a device, None if it does or if no capacity is known."""
    worst = max(device_plans(request, make_layout(request)), key=lambda device: _missing_bytes(request, device))
    if (missing := _missing_bytes(request, worst)) <= 0:
        return None
    assert worst.capacity_bytes is not None
    n, usable = request.num_devices, _usable_bytes(request, worst.capacity_bytes)
    part = f"{(usable + missing) / GIB:.1f} GiB on " + (f"device {worst.rank} of {n}" if n > 1 else "one device")
    kind = f" in {request.quantization.name}" if request.quantization else ""
    may = f", of which {request.engine} may use {usable / GIB:.1f}" if usable < worst.capacity_bytes else ""
    return (
        f"{request.shape.num_parameters / 1e9:.1f} billion parameters{kind} with {request.engine} need {part} "
        f"(weights {worst.parameter_bytes / GIB:.1f}, batch {request.batch_size} of {request.context} tokens), "
        f"{request.device.name} has {worst.capacity_bytes / GIB:.1f} GiB{may}."
    )


def _missing_bytes(request: PlanRequest, device: DevicePlan) -> int:
    """Bytes that the device lacks. vLLM queues what its pool cannot hold, and needs room for one sequence only."""
    if device.capacity_bytes is None:
        return 0
    used, usable = device.used_bytes, _usable_bytes(request, device.capacity_bytes)
    if request.engine == "vllm":
        used += max(cache_bytes(request, 1), request.kv_cache_memory_bytes or 0) - device.kv_cache_reserved_bytes
    return used - usable


def _usable_bytes(request: PlanRequest, capacity: int) -> int:
    """What vLLM allows itself is a share of the card, unless it is told the size of its cache."""
    shared = request.engine == "vllm" and request.kv_cache_memory_bytes is None
    return int(request.gpu_memory_utilization * capacity) if shared else capacity


def _fits(request: PlanRequest, layout: Layout | None = None) -> bool:
    devices = device_plans(request, layout or make_layout(request, ends_only=True))
    return all(_missing_bytes(request, device) <= 0 for device in devices)


def _possible(request: PlanRequest) -> bool:
    return _illegal(request) is None and _fits(request)


def _hint(request: PlanRequest) -> str:
    """What to change, each of which is possible as it stands; else how much memory a device would have to have."""
    found = []
    counts = list(_possible_devices(request))
    fewer = [count for count in counts if count <= request.devices]
    if counts:
        found.append(f"devices={fewer[-1] if fewer else counts[0]}")
    if _illegal(request) is None:
        found += _smaller(request, make_layout(request, ends_only=True))
    for engine in request.quantization.engines if request.quantization else ("fsdp", "vllm"):
        other = replace(request, engine=engine)
        if engine != request.engine and _possible(other):
            found.append(f"backend={engine}")
        elif not found and (count := next(_possible_devices(other), None)):
            found.append(f"backend={engine} with devices={count}")
    if not found and request.quantization and _illegal(request):
        return "weights that are not quantized, or in another way."
    return f"{', or '.join(found)}." if found else "devices with more memory, fewer tokens, or a narrower precision."


def _smaller(request: PlanRequest, layout: Layout) -> list[str]:
    """What of the request could be smaller, that it fits: the batch, or the pool that vLLM is told to reserve."""
    if request.engine != "vllm":
        batch = _largest_batch(request, layout)
        return [f"measure.batch_size={batch}"] if batch else []
    if request.kv_cache_memory_bytes is None:
        return []
    missing = max(_missing_bytes(request, device) for device in device_plans(request, layout))
    smaller = replace(request, kv_cache_memory_bytes=request.kv_cache_memory_bytes - missing)
    return [f"backend.kv_cache_memory_bytes={smaller.kv_cache_memory_bytes}"] if _fits(smaller, layout) else []


def _possible_devices(request: PlanRequest) -> Iterator[int]:
    """Numbers of devices a node on which the request is possible, smallest first; under fsdp the smallest only."""
    for count in _counts(request):
        if _possible(replace(request, devices=count)):
            yield count


def _counts(request: PlanRequest) -> Iterable[int]:
    """Numbers of devices a node among which are all that `_possible_devices` gives."""
    most = MOST_DEVICES // request.num_nodes
    if request.engine == "fsdp":  # two or more of them need the less each the more there are
        too_few = _last(lambda count: count < 2 or not _possible(replace(request, devices=count)), most - 1)
        return (1, too_few + 1)
    cut = request.shape.num_layers + 3 if request.engine == "transformers" else request.shape.num_attention_heads
    return range(1, min(cut, most) + 1)


def _smallest_devices(request: PlanRequest) -> int | None:
    return None if request.device.capacity_bytes is None else next(_possible_devices(request), None)


def _largest_batch(request: PlanRequest, layout: Layout) -> int | None:
    if request.engine == "vllm":
        pools = [device.kv_cache_reserved_bytes for device in device_plans(request, layout)]
        known = request.device.capacity_bytes is not None or request.kv_cache_memory_bytes is not None
        return _last(lambda batch: cache_bytes(request, batch) <= min(pools), request.sequences) if known else None
    if request.device.capacity_bytes is None or request.engine == "dummy":
        return None
    return _last(lambda batch: _fits(replace(request, batch_size=batch), layout), _LARGEST)


def _longest_context(request: PlanRequest, layout: Layout) -> int | None:
    """Prompt and answer together, the answer as long as asked; never longer than the model's positions."""
    most = request.shape.max_position_embeddings
    if request.device.capacity_bytes is None:
        return most
    new = request.max_new_tokens
    prompt = _last(lambda tokens: _fits(replace(request, prompt_tokens=tokens), layout), (most or _LARGEST) - new)
    return prompt + new if prompt else None


def _last(holds: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` for which `holds`, which is true up to some number and then false; else 0."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
