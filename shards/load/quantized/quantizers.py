"""Linear layers whose weights are packed into fewer bytes while they are loaded; each rank packs its own part."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from shards.load.blocks import Block, block_of, local_block, local_tensor, mark_block, whole

if TYPE_CHECKING:
    from torch import nn

    from shards.model.quantization import Quantization

IMPLEMENTATIONS = {
    "int8_wo": "shards.load.quantized.quantizers:RowsInt8",
    "int8_dyn": "shards.load.quantized.integer_quantizers:DynamicInt8",
    "int4_wo": "shards.load.quantized.integer_quantizers:GroupsInt4",
    "int8": "shards.load.quantized.bitsandbytes_quantizers:LlmInt8",
    "nf4": "shards.load.quantized.bitsandbytes_quantizers:FourBit",
    "nf4_dq": "shards.load.quantized.bitsandbytes_quantizers:FourBit",
    "fp4": "shards.load.quantized.bitsandbytes_quantizers:FourBit",
    "fp4_dq": "shards.load.quantized.bitsandbytes_quantizers:FourBit",
}


class Quantizer(ABC):
    """A way to store the matrix [outputs, inputs] of a linear layer, and to multiply with it.

    The stored tensors are parameters of the layer: `weight`, and others whose names begin with `weight_`. The
    parameters named in `whole` are complete on every rank when the others are sharded by rows.
    """

    whole: frozenset[str] = frozenset()
    form: Quantization | None = None  # the checkpoint's format, if its tensors are kept quantized
    zeros_from: int = 0

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype

    @abstractmethod
    def parameters(self, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        """The stored tensors of a matrix, on meta."""

    @abstractmethod
    def pack(self, layer: nn.Module, values: torch.Tensor) -> None:
        """Store `values` [outputs, inputs], this rank's part of the matrix, in the parameters of a layer."""

    @abstractmethod
    def multiply(self, layer: nn.Module, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`rows` [..., inputs] times the transposed matrix of a layer, plus the bias: [..., outputs]."""


def make_quantizer(name: str, dtype: torch.dtype) -> Quantizer:
    """The quantizer of a name, for activations of a dtype."""
    module, _, attribute = IMPLEMENTATIONS[name].partition(":")
    quantizer: Quantizer = getattr(importlib.import_module(module), attribute)(name, dtype)
    return quantizer


class RowsInt8(Quantizer):
    """One byte per value and a scale for each output; products are computed in the dtype of the activations.

    The scale is the largest magnitude of the row over 127.5, as in torchao's weight-only int8. A part of a row has its
    own scale.
    """

    def parameters(self, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        return {
            "weight": torch.empty(outputs, inputs, dtype=torch.int8, device="meta"),
            "weight_scale": torch.empty(outputs, dtype=self.dtype, device="meta"),
        }

    def pack(self, layer: nn.Module, values: torch.Tensor) -> None:
        weight, scales = local_tensor(layer.weight), local_tensor(layer.weight_scale)
        for rows in row_pieces(values):
            piece = values[rows]
            scale = piece.abs().amax(1).float().div_(127.5).clamp_(min=torch.finfo(torch.float32).tiny)
            weight[rows] = piece.float().div_(scale[:, None]).round_().clamp_(-128, 127).to(torch.int8)
            scales[rows] = scale.to(scales.dtype)

    def multiply(self, layer: nn.Module, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if rows.device.type == "cpu":
            flat = rows.reshape(-1, rows.shape[-1])
            product = torch._weight_int8pack_mm(flat, layer.weight, layer.weight_scale)
            product = product.view(*rows.shape[:-1], -1)
        else:
            product = linear(rows, layer.weight.to(rows.dtype)) * layer.weight_scale
        if bias is None:
            return product
        return product + bias


PIECE_VALUES = 1 << 20
"""The number of values that are packed at a time: temporaries take several times their bytes."""


def row_pieces(values: torch.Tensor) -> Iterator[slice]:
    """Slices of rows of a matrix, PIECE_VALUES values at a time."""
    step = max(1, PIECE_VALUES // max(1, values.shape[1]))
    return (slice(first, first + step) for first in range(0, len(values), step))


def set_parameters(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set tensors as parameters of a layer, without gradients."""
    for name, tensor in tensors.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))


def set_quantizer(layer: nn.Module, name: str, quantizer: Quantizer) -> None:
    """Replace the weight of a linear layer on meta, which may be cut, with the parameters of a quantizer."""
    old = layer.weight
    block = block_of(old) or Block(f"{name}.weight", tuple(old.shape), (0, 0))
    layer.packed_shape = outputs, inputs = tuple(old.shape)
    set_parameters(layer, quantizer.parameters(outputs, inputs))
    mark_block(layer.weight, block)
    layer.quantizer = quantizer


def whole_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The tensors of packed layers that every rank holds completely."""
    layers = [module for module in model.modules() if getattr(module, "quantizer", None) is not None]
    return {getattr(layer, name) for layer in layers for name in layer.quantizer.whole}


def whole_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of the matrix of a layer in the uncut model."""
    block = block_of(layer.weight)
    shape: tuple[int, ...] = layer.packed_shape if block is None else block.shape
    return shape


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have a quantizer, by the name of their matrix in the uncut model."""
    layers = {}
    for name, module in model.named_modules():
        if getattr(module, "quantizer", None) is not None:
            layers[whole(f"{name}.weight", module.weight)[0]] = module
    return layers


def part_bytes(layer: nn.Module) -> int:
    """Bytes of this rank's part of the matrix of a layer before packing."""
    rows, columns = part_shape(layer)
    nbytes: int = rows * columns * layer.quantizer.dtype.itemsize
    return nbytes


def part_of(layer: nn.Module) -> tuple[tuple[int, ...], torch.Tensor]:
    """The start of this rank's part in the matrix of a layer, and an uninitialised tensor for it on its device."""
    start, local = local_block(layer.weight)
    return start, torch.empty(*part_shape(layer), dtype=layer.quantizer.dtype, device=local.device)


def part_shape(layer: nn.Module) -> tuple[int, int]:
    """The shape of this rank's part of the matrix of a layer."""
    outputs, inputs = layer.packed_shape
    return (len(local_tensor(layer.weight)) if isinstance(layer.weight, DTensor) else outputs), inputs
