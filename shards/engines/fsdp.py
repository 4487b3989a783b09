"""FSDP2: each rank keeps its rows of every parameter, gathers one layer at a time and answers its own prompts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, ClassVar

from shards.engines.base import ModulePlanner, narrowed_bytes, widened_bytes
from shards.model.quantization import Quantization, Storage
from shards.model.shape import ModelShape, Parameter
from shards.plan.cuts import Pieces, cut_up, row_chunk, spread_evenly, whole_bytes
from shards.plan.layout import Layout, Traffic
from shards.plan.memory import fits, largest
from shards.plan.request import EnginePlanner, Offload, PlanRequest
from shards.plan.roofline import Scheme

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class FsdpPlanner(ModulePlanner):
    """`resident_layers` stay whole on each device, together with everything outside the layers; None: as many as fit.

    `within_node`: parameters are sharded over the devices of a node, and each node has all of them (HSDP); None: if
    that fits. `host_bytes` is the share of the host's memory for a device without its own. `in_place`: the devices of a
    node gather into shared memory.
    """

    name: ClassVar[str] = "fsdp"
    plain_only: ClassVar[str] = "FSDP2 cuts by rows, and their scales have to go with them"
    is_monotone: ClassVar[bool] = True
    offloads: ClassVar[tuple[Offload, ...]] = ("cpu",)

    resident_layers: int | None = 0
    within_node: bool | None = False
    host_bytes: int | None = None
    in_place: bool = False

    def runs(self, quantization: Quantization) -> bool:
        return quantization.has_rows

    def is_offered(self, quantization: Quantization | None) -> bool:
        return quantization is None or self.runs(quantization)

    def settled(self, request: PlanRequest) -> FsdpPlanner:
        """First make the nodes independent of each other, then keep layers whole as long as everything fits."""
        if request.device.kind == "cpu":
            host_bytes = self.host_bytes and self.host_bytes * request.devices
            request = replace(request, device=replace(request.device, capacity_bytes=host_bytes))
        if request.capacity_bytes is None or self.refusal(request):
            return self
        planner = replace(self, resident_layers=self.resident_layers or 0, within_node=bool(self.within_node))
        if self.within_node is None and request.num_nodes > 1:
            apart = replace(planner, within_node=True)
            if fits(replace(request, engine=apart)):
                planner = apart
        if self.resident_layers is not None:
            return planner

        def has_room(count: int) -> bool:
            return fits(replace(request, engine=replace(planner, resident_layers=count)))

        layers = request.shape.num_layers
        if has_room(layers):  # without sharded layers no buffers are needed: less than for all but one
            return replace(planner, resident_layers=layers)
        return replace(planner, resident_layers=largest(has_room, layers - 1))

    def settings(self) -> dict[str, int]:
        return {"resident_layers": self.resident_layers or 0, "within_node": int(self.within_node or False)}

    def advice(self, request: PlanRequest) -> str | None:
        """The number of layers that could stay whole, if it was not configured."""
        if self.resident_layers != 0 or self.shards_over(request) == 1 or request.offload:
            return None
        most = replace(self, resident_layers=None).settled(request).resident_layers
        if not most:
            return None
        return f"backend.resident_layers=auto: {most} of {request.shape.num_layers} layers fit whole on each device"

    def refusal(self, request: PlanRequest) -> str | None:
        layers = request.shape.num_layers
        if request.offload and self.shards_over(request) == 1:
            return "fsdp on one device has no shards that it could offload."
        if (self.resident_layers or 0) > layers:
            return f"The model has {layers} layers, of which not {self.resident_layers} can stay whole."
        known = request.capacity_bytes or self.host_bytes
        if known is None and (self.resident_layers is None or self.within_node is None):
            return "What fits a device cannot be known here, where the memory of the devices is not known."
        quantization = request.quantization
        if quantization is not None and quantization.flat and self.shards_over(request) > 1:
            for parameter in request.shape.parameters:
                inputs = parameter.shape[-1]
                if quantization.applies(parameter) and inputs % quantization.flat:  # a scale would span two rows
                    size = quantization.flat
                    return f"{inputs} inputs cannot be divided by the {size} that {quantization.name} scales."
        return self.split_group(request)

    def shards_over(self, request: PlanRequest) -> int:
        """The number of devices over which each parameter is sharded."""
        if self.within_node:
            return request.devices
        return request.num_devices

    def ranks_of_matrix(self, request: PlanRequest) -> int:
        return self.shards_over(request)

    def pieces(self, shape: ModelShape, n: int, rank: int, parameter: Parameter) -> Pieces:
        return row_chunk(parameter, n, rank)

    def layout(self, request: PlanRequest, ends_only: bool) -> Layout:
        n, shape = self.shards_over(request), request.shape
        sharded = self._sharded(shape)
        kept = whole_bytes(shape, request.storage) - whole_bytes(sharded, request.storage)
        ranks: Iterable[int] = range(n)
        if ends_only:
            ranks = {0, n - 1}
        parts = [kept + size for size in cut_up(sharded, self.pieces, n, request.storage, ranks)]
        if not ends_only:
            parts *= request.num_devices // n
        return Layout(tuple(parts), ((0, shape.num_layers),) * len(parts), self.buffer_bytes(request))

    def _sharded(self, shape: ModelShape) -> ModelShape:
        """The model without the parts that stay whole on each device."""
        if not self.resident_layers:
            return shape
        return without_resident(shape, self.resident_layers)

    def buffer_bytes(self, request: PlanRequest) -> int:
        """Gathered parameters: two layers (the next one is prefetched, or lies beside the previous one in shared
        memory, or one is held twice during its copy-out), plus the root group permanently if it is sharded, or its copy
        while it is gathered."""
        n = self.shards_over(request)
        beside = narrowed_bytes(request, self.pieces, 1) + widened_bytes(request)
        if n == 1:
            return beside
        root, layer = gathered_bytes(self._sharded(request.shape), n, request.storage, request.mixed_bytes)
        return beside + root + max(root, 2 * layer)

    def sent_bytes(self, request: PlanRequest, layout: Layout) -> int:
        """Offloaded bytes without the root group, which stays once it is gathered."""
        if not request.offload:
            return 0
        layers = [p for p in self._sharded(request.shape).parameters if p.layer is not None]
        return sum(map(request.storage.nbytes, layers)) // self.shards_over(request)

    def streamed_bytes(self, request: PlanRequest) -> int:
        """This rank's part of two layers, on their way into the gather."""
        n = self.shards_over(request)
        groups = self._sharded(request.shape).groups()
        return 2 * max(sum(map(request.storage.nbytes, members)) for members in groups.values()) // n

    def scheme(self, request: PlanRequest) -> Scheme | None:
        if request.num_devices > 1:
            return "gathered"
        return "pipeline"

    def traffic(self, request: PlanRequest) -> Traffic:
        n = self.shards_over(request)
        if n == 1:
            return Traffic()
        layers = [p for p in self._sharded(request.shape).parameters if p.layer is not None]
        stored, narrowed = request.storage, request.mixed_bytes
        nbytes = sum(gathered_storage(stored, narrowed, parameter).nbytes(parameter) for parameter in layers)
        in_place = self.in_place and n == request.devices
        return Traffic(gathered_bytes=nbytes, gathered_over=n, gathered_in_place=in_place)

    def unread_bytes(self, request: PlanRequest, table: int) -> int:
        """Also the bytes saved by gathering matrices in a narrower type than they are stored."""
        unread = EnginePlanner.unread_bytes(self, request, table)
        if self.shards_over(request) == 1:
            return unread
        stored, narrowed = request.storage, request.mixed_bytes
        gathered = [p for p in self._sharded(request.shape).parameters if p.layer is not None]
        return unread + sum(stored.nbytes(p) - gathered_storage(stored, narrowed, p).nbytes(p) for p in gathered)


