"""An engine without a model: it holds nothing and does no work, on any number of devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shards.model.quantization import Quantization
from shards.plan.layout import Layout
from shards.plan.request import EnginePlanner, PlanRequest
from shards.plan.roofline import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class DummyPlanner(EnginePlanner):
    """Zero bytes everywhere, and no ceiling."""

    name: ClassVar[str] = "dummy"

    def runs(self, quantization: Quantization) -> bool:
        return True

    def is_offered(self, quantization: Quantization | None) -> bool:
        return False

    def refusal(self, request: PlanRequest) -> str | None:
        return None

    def layout(self, request: PlanRequest, ends_only: bool) -> Layout:
        n = request.num_devices
        return Layout((0,) * n, ((0, request.shape.num_layers),) * n)

    def kv_heads(self, request: PlanRequest) -> int:
        return 0

    def activation_bytes(self, request: PlanRequest) -> int:
        return 0

    def overhead_bytes(self, request: PlanRequest) -> int:
        return 0

    def load_host_bytes(self, request: PlanRequest) -> int | None:
        return 0

    def scheme(self, request: PlanRequest) -> Scheme | None:
        return None
