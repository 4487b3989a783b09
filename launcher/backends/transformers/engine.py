"""The options of plain transformers, which always runs in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.config.options import choice
from launcher.config.parts.formats import OWN_QUANTIZATIONS, READS, Weights
from launcher.config.parts.storage import Offload
from launcher.config.schema import BackendConfig, ConfigError
from shards.engines.transformers import TransformersPlanner
from shards.model.quantization import Quantization, as_kept
from shards.plan.request import EnginePlanner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.config.schema import RunConfig


@dataclass
class TransformersConfig(BackendConfig):
    """The engine that others are compared with; on several GPUs accelerate spreads the layers."""

    implementation: ClassVar[str] = "launcher.backends.transformers.backend:TransformersBackend"
    planner_class: ClassVar[type[EnginePlanner] | None] = TransformersPlanner
    packages: ClassVar[tuple[str, ...]] = (
        "torch",
        "transformers:AutoModelForCausalLM",
        "accelerate:init_empty_weights",
    )
    pip_extra: ClassVar[str | None] = "transformers"
    one_process_per_device: ClassVar[bool] = False
    joins_ranks: ClassVar[bool] = False
    has_slots: ClassVar[bool] = True
    can_score: ClassVar[bool] = True
    speculates: ClassVar[bool] = True
    can_trace: ClassVar[bool] = True
    loads_by_name: ClassVar[bool] = True
    merges_adapters: ClassVar[bool] = True
    takes_adapters: ClassVar[bool] = True
    is_reference: ClassVar[bool] = True
    quantizations: ClassVar[tuple[str, ...]] = OWN_QUANTIZATIONS

    stored_weights: ClassVar[str] = READS

    name: str = "transformers"
    device_map: str = choice("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's, over several GPUs

    @classmethod
    def kept(cls, stored: Quantization) -> Quantization | None:
        return as_kept(stored)

    def settle(self, config: RunConfig, on_cuda: bool) -> tuple[RunConfig, list[str]]:
        """Use one node, and without GPUs one device, so that every sweep can include the reference."""
        notes: list[str] = []
        if config.num_nodes > 1:
            notes.append(f"num_nodes={config.num_nodes}, but plain transformers is one process on one node")
            config = replace(config, num_nodes=1)
        if not on_cuda and config.devices > 1:
            notes.append(f"devices={config.devices}, but without GPUs plain transformers uses one device, the CPU")
            config = replace(config, devices=1)
        if config.offload is not Offload.none and config.devices > 1:
            notes.append(f"devices={config.devices}, but an offloaded model runs on one device")
            config = replace(config, devices=1)
        return config, notes

    def refuse(self, config: RunConfig, model_config: Mapping[str, Any], on_cuda: bool, longest: int) -> None:
        """Refuse to offload random weights to disk: there is no file that holds them."""
        if config.offload is Offload.disk and config.model.weights is Weights.random:
            raise ConfigError("offload=disk needs weights in files, and model.weights=random has none.", "offload=none")
