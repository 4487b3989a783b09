"""Sources and storage formats of weights, and adapters. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class WeightFormat(Enum):
    """Storage formats for linear layers that are quantized while they are loaded, by the names of `shards.model`."""

    none = "none"
    int8_wo = "int8_wo"
    int8_dyn = "int8_dyn"
    int4_wo = "int4_wo"
    int8 = "int8"
    nf4 = "nf4"
    nf4_dq = "nf4_dq"
    fp4 = "fp4"
    fp8 = "fp8"
    fp8_channel = "fp8_channel"
    fp8_block = "fp8_block"


OWN_QUANTIZATIONS = ("int8_wo", "int8_dyn", "int4_wo", "int8", "nf4", "nf4_dq", "fp4")
"""The formats that this project's layers support, on the engines that run the transformers module."""


READS = "reads GPTQ, AWQ, packed integers, W8A8, fp8 and bitsandbytes, but no quantized head"
"""The description of what these engines read, for a checkpoint with quantized weights that they cannot keep."""


class Weights(Enum):
    """`auto` reads the checkpoint; `random` makes values of the same shapes on their device."""

    auto = "auto"
    random = "random"


@dataclass
class AdapterConfig:
    path: str | None = None  # a folder that peft has saved, or embedded:NAME: a LoRA adapter
    merge: bool = True  # into the weights while they are read; else its factors are beside them
    paths: dict[str, str] = field(default_factory=dict)  # several by name, beside the weights: a prompt names its own

    @property
    def beside(self) -> tuple[str, ...]:
        """The folders of the adapters that are not merged."""
        alone = (self.path,) if self.path is not None and not self.merge else ()
        return (*alone, *self.paths.values())
