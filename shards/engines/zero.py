"""DeepSpeed's ZeRO-Inference: each rank has a contiguous range of each parameter's values, gathered for its module."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from shards.engines.base import LOAD_RING_BYTES, ModulePlanner
from shards.model.shape import ModelShape, Parameter
from shards.plan.cuts import Pieces
from shards.plan.layout import Layout, Traffic
from shards.plan.request import Offload, PlanRequest
from shards.plan.roofline import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroPlanner(ModulePlanner):
    """ZeRO stage 3 without an optimizer: every rank answers its own prompts, and nothing stays gathered."""

    name: ClassVar[str] = "deepspeed"
    mixes_precision: ClassVar[bool] = False
    plain_only: ClassVar[str] = "ZeRO cuts plain weights only"
    is_monotone: ClassVar[bool] = True
    offloads: ClassVar[tuple[Offload, ...]] = ("cpu",)

    def is_whole(self, request: PlanRequest) -> bool:
        """True if the plain model runs on a single device, without ZeRO."""
        return request.num_devices == 1 and not request.offload

    def pieces(self, shape: ModelShape, n: int, rank: int, parameter: Parameter) -> Pieces:
        """Contiguous ranges of values, regardless of rows, padded to the same number on all ranks."""
        return ((ceil(parameter.numel / n),),)

    def buffer_bytes(self, request: PlanRequest) -> int:
        """Gathered parameters: the largest module outside the layers, and a layer twice: while one is computed the next
        is gathered, and copied out of its buffer."""
        if self.is_whole(request):
            return 0
        outside = (p for p in request.shape.parameters if p.layer is None)
        largest = max(map(request.storage.nbytes, outside), default=0)
        return largest + 2 * largest_layer(request.shape) * request.dtype_bytes

    def sent_bytes(self, request: PlanRequest, layout: Layout) -> int:
        """A tied table is sent twice: for the embedding and for the head."""
        if not request.offload:
            return 0
        return max(layout.offloaded_bytes) + self._second_table(request) // request.num_devices

    def streamed_bytes(self, request: PlanRequest) -> int:
        """This rank's part of the largest parameter, on its way into the gather."""
        return max(map(request.storage.nbytes, request.shape.parameters)) // request.num_devices

    def load_host_bytes(self, request: PlanRequest) -> int:
        """The buffers, and the values of a parameter that are read before ZeRO partitions it."""
        processes = min(request.devices, request.num_devices)
        return processes * (LOAD_RING_BYTES + self.streamed_bytes(request))

    def _second_table(self, request: PlanRequest) -> int:
        """Bytes of a table that is gathered a second time in each pass."""
        tables = (p for p in request.shape.parameters if p.cut == "embedding")
        return sum(map(request.storage.nbytes, tables)) if request.shape.tied else 0

    def scheme(self, request: PlanRequest) -> Scheme | None:
        return "gathered" if request.num_devices > 1 else "pipeline"

    def traffic(self, request: PlanRequest) -> Traffic:
        if request.num_devices == 1:
            return Traffic()
        whole = sum(map(request.storage.nbytes, request.shape.parameters))
        return Traffic(gathered_bytes=whole + self._second_table(request), gathered_over=request.num_devices)


def largest_layer(shape: ModelShape) -> int:
    """Values of the largest decoder layer."""
    groups = shape.groups()
    return max((sum(p.numel for p in members) for layer, members in groups.items() if layer is not None), default=0)