@lru_cache(maxsize=256)
def without_resident(shape: ModelShape, layers: int) -> ModelShape:
    """The model without `layers` of its layers, and without everything outside the layers."""
    resident = {None, *spread_evenly(layers, shape.num_layers)}
    return replace(shape, parameters=tuple(p for p in shape.parameters if p.layer not in resident))


@lru_cache(maxsize=256)
def gathered_bytes(shape: ModelShape, n: int, storage: Storage, narrowed: int | None) -> tuple[int, int]:
    """Bytes of the root group, and of the largest layer, gathered from `n` ranks with equally many rows each."""
    sizes: Counter[int | None] = Counter()
    for parameter in shape.parameters:
        rows, *columns = parameter.shape or (1,)
        whole = (ceil(rows / n) * n, *columns)
        sizes[parameter.layer] += gathered_storage(storage, narrowed, parameter).nbytes(parameter, whole)
    root = sizes.pop(None, 0)
    return root, max(sizes.values(), default=0)


def gathered_storage(storage: Storage, narrowed: int | None, parameter: Parameter) -> Storage:
    """The storage of a parameter while it is gathered: as it is stored; with mixed precision the matrices of layers in
    the type of the products, which has `narrowed` bytes."""
    if narrowed is not None and parameter.layer is not None and len(parameter.shape) == 2:
        return Storage(narrowed)
    return storage
