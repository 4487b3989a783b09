"""The options of LitGPT, which answers one prompt after the other, in a separate environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from launcher.backends.litgpt.shapes import ELSEWHERE, check_adapter, litgpt_config
from launcher.config.options import choice
from launcher.config.parts.formats import Weights
from launcher.config.schema import BackendConfig, ConfigError
from shards.engines.litgpt import LitgptPlanner
from shards.plan.request import EnginePlanner

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig
    from shards.model.config_fields import TransformersConfig

INSTALL = (
    "python -m venv litgpt-env && litgpt-env/bin/pip install torch==2.13.0 litgpt==0.5.13 bitsandbytes msgspec "
    "nvidia-ml-py"
)
"""A separate environment: LitGPT requires huggingface_hub below 1.4, which is too old for transformers."""

SEQUENTIAL, TENSOR_PARALLEL = "sequential", "tensor_parallel"


@dataclass
class LitgptConfig(BackendConfig):
    """LitGPT, which many published articles use: its own modules and generation loop, on a checkpoint that it
    converts."""

    implementation: ClassVar[str] = "launcher.backends.litgpt.backend:LitgptBackend"
    packages: ClassVar[tuple[str, ...]] = ("torch", "litgpt:GPT", "lightning:Fabric")
    continuous_batching: ClassVar[bool] = True
    merges_adapters: ClassVar[bool] = True

    name: str = "litgpt"
    generate: str = choice(SEQUENTIAL, TENSOR_PARALLEL)  # layers on one GPU after the other, or each cut
    quantize: str = choice("none", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq")  # CUDA only

    @property
    def one_process_per_device(self) -> bool:  # type: ignore[override]
        """True if layers are cut (tensor parallel): one rank for each device."""
        return self.generate == TENSOR_PARALLEL

    @property
    def joins_ranks(self) -> bool:  # type: ignore[override]
        """True if layers are cut: only then are there several ranks."""
        return self.generate == TENSOR_PARALLEL

    @classmethod
    def install_hint(cls, missing: Sequence[str] = ()) -> str:
        return f"{INSTALL}, and backend.python=litgpt-env/bin/python"

    def most_at_once(self, config: RunConfig) -> int | None:
        return 1

    def planner(self, config: RunConfig, model_config: TransformersConfig, on_cuda: bool) -> EnginePlanner | None:
        """The planner; None for quantized weights, which Fabric packs in its own way."""
        if self.quantize != "none":
            return None
        return LitgptPlanner(cuts_layers=self.generate == TENSOR_PARALLEL)

    def settle(self, config: RunConfig, on_cuda: bool) -> tuple[RunConfig, list[str]]:
        """Without GPUs use one device: LitGPT spreads layers over GPUs only."""
        if self.generate == SEQUENTIAL and config.devices > 1 and not on_cuda:
            note = f"devices={config.devices}, but litgpt's sequential has one device without GPUs"
            return replace(config, devices=1), [note]
        return config, []

    def refuse(self, config: RunConfig, model_config: TransformersConfig, on_cuda: bool, longest: int) -> None:
        """Refuse combinations that LitGPT would compute wrongly or end with a traceback."""
        values, devices = litgpt_config(model_config), config.devices * config.num_nodes
        if config.model.weights is Weights.random:
            raise ConfigError("backend=litgpt converts a checkpoint, and model.weights=random has none.", ELSEWHERE)
        if config.adapter.path is not None:
            check_adapter(Path(config.adapter.path), model_config)
        if self.quantize != "none" and not on_cuda:
            fact = f"backend.quantize={self.quantize}: LitGPT quantizes through Fabric on CUDA only."
            raise ConfigError(fact, "backend.quantize=none, or backend=transformers quantization=nf4")
        if self.quantize != "none" and self.generate == TENSOR_PARALLEL and devices > 1:
            fact = f"backend.quantize={self.quantize}: packed weights cannot be split by heads."
            raise ConfigError(fact, "backend.generate=sequential, or backend.quantize=none")
        if self.generate == SEQUENTIAL:
            if config.num_nodes > 1:
                raise ConfigError("litgpt's sequential is one process on one node.", "num_nodes=1")
            if devices > values["n_layer"]:
                fact = f"devices={devices}, and the model has {values['n_layer']} layers to put on them."
                raise ConfigError(fact, f"devices={values['n_layer']}")
            return
        for unit in ("n_head", "n_query_groups", "n_embd", "intermediate_size"):
            if values[unit] % devices:
                fact = f"litgpt's tensor_parallel cannot divide {unit}={values[unit]} by {devices} devices."
                raise ConfigError(fact, "backend.generate=sequential, or devices=1")
