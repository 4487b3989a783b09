"""The options of FSDP2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from launcher.backends.collectives import slow_collectives
from launcher.config.options import choice
from launcher.config.parts.formats import READS
from launcher.config.parts.storage import Offload
from launcher.config.schema import BackendConfig, ConfigError
from shards.engines.fsdp import FsdpPlanner
from shards.machine.main_memory import available_bytes
from shards.model.quantization import Quantization, as_kept
from shards.plan.request import EnginePlanner

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from shards.model.config_fields import TransformersConfig


@dataclass
class FsdpConfig(BackendConfig):
    """Fully sharded data parallel; each rank answers its own prompts."""

    implementation: ClassVar[str] = "launcher.backends.fsdp.backend:FsdpBackend"
    planner_class: ClassVar[type[EnginePlanner] | None] = FsdpPlanner
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers:AutoModelForCausalLM", "lightning:Fabric")
    pip_extra: ClassVar[str | None] = "fsdp"
    data_parallel: ClassVar[bool] = True
    has_slots: ClassVar[bool] = True
    can_score: ClassVar[bool] = True
    speculates: ClassVar[bool] = True
    can_trace: ClassVar[bool] = True
    loads_by_name: ClassVar[bool] = True
    merges_adapters: ClassVar[bool] = True
    takes_adapters: ClassVar[bool] = True
    quantizations: ClassVar[tuple[str, ...]] = ("int8_wo", "int8_dyn", "int8", "nf4", "fp4")
    stored_weights: ClassVar[str] = f"{READS}, and no scales of scales"

    name: str = "fsdp"
    resident_layers: str = "0"  # layers that stay whole on each device: a number, or auto for as many as fit
    shard_over: str = choice("world", "node", "auto")  # ranks that share the parameters; node: each node has all

    @classmethod
    def kept(cls, stored: Quantization) -> Quantization | None:
        return as_kept(stored, by_rows=True)

    def planner(self, config: RunConfig, model_config: TransformersConfig, on_cuda: bool) -> EnginePlanner | None:
        if self.resident_layers != "auto" and not self.resident_layers.isdecimal():
            raise ConfigError(
                f"backend.resident_layers={self.resident_layers} is neither a number of layers nor auto.",
                "backend.resident_layers=auto",
            )
        if config.offload is not Offload.none and self.resident_layers != "0":
            offload = config.offload.name
            fact = f"backend.resident_layers={self.resident_layers}, and offload={offload} keeps no layer whole."
            raise ConfigError(fact, "backend.resident_layers=0")
        resident_layers = host_bytes = None
        if self.resident_layers != "auto":
            resident_layers = int(self.resident_layers)
        if not on_cuda and config.launch.name != "slurm":
            host_bytes = available_bytes() // config.devices
        within_node = {"world": False, "node": True, "auto": None}[self.shard_over]
        in_place = not on_cuda and not slow_collectives(config, on_cuda, "gather")
        return FsdpPlanner(
            resident_layers=resident_layers, within_node=within_node, host_bytes=host_bytes, in_place=in_place
        )

    def notes(self, config: RunConfig, on_cuda: bool) -> list[str]:
        return slow_collectives(config, on_cuda, "gather")
