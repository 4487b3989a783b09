"""FSDP2 as the launcher knows it: options, and the way it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.config.schema import BackendConfig
from shards.engines.fsdp import FsdpPlanner
from shards.plan.request import EnginePlanner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.config.schema import RunConfig


@dataclass
class FsdpConfig(BackendConfig):
    """Fully sharded data parallel; each rank answers prompts of its own."""

    implementation: ClassVar[str] = "launcher.backends.fsdp.backend:FsdpBackend"
    planner_class: ClassVar[type[EnginePlanner] | None] = FsdpPlanner
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers:AutoModelForCausalLM", "lightning:Fabric")
    pip_extra: ClassVar[str | None] = "fsdp"
    data_parallel: ClassVar[bool] = True
    has_slots: ClassVar[bool] = True
    loads_by_name: ClassVar[bool] = True

    name: str = "fsdp"
    reshard_after_forward: bool = True  # False keeps gathered weights: fast, and no memory saved

    def planner(self, config: RunConfig, model_config: Mapping[str, Any], on_cuda: bool) -> EnginePlanner | None:
        return FsdpPlanner(reshard_after_forward=self.reshard_after_forward)
