"""A LoRA adapter that is merged into the weights of a model while they are read; each rank merges its own part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from shards.checkpoint.adapter_config import CONFIG, FACTOR, WEIGHTS, read_config
from shards.checkpoint.tensor_files import read_safetensors
from shards.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    import torch


@dataclass(frozen=True, slots=True)
class Adapter:
    """The two factors of each matrix by its name in the model: the merged weight is W + scale * B @ A, with A of [r,
    inputs] and B of [outputs, r]. Source: "LoRA", https://arxiv.org/abs/2106.09685, section 4.1."""

    folder: Path
    factors: dict[str, tuple[torch.Tensor, torch.Tensor, float]]

    def add(self, name: str, start: tuple[int, ...], values: torch.Tensor) -> None:
        """Add the adapter's update to `values`, the part of matrix `name` that begins at `start`."""
        if name not in self.factors or not values.numel():
            return
        inward, outward, scale = self.factors[name]
        rows = outward[start[0] : start[0] + values.shape[0]].to(values.device)
        columns = inward[:, start[1] : start[1] + values.shape[1]].to(values.device)
        values.copy_((values.float() + scale * (rows.float() @ columns.float())).to(values.dtype))

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """CheckpointError if the model has no matrices of the adapter's names and shapes."""
        for name, (inward, outward, _) in self.factors.items():
            shape = shapes.get(name)
            if shape is None:
                raise CheckpointError(
                    f"{self.folder} is for {name}, which the model does not have.",
                    "the adapter of this model",
                )
            if shape != (outward.shape[0], inward.shape[1]):
                has = f"{outward.shape[0]} x {inward.shape[1]}"
                raise CheckpointError(
                    f"{self.folder} has {has} for {name}, which has {' x '.join(map(str, shape))}.",
                    "the adapter of this model",
                )


def read_adapter(folder: Path) -> Adapter:
    """The adapter that peft has saved in a folder; CheckpointError for any kind but LoRA of linear layers."""
    config = read_config(folder)
    read_safetensors(folder / WEIGHTS)  # only for its checks and their clear errors
    tensors = load_file(folder / WEIGHTS)
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = FACTOR.match(name)
        if match is None or tensor.dim() != 2:
            raise CheckpointError(f"{folder / WEIGHTS} has {name}, which is not a factor of LoRA.", f"see {CONFIG}")
        factors.setdefault(f"{match.group(1)}.weight", {})[match.group(2)] = tensor
    scaled = {}
    for name, pair in factors.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise CheckpointError(f"{folder / WEIGHTS} has no pair of factors for {name}.", "save the adapter again")
        rank = divisor = pair["A"].shape[0]
        if config.get("use_rslora"):
            divisor = math.sqrt(rank)
        scaled[name] = (pair["A"], pair["B"], (config.get("lora_alpha") or rank) / divisor)
    return Adapter(folder, scaled)
