"""The plan of a request: bytes of each device, reasons for a refusal, and the speed limit, before any process
starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from shards.errors import PlanError
from shards.plan.ceilings import ceilings, roofline, step_bytes
from shards.plan.hints import hint, too_large
from shards.plan.memory import DevicePlan, device_plans, kv_bytes_per_token, load_peaks, make_layout
from shards.plan.refusals import illegal
from shards.plan.request import EnginePlanner, PlanRequest
from shards.plan.roofline import Limit, Roofline
from shards.plan.search import largest_batch, longest_context, smallest_devices

if TYPE_CHECKING:
    from shards.untrusted_files import JsonObject

__all__ = ["DevicePlan", "EnginePlanner", "Plan", "PlanError", "PlanRequest", "make_plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of every device and the speed limit for one request. Bytes are peaks.

    `largest_batch` and `longest_context` fit with everything else unchanged; without a known capacity there is no
    largest batch. `smallest_devices` is the smallest number of devices per node on which this batch fits. `limit` is
    the limit of a decode step halfway through answers of full length, `prefill_limit` that of the prompts of one batch;
    None if no rates are known. `roofline` and the `windows` of the layers determine the limit of any other step.
    `load_host_bytes` are over all ranks of a node, None if not known; `step_bytes` are the weights that a device reads
    for a decode step, and `bandwidth` its rate in bytes/s; `kv_cache_memory_bytes` is the pool that the engine must
    reserve. Module engines keep their cache in `slots` of `slot_tokens` tokens each. `settings` are the engine's
    options that the plan has decided or been given, by name; `advice` suggests an option that would be faster and fits.
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
        """Plain values, as in plan.json."""
        values = asdict(self)
        for fields, device in zip(values["devices"], self.devices, strict=True):
            fields["free_bytes"] = device.free_bytes
        return values | {name: list(values[name]) for name in ("devices", "windows")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`."""
        fields = dict(values)
        fields["devices"] = tuple(
            DevicePlan(**{name: value for name, value in device.items() if name != "free_bytes"})
            for device in values["devices"]
        )
        for name in ("limit", "prefill_limit"):
            fields[name] = values[name] and Limit(**values[name])
        fields["roofline"] = values["roofline"] and Roofline.from_dict(values["roofline"])
        fields["windows"] = tuple(values["windows"])
        return cls(**fields)


def make_plan(request: PlanRequest) -> Plan:
    """The plan for `request`; PlanError, with hints that work, if the engine does not support it or it does not fit."""
    asked, request = request, replace(request, engine=request.engine.settled(request))
    problem = illegal(request) or too_large(request)
    if problem is not None:
        raise PlanError(problem, hint(request))
    layout, ends = make_layout(request), make_layout(request, ends_only=True)
    host, device = load_peaks(request, layout)
    decode, prefill = ceilings(request, layout)
    pool = request.engine.pool(request)
    slots = slot_tokens = None
    if request.engine.has_slots:
        slots, slot_tokens = request.batch_size, request.slot_tokens
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
        largest_batch=largest_batch(request, ends),
        longest_context=longest_context(request, ends),
        smallest_devices=smallest_devices(asked),
        limit=decode,
        prefill_limit=prefill,
        roofline=roofline(request, layout),
        windows=request.shape.windows,
        quantization=request.quantization.name if request.quantization else None,
        offload=request.offload,
        slots=slots,
        slot_tokens=slot_tokens,
        settings=request.engine.settings(),
        advice=request.engine.advice(request),
    )
