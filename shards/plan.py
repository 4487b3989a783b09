"""Who holds what, before a process starts: bytes of each device, what fits, what is not possible, how fast at best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from shards.cuts import padded_vocabulary
from shards.errors import PlanError
from shards.hardware import GIB
from shards.limits import Limit, Machine, Scheme, Work, decode_step, prefill
from shards.memory import DevicePlan, Layout, PlanRequest, device_plans, kv_bytes_per_token, load_peaks, make_layout

__all__ = ["DevicePlan", "Plan", "PlanError", "PlanRequest", "make_plan"]

_LARGEST = 2**20
_CANDIDATES = (*range(1, 17), 24, 32, 48, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Plan:
    """What every device will hold and the ceiling of speed, for one request. Bytes are at their peak.

    `largest_batch` and `longest_context` fit where the rest stays as asked; with no known capacity there is no largest
    batch. `smallest_devices` is the least number of devices a node on which this batch fits. `limit` is of a decode
    step halfway through the answer, `prefill_limit` of the prompts of one batch; None where no rates are known.
    """

    engine: str
    world_size: int
    device_name: str
    num_parameters: int
    kv_bytes_per_token: int
    step_bytes: int
    devices: tuple[DevicePlan, ...]
    load_host_bytes: int
    load_device_bytes: int
    largest_batch: int | None
    longest_context: int | None
    smallest_devices: int | None
    limit: Limit | None
    prefill_limit: Limit | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as plan.json keeps them."""
        found = asdict(self)
        for values, device in zip(found["devices"], self.devices, strict=True):
            values["free_bytes"] = device.free_bytes
        found["devices"] = list(found["devices"])
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
        return cls(**fields)


def make_plan(request: PlanRequest) -> Plan:
    """The plan for `request`; PlanError for what the engine cannot do or what does not fit, with hints that hold."""
    problem = _illegal(request) or _too_large(request)
    if problem is not None:
        raise PlanError(problem, _hint(request))
    layout = make_layout(request)
    host, device = load_peaks(request, layout)
    work, machine, scheme = _work(request), _machine(request), _scheme(request)
    half = request.prompt_tokens + request.max_new_tokens // 2
    return Plan(
        engine=request.engine,
        world_size=1 if request.engine == "transformers" else request.num_devices,
        device_name=request.device.name,
        num_parameters=request.shape.num_parameters,
        kv_bytes_per_token=kv_bytes_per_token(request),
        step_bytes=_step_bytes(request, layout),
        devices=device_plans(request, layout),
        load_host_bytes=host,
        load_device_bytes=device,
        largest_batch=_largest_batch(request, layout),
        longest_context=_longest_context(request, layout),
        smallest_devices=_smallest_devices(request),
        limit=decode_step(work, machine, scheme, batch=request.batch_size, context=half),
        prefill_limit=prefill(work, machine, scheme, batch=request.batch_size, tokens=request.prompt_tokens),
    )


def _illegal(request: PlanRequest) -> str | None:
    """Why the engine cannot cut the model so, None if it can."""
    shape, n, engine = request.shape, request.tensor_parallel_size, request.engine
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    if engine == "transformers" and request.num_nodes > 1:
        return f"The transformers engine is one process and cannot reach over {request.num_nodes} nodes."
    if heads % n:
        return f"{heads} attention heads cannot be divided by {n} devices, as tensor parallelism with {engine} needs."
    if kv_heads % n and (engine == "deepspeed" or n % kv_heads):
        return f"{kv_heads} key and value heads cannot be divided by {n} devices, as {engine} needs."
    padded = padded_vocabulary(shape.vocab_size)
    for what, size in (("inner MLP columns", shape.intermediate_size), ("rows of the padded vocabulary", padded)):
        if engine == "vllm" and size % n:
            return f"{size} {what} cannot be divided by {n} devices, as vllm needs."
    return None


