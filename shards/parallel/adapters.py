"""A LoRA adapter that is not merged: its two factors next to each matrix, cut in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.models.falcon.modeling_falcon import FalconLinear

from shards.errors import PlanError
from shards.load.blocks import block_of, local_block, whole
from shards.load.quantized.quantizers import set_parameters
from shards.parallel.products import ProductLinear

if TYPE_CHECKING:
    from shards.load.adapter import Adapter


def attach_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Add the factors of an adapter to the layers of a model on meta, uninitialised. The model may be cut, but is not
    yet packed or sharded."""
    adapter.check({whole(name, tensor)[0]: whole(name, tensor)[1] for name, tensor in model.named_parameters()})
    for name, layer in list(model.named_modules()):
        weight = layer._parameters.get("weight")
        if weight is None or (key := whole(f"{name}.weight", weight)[0]) not in adapter.factors:
            continue
        if type(layer) in (nn.Linear, FalconLinear):
            layer.__class__ = ProductLinear
        if not isinstance(layer, ProductLinear):
            raise PlanError(f"{name} is a {type(layer).__name__}, which takes no factors.", "adapter.merge=true")
        inward, _, scale = adapter.factors[key]
        rank, (outputs, inputs) = inward.shape[0], weight.shape
        factors = {"weight_lora_a": (rank, inputs), "weight_lora_b": (outputs, rank)}
        set_parameters(
            layer, {n: torch.empty(shape, dtype=weight.dtype, device="meta") for n, shape in factors.items()}
        )
        layer.lora_start, layer.lora_scale, layer.lora_name = (0, 0), scale, key
        if (block := block_of(weight)) is not None:
            layer.lora_start = block.start


def fill_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Load this rank's parts of the factors."""
    for layer in model.modules():
        if getattr(layer, "lora_scale", None) is not None:
            inward, outward, _ = adapter.factors[layer.lora_name]
            row, column = layer.lora_start
            _fill(layer.weight_lora_a, inward, (0, column))
            _fill(layer.weight_lora_b, outward, (row, 0))


def _fill(parameter: nn.Parameter, factor: torch.Tensor, start: tuple[int, ...]) -> None:
    """Copy the part of a factor that begins at `start` into a plain parameter, or into the shard of a DTensor."""
    first, local = local_block(parameter)
    if isinstance(parameter, DTensor):
        start = first
    row, column = start
    local.copy_(factor[row : row + local.shape[0], column : column + local.shape[1]])
