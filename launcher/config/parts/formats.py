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
    """Where weights come from: `auto` reads the checkpoint, `random` generates values of its shapes on the device."""

    auto = "auto"
    random = "random"


@dataclass
class AdapterConfig:
    path: str | None = None  # a LoRA adapter: a folder saved by peft, or embedded:NAME
    merge: bool = True  # merge it into the weights during loading; False: keep its factors separate
    paths: dict[str, str] = field(default_factory=dict)  # unmerged adapters by name; each prompt chooses one

    @property
    def beside(self) -> tuple[str, ...]:
        """The folders of the adapters that are not merged."""
        alone = (self.path,) if self.path is not None and not self.merge else ()
        return (*alone, *self.paths.values())
