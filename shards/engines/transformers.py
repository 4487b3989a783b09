"""Plain transformers: one process with the whole model, whose layers accelerate spreads over the GPUs of a node."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from shards.engines.base import ModulePlanner
from shards.model.quantization import Quantization
from shards.plan.cuts import spread
from shards.plan.layout import Layout
from shards.plan.request import Offload, PlanRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersPlanner(ModulePlanner):
    """A pipeline of whole layers in one process; on a CPU one device."""

    name: ClassVar[str] = "transformers"
    plain_only: ClassVar[str] = "a transformers model is planned with the quantizations of its layers only"
    one_process: ClassVar[bool] = True
    offloads: ClassVar[tuple[Offload, ...]] = ("disk", "cpu")

    def runs(self, quantization: Quantization) -> bool:
        return not quantization.fused

    def refusal(self, request: PlanRequest) -> str | None:
        if request.num_nodes > 1:
            return f"The transformers engine is one process and cannot reach over {request.num_nodes} nodes."
        if request.offload and request.num_devices > 1:
            return f"An offloaded model runs on one device, not on {request.num_devices}."
        return self.split_group(request)

    def streamed_bytes(self, request: PlanRequest) -> int:
        """The parameters of one module: accelerate copies those of each for its forward."""
        modules: dict[str, int] = {}
        for parameter in request.shape.parameters:
            module = parameter.name.rpartition(".")[0]
            modules[module] = modules.get(module, 0) + request.storage.nbytes(parameter)
        return max(modules.values(), default=0)

    def num_devices(self, request: PlanRequest) -> int:
        if request.device.kind == "cpu":
            return 1
        return request.devices * request.num_nodes

    def most_devices(self, request: PlanRequest) -> int:
        return request.shape.num_layers + 3

    def layout(self, request: PlanRequest, ends_only: bool) -> Layout:
        parameters, counts = spread(request.shape, request.num_devices, request.storage)
        ends = tuple(accumulate(counts))
        return Layout(parameters, tuple(zip((0, *ends), ends, strict=False)), self.buffer_bytes(request))