def _too_large(request: PlanRequest) -> str | None:
    """Why it does not fit a device, None if it does or if no capacity is known."""
    for device in device_plans(request, make_layout(request)):
        missing = _missing_bytes(request, device)
        if missing > 0 and device.capacity_bytes is not None:
            where = f"on each of {request.num_devices} devices" if request.num_devices > 1 else "on 1 device"
            usable = device.capacity_bytes * (request.gpu_memory_utilization if request.engine == "vllm" else 1)
            share = f" of which {request.engine} may use {usable / GIB:.1f}" if request.engine == "vllm" else ""
            return (
                f"{request.shape.num_parameters / 1e9:.1f} billion parameters with {request.engine} need "
                f"{(usable + missing) / GIB:.1f} GiB {where} (weights {device.parameter_bytes / GIB:.1f}), "
                f"{request.device.name} has {device.capacity_bytes / GIB:.1f} GiB{share}."
            )
    return None


def _missing_bytes(request: PlanRequest, device: DevicePlan) -> int:
    """Bytes that the device lacks. vLLM queues what its pool cannot hold, and needs room for one sequence only."""
    if device.capacity_bytes is None:
        return 0
    if request.engine != "vllm":
        return device.used_bytes - device.capacity_bytes
    others = device.used_bytes - device.kv_cache_reserved_bytes
    sequence = max(kv_bytes_per_token(request) * request.context, request.kv_cache_memory_bytes or 0)
    usable = 1.0 if request.kv_cache_memory_bytes else request.gpu_memory_utilization
    return others + sequence - int(usable * device.capacity_bytes)


def _fits(request: PlanRequest, layout: Layout | None = None) -> bool:
    devices = device_plans(request, layout or make_layout(request))
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
    if _illegal(request) is None and (batch := _largest_batch(request, make_layout(request))):
        found.append(f"measure.batch_size={batch}")
    for engine in ("fsdp", "vllm"):
        if engine != request.engine and _possible(replace(request, engine=engine)):
            found.append(f"backend={engine}")
    return f"{', or '.join(found)}." if found else "devices with more memory, fewer tokens, or a narrower precision."


def _possible_devices(request: PlanRequest) -> Iterator[int]:
    """Numbers of devices a node on which the request is possible, smallest first."""
    for count in _CANDIDATES:
        if _possible(replace(request, devices=count)):
            yield count


def _smallest_devices(request: PlanRequest) -> int | None:
    return None if request.device.capacity_bytes is None else next(_possible_devices(request), None)


def _largest_batch(request: PlanRequest, layout: Layout) -> int | None:
    if request.engine == "vllm":
        sequence = kv_bytes_per_token(request) * request.context
        pools = [device.kv_cache_reserved_bytes for device in device_plans(request, layout)]
        known = request.device.capacity_bytes is not None or request.kv_cache_memory_bytes is not None
        return min(request.max_num_seqs, min(pools) // sequence) if known else None
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


def _step_bytes(request: PlanRequest, layout: Layout) -> int:
    """Weights that a device reads for a decode step (for a pipeline: that all of them read, one after the other)."""
    shape, n = request.shape, request.tensor_parallel_size
    table = sum(p.numel for p in shape.parameters if p.cut == "embedding") * request.dtype_bytes
    if request.engine == "dummy":
        return 0
    if n == 1:
        return shape.step_parameters * request.dtype_bytes
    if request.engine == "deepspeed":
        return layout.parameter_bytes[0] - table
    return layout.parameter_bytes[0] - (0 if shape.tied else table // n)


def _work(request: PlanRequest) -> Work:
    shape, n = request.shape, request.tensor_parallel_size
    gathers = request.engine == "fsdp" and request.num_devices > 1 and request.reshard_after_forward
    reduces = 1 if request.engine == "vllm" and shape.parallel_attention else 2
    return Work(
        step_bytes=n * _step_bytes(request, make_layout(request)),
        step_parameters=shape.step_parameters,
        layer_parameters=shape.layer_parameters,
        kv_bytes_per_token=n * kv_bytes_per_token(request),
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        dtype_bytes=request.dtype_bytes,
        gathered_bytes=shape.layer_parameters * request.dtype_bytes if gathers else 0,
        all_reduces_per_layer=reduces if n > 1 else 0,
    )


def _scheme(request: PlanRequest) -> Scheme:
    if request.engine == "fsdp" and request.num_devices > 1:
        return "fsdp"
    return "tensor_parallel" if request.tensor_parallel_size > 1 else "pipeline"


def _machine(request: PlanRequest) -> Machine:
    together = 1 if _scheme(request) == "pipeline" else request.num_devices
    return Machine(request.device, together, request.link)
