"""The reason why a request does not fit its devices, and changes with which it would."""

from __future__ import annotations

from dataclasses import replace

from shards.machine.hardware import GIB, known_device, usual_link
from shards.model.quantization import QUANTIZATIONS
from shards.plan.layout import Layout
from shards.plan.memory import device_plans, fits, make_layout, missing_bytes, usable_bytes
from shards.plan.refusals import illegal, no_offload
from shards.plan.request import MOST_DEVICES, Offload, PlanRequest
from shards.plan.search import is_possible, largest_batch, possible_devices


def too_large(request: PlanRequest) -> str | None:
    """The reason why it does not fit a device, None if it does or if no capacity is known."""
    worst = max(device_plans(request, make_layout(request)), key=lambda device: missing_bytes(request, device))
    if (missing := missing_bytes(request, worst)) <= 0:
        return None
    assert worst.capacity_bytes is not None
    n, usable = request.num_devices, usable_bytes(request, worst.capacity_bytes)
    model = f"{request.shape.num_parameters / 1e9:.1f} billion parameters"
    if request.quantization:
        model += f" in {request.quantization.name}"
    model += f" with {request.engine.name}"
    batch = f"batch {request.batch_size} of {request.context} tokens"
    if request.device.kind == "cpu":
        here = device_plans(request, make_layout(request))[: request.devices]
        needed, weights = sum(device.used_bytes for device in here), sum(device.parameter_bytes for device in here)
        owner = "each machine has"
        if request.num_nodes == 1:
            owner = "the machine has"
        total = f"{(request.device.capacity_bytes or 0) / GIB:.1f}"
        return (
            f"{model} need {needed / GIB:.1f} GiB of main memory (weights {weights / GIB:.1f}, {batch}), "
            f"{owner} {total} GiB."
        )
    device = "one device"
    if n > 1:
        device = f"device {worst.rank} of {n}"
    need = f"{(usable + missing) / GIB:.1f} GiB on {device} (weights {worst.parameter_bytes / GIB:.1f}, {batch})"
    capacity = f"{request.device.name} has {worst.capacity_bytes / GIB:.1f} GiB"
    if usable < worst.capacity_bytes:
        capacity += f", of which {request.engine.name} may use {usable / GIB:.1f}"
    return f"{model} need {need}, {capacity}."


def hint(request: PlanRequest) -> str:
    """Changes, each of which is sufficient; if there is none, a device with more memory."""
    changes = []
    counts = list(possible_devices(request))
    fewer = [count for count in counts if count <= request.devices]
    if counts:
        changes.append(f"devices={max(fewer, default=counts[0])}")
    if illegal(request) is None:
        changes += _smaller(request, make_layout(request, ends_only=True))
    for engine in request.alternatives:
        if engine.name == request.engine.name or not engine.is_offered(request.quantization):
            continue
        other = replace(request, engine=engine)
        if is_possible(other):
            changes.append(f"backend={engine.name}")
        elif not changes and (count := next(possible_devices(other), None)):
            changes.append(f"backend={engine.name} devices={count}")
    if request.dtype_bytes == 4 and is_possible(replace(request, dtype_bytes=2, mixed_bytes=None)):
        changes.append("precision=bf16")
    if request.offload and no_offload(request):
        elsewhere: tuple[Offload | None, ...] = ("disk", "cpu", None)
        others = [other for other in elsewhere if is_possible(replace(request, offload=other))]
        changes += [f"offload={other or 'none'}" for other in others[:1]]
    if not changes and request.quantization and illegal(request):
        changes = _other_weights(request, request.quantization.bits)
    return ", or ".join(changes or [_larger(request)])


def _other_weights(request: PlanRequest, bits: int) -> list[str]:
    """Weights that are possible instead of quantized ones: plain, or the format with the closest number of bits, with
    the same engine or another one."""
    named = sorted(QUANTIZATIONS.values(), key=lambda quantization: abs(quantization.bits - bits))
    for engine in (request.engine, *request.alternatives):
        if engine != request.engine and not engine.is_offered(None):
            continue
        before = ""
        if engine != request.engine:
            before = f"backend={engine.name} with "
        there = replace(request, engine=engine)
        changes = []
        if is_possible(replace(there, quantization=None)):
            changes.append(f"{before}plain weights")
        others = (q.name for q in named if engine.is_offered(q) and is_possible(replace(there, quantization=q)))
        if (name := next(others, None)) is not None:
            changes.append(f"{before}weights in {name}")
        if changes:
            return changes
    return []


def _larger(request: PlanRequest) -> str:
    """The smallest machine of common GPUs that the request fits."""
    for card in ("a6000", "a100_80g", "h200", "b200"):
        narrow = replace(request, dtype_bytes=2, mixed_bytes=None, offload=None)
        there = replace(narrow, device=known_device(card), link=usual_link(card), num_nodes=1)
        for engine in (request.engine, *request.alternatives):
            count = next(possible_devices(replace(there, engine=engine)), MOST_DEVICES)
            if count <= 8:
                changes = [f"machine={count}x{card}", "precision=bf16", "dry_run=true"]
                if engine.name != request.engine.name:
                    changes.append(f"backend={engine.name}")
                return " ".join(changes)
    return "devices with more memory, or fewer tokens"


def _smaller(request: PlanRequest, layout: Layout) -> list[str]:
    """Options that shrink the request until it fits: a smaller batch, or a smaller pool of the engine."""
    if request.engine.pool(request) is None:
        batch = largest_batch(request, layout)
        if batch:
            return [f"measure.batch_size={batch}"]
        return []
    missing = max(missing_bytes(request, device) for device in device_plans(request, layout))
    smaller = request.engine.smaller_pool(missing)
    if smaller is None:
        return []
    engine, option = smaller
    if fits(replace(request, engine=engine), layout):
        return [option]
    return []
