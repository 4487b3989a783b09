"""The options of the project's own tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from launcher.backends.collectives import slow_collectives
from launcher.config.parts.formats import OWN_QUANTIZATIONS, READS
from launcher.config.schema import BackendConfig
from shards.engines.tensor_parallel import TensorParallelPlanner
from shards.model.quantization import Quantization, as_kept
from shards.plan.request import EnginePlanner

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig


@dataclass
class TensorParallelConfig(BackendConfig):
    """Every layer cut over the ranks, which answer each prompt together."""

    implementation: ClassVar[str] = "launcher.backends.tensor_parallel.backend:TensorParallelBackend"
    planner_class: ClassVar[type[EnginePlanner] | None] = TensorParallelPlanner
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers:AutoModelForCausalLM")
    pip_extra: ClassVar[str | None] = "tensor_parallel"
    has_slots: ClassVar[bool] = True
    can_score: ClassVar[bool] = True
    speculates: ClassVar[bool] = True
    can_trace: ClassVar[bool] = True
    loads_by_name: ClassVar[bool] = True
    merges_adapters: ClassVar[bool] = True
    takes_adapters: ClassVar[bool] = True
    quantizations: ClassVar[tuple[str, ...]] = OWN_QUANTIZATIONS
    stored_weights: ClassVar[str] = READS

    name: str = "tensor_parallel"

    @classmethod
    def kept(cls, stored: Quantization) -> Quantization | None:
        return as_kept(stored)

    def notes(self, config: RunConfig, on_cuda: bool) -> list[str]:
        return slow_collectives(config, on_cuda, "add up")
