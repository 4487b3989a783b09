"""FSDP2: each rank keeps its rows of every parameter, gathers one layer at a time and answers prompts of its own."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import ClassVar

from shards.engines.base import ModulePlanner
from shards.model.quantization import Quantization
from shards.model.shape import ModelShape, Parameter
from shards.plan.cuts import Pieces, row_chunk
from shards.plan.request import PlanRequest, Traffic
from shards.plan.roofline import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class FsdpPlanner(ModulePlanner):
    """`reshard_after_forward`: gathered layers are given back after their use."""

    name: ClassVar[str] = "fsdp"
    plain_only: ClassVar[str] = "FSDP2 cuts plain weights by rows, which packed ones do not have"
    is_monotone: ClassVar[bool] = True

    reshard_after_forward: bool = True

    def is_offered(self, quantization: Quantization | None) -> bool:
        return quantization is None

    def pieces(self, shape: ModelShape, n: int, rank: int, parameter: Parameter) -> Pieces:
        return row_chunk(parameter, n, rank)

    def buffer_bytes(self, request: PlanRequest) -> int:
        """Gathered parameters: the root group for good, beside it two layers (the next is gathered ahead), or the
        root's own copy while it is gathered."""
        n = request.num_devices
        if n == 1:
            return 0
        groups = request.shape.groups()
        sizes = {layer: sum(_gathered_numel(p.shape, n) for p in members) for layer, members in groups.items()}
        root = sizes.pop(None, 0)
        layers = 2 * max(sizes.values(), default=0) if self.reshard_after_forward else sum(sizes.values())
        return request.dtype_bytes * (root + max(root, layers))

    def scheme(self, request: PlanRequest) -> Scheme | None:
        return "gathered" if request.num_devices > 1 else "pipeline"

    def traffic(self, request: PlanRequest) -> Traffic:
        if request.num_devices == 1 or not self.reshard_after_forward:
            return Traffic()
        return Traffic(gathered_bytes=request.shape.layer_parameters * request.dtype_bytes)


def _gathered_numel(shape: tuple[int, ...], n: int) -> int:
    rows = shape[0] if shape else 1
    return ceil(rows / n) * n * prod(shape[1:])
