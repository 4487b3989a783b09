"""The plan of a request, before a process starts: bytes of each device, reasons for a refusal, and best speed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from shards.errors import PlanError
from shards.machine.hardware import GIB, known_device, usual_link
from shards.model.quantization import QUANTIZATIONS
from shards.plan.ceilings import ceilings, roofline, step_bytes
from shards.plan.memory import (
    DevicePlan,
    cache_bytes,
    device_plans,
    fits,
    kv_bytes_per_token,
    largest,
    load_peaks,
    make_layout,
    missing_bytes,
    usable_bytes,
)
from shards.plan.refusals import illegal, no_offload
from shards.plan.request import MOST_DEVICES, EnginePlanner, Layout, Offload, PlanRequest
from shards.plan.roofline import Limit, Roofline

if TYPE_CHECKING:
    from shards.untrusted_files import JsonObject

__all__ = ["DevicePlan", "EnginePlanner", "Plan", "PlanError", "PlanRequest", "make_plan"]

_LARGEST = 2**20


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of every device and the ceiling of speed, for one request. Bytes are at their peak.

    `largest_batch` and `longest_context` fit where the rest stays as asked; with no known capacity there is no largest
    batch. `smallest_devices` is the least number of devices a node on which this batch fits. `limit` is of a decode
    step halfway through answers of full length, `prefill_limit` of the prompts of one batch; None where no rates are
    known. `roofline` and the `windows` of the layers are what the limit of any other step follows from.
    `load_host_bytes` are of all ranks of a node, None where not known, `step_bytes` the weights that a device reads for
    a decode step and `bandwidth` the bytes/s at which it can; `kv_cache_memory_bytes` is the pool that the engine is
    told to reserve. `slots` of `slot_tokens` tokens each are what a module engine keeps its cache in. `settings` are
    the options of the engine that the plan has decided or been told, by name; `advice` is a line on what would be
    faster and fits.
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
    offload: str | None = None
    slots: int | None = None
    slot_tokens: int | None = None
    settings: dict[str, int] = field(default_factory=dict)
    advice: str | None = None

    def to_dict(self) -> JsonObject:
        """Plain values, as plan.json keeps them."""
        values = asdict(self)
        for fields, device in zip(values["devices"], self.devices, strict=True):
            fields["free_bytes"] = device.free_bytes
        return values | {name: list(values[name]) for name in ("devices", "windows")}

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
    asked, request = request, replace(request, engine=request.engine.settled(request))
    problem = illegal(request) or _too_large(request)
    if problem is not None:
        raise PlanError(problem, _hint(request))
    layout, ends = make_layout(request), make_layout(request, ends_only=True)
    host, device = load_peaks(request, layout)
    decode, prefill = ceilings(request, layout)
    pool = request.engine.pool(request)
    return Plan(
        engine=request.engine.name,
        num_devices=request.num_devices,
        device_name=request.device.name,
        num_parameters=request.shape.num_parameters,
        kv_bytes_per_token=kv_bytes_per_token(request),
        step_bytes=step_bytes(request, layout),
        bandwidth=request.device.bandwidth,
        kv_cache_memory_bytes=pool.nbytes if pool else None,
        devices=device_plans(request, layout),
        load_host_bytes=host,
        load_device_bytes=device,
        largest_batch=_largest_batch(request, ends),
        longest_context=_longest_context(request, ends),
        smallest_devices=_smallest_devices(asked),
        limit=decode,
        prefill_limit=prefill,
        roofline=roofline(request, layout),
        windows=request.shape.windows,
        quantization=request.quantization.name if request.quantization else None,
        offload=request.offload,
        slots=request.batch_size if request.engine.has_slots else None,
        slot_tokens=request.slot_tokens if request.engine.has_slots else None,
        settings=request.engine.settings(),
        advice=request.engine.advice(request),
    )


def _too_large(request: PlanRequest) -> str | None:
    """The reason why it does not fit a device, None if it does or if no capacity is known."""
    worst = max(device_plans(request, make_layout(request)), key=lambda device: missing_bytes(request, device))
    if (missing := missing_bytes(request, worst)) <= 0:
        return None
    assert worst.capacity_bytes is not None
    n, usable = request.num_devices, usable_bytes(request, worst.capacity_bytes)
    kind = f" in {request.quantization.name}" if request.quantization else ""
    model = f"{request.shape.num_parameters / 1e9:.1f} billion parameters{kind} with {request.engine.name}"
    batch = f"batch {request.batch_size} of {request.context} tokens"
    if request.device.kind == "cpu":
        here = device_plans(request, make_layout(request))[: request.devices]
        needed, weights = sum(device.used_bytes for device in here), sum(device.parameter_bytes for device in here)
        owner = "the machine has" if request.num_nodes == 1 else "each machine has"
        total = f"{(request.device.capacity_bytes or 0) / GIB:.1f}"
        return (
            f"{model} need {needed / GIB:.1f} GiB of main memory (weights {weights / GIB:.1f}, {batch}), "
            f"{owner} {total} GiB."
        )
    part = f"{(usable + missing) / GIB:.1f} GiB on " + (f"device {worst.rank} of {n}" if n > 1 else "one device")
    may = f", of which {request.engine.name} may use {usable / GIB:.1f}" if usable < worst.capacity_bytes else ""
    return (
        f"{model} need {part} (weights {worst.parameter_bytes / GIB:.1f}, {batch}), "
        f"{request.device.name} has {worst.capacity_bytes / GIB:.1f} GiB{may}."
    )


def _possible(request: PlanRequest) -> bool:
    return illegal(request) is None and fits(request)


def _hint(request: PlanRequest) -> str:
    """Changes, each of which is possible as it stands; else a device with more memory."""
    changes = []
    counts = list(_possible_devices(request))
    fewer = [count for count in counts if count <= request.devices]
    if counts:
        changes.append(f"devices={fewer[-1] if fewer else counts[0]}")
    if illegal(request) is None:
        changes += _smaller(request, make_layout(request, ends_only=True))
    for engine in request.alternatives:
        if engine.name == request.engine.name or not engine.is_offered(request.quantization):
            continue
        other = replace(request, engine=engine)
        if _possible(other):
            changes.append(f"backend={engine.name}")
        elif not changes and (count := next(_possible_devices(other), None)):
            changes.append(f"backend={engine.name} devices={count}")
    if request.dtype_bytes == 4 and _possible(replace(request, dtype_bytes=2, mixed_bytes=None)):
        changes.append("precision=bf16")
    if request.offload and no_offload(request):
        elsewhere: tuple[Offload | None, ...] = ("disk", "cpu", None)
        others = [other for other in elsewhere if _possible(replace(request, offload=other))]
        changes += [f"offload={other or 'none'}" for other in others[:1]]
    if not changes and request.quantization and illegal(request):
        changes = _other_weights(request, request.quantization.bits)
    return ", or ".join(changes or [_larger(request)])


def _other_weights(request: PlanRequest, bits: int) -> list[str]:
    """Weights that are possible in place of quantized ones: plain, or in the way of the nearest number of bits, with
    the engine itself or with another one."""
    named = sorted(QUANTIZATIONS.values(), key=lambda quantization: abs(quantization.bits - bits))
    for engine in (request.engine, *request.alternatives):
        if engine != request.engine and not engine.is_offered(None):
            continue
        before = "" if engine == request.engine else f"backend={engine.name} with "
        there = replace(request, engine=engine)
        changes = [f"{before}plain weights"] if _possible(replace(there, quantization=None)) else []
        others = (q.name for q in named if engine.is_offered(q) and _possible(replace(there, quantization=q)))
        if (name := next(others, None)) is not None:
            changes.append(f"{before}weights in {name}")
        if changes:
            return changes
    return []


def _larger(request: PlanRequest) -> str:
    """The smallest machine of common cards that the request fits."""
    for card in ("a6000", "a100_80g", "h200", "b200"):
        narrow = replace(request, dtype_bytes=2, mixed_bytes=None, offload=None)
        there = replace(narrow, device=known_device(card), link=usual_link(card), num_nodes=1)
        for engine in (request.engine, *request.alternatives):
            count = next(_possible_devices(replace(there, engine=engine)), MOST_DEVICES)
            if count <= 8:
                changed = [] if engine.name == request.engine.name else [f"backend={engine.name}"]
                return " ".join([f"machine={count}x{card}", "precision=bf16", "dry_run=true", *changed])
    return "devices with more memory, or fewer tokens"


def _smaller(request: PlanRequest, layout: Layout) -> list[str]:
    """Options that make the request so small that it fits: a batch, or the pool that the engine is told to reserve."""
    if request.engine.pool(request) is None:
        batch = _largest_batch(request, layout)
        return [f"measure.batch_size={batch}"] if batch else []
    missing = max(missing_bytes(request, device) for device in device_plans(request, layout))
    smaller = request.engine.smaller_pool(missing)
    if smaller is None:
        return []
    engine, option = smaller
    return [option] if fits(replace(request, engine=engine), layout) else []


def _possible_devices(request: PlanRequest) -> Iterator[int]:
    """Numbers of devices a node on which the request is possible, smallest first; of a monotone engine no more than
    one device and the smallest number of several."""
    for count in _counts(request):
        if _possible(replace(request, devices=count)):
            yield count


def _counts(request: PlanRequest) -> Iterable[int]:
    """Numbers of devices a node among which are all that `_possible_devices` gives."""
    most = MOST_DEVICES // request.num_nodes
    if request.engine.is_monotone:
        too_few = largest(lambda count: count < 2 or not _possible(replace(request, devices=count)), most - 1)
        return (1, too_few + 1)
    return range(1, min(request.engine.most_devices(request), most) + 1)


def _smallest_devices(request: PlanRequest) -> int | None:
    return None if request.capacity_bytes is None else next(_possible_devices(request), None)


def _largest_batch(request: PlanRequest, layout: Layout) -> int | None:
    """The largest batch that fits: into the pool where there is one; None where nothing known bounds it."""
    pool, capacity = request.engine.pool(request), request.capacity_bytes
    if pool is not None:
        if capacity is None and pool.nbytes is None:
            return None
        reserved = min(device.kv_cache_reserved_bytes for device in device_plans(request, layout))
        return largest(lambda batch: cache_bytes(request, batch) <= reserved, pool.sequences)
    if capacity is None or request.engine.scheme(request) is None:
        return None
    return largest(lambda batch: fits(replace(request, batch_size=batch), layout), _LARGEST)


def _longest_context(request: PlanRequest, layout: Layout) -> int | None:
    """Prompt and answer together, the answer as long as asked; never longer than the model's positions."""
    most = request.shape.max_position_embeddings
    if request.capacity_bytes is None:
        return most
    new = request.max_new_tokens
    prompt = largest(lambda tokens: fits(replace(request, prompt_tokens=tokens), layout), (most or _LARGEST) - new)
    return prompt + new if prompt else None
