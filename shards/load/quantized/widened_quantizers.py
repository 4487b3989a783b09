"""Layers that keep the integers or fp8 bytes of a checkpoint, and dequantize a matrix to multiply with it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from shards.load.quantized.quantizers import Quantizer, row_pieces

if TYPE_CHECKING:
    from torch import nn

    from shards.model.quantization import Quantization

FP8 = torch.float8_e4m3fn


class Widened(Quantizer):
    """A matrix as a checkpoint stores it, on any device: its rows are stored as rows, so that it can be sharded.

    Nothing is packed here: the stored tensors are read into the parameters.
    """

    form: Quantization

    def __init__(self, form: Quantization, dtype: torch.dtype) -> None:
        super().__init__(form.name, dtype)
        self.form = form

    @abstractmethod
    def values(self, layer: nn.Module, rows: slice) -> torch.Tensor:
        """Some rows of the matrix, dequantized to fp32."""

    def pack(self, layer: nn.Module, values: torch.Tensor) -> None:
        raise NotImplementedError(f"{self.name} is read, not made")

    def multiply(self, layer: nn.Module, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight = torch.empty(*layer.packed_shape, dtype=rows.dtype, device=rows.device)
        for piece in row_pieces(weight):
            weight[piece] = self.values(layer, piece)
        return linear(rows, weight, bias)

    def _of_inputs(self, scales: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """Scales [rows, groups] for each input, or for all of them: [rows, inputs] or [rows, 1]."""
        group, inputs = self.form.block[1], layer.packed_shape[1]
        if self.form.ordered:
            return scales[:, layer.weight_group]
        return scales.repeat_interleave(group, 1)[:, :inputs] if group else scales


class GroupIntegers(Widened):
    """Integers of four or eight bits; groups of inputs of an output have a scale and a zero point.

    With activation order, `weight_group` is the group of each input.
    """

    def __init__(self, form: Quantization, dtype: torch.dtype) -> None:
        super().__init__(form, dtype)
        self.middle = 1 << (form.bits - 1)
        self.whole = frozenset({"weight_group"} if form.ordered else ())

    def parameters(self, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        groups = -(-inputs // self.form.block[1]) if self.form.block[1] else 1
        sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((outputs, -(-inputs * self.form.bits // 8)), torch.uint8),
            "weight_scale": ((outputs, groups, 2), self.dtype),
        }
        if self.form.ordered:
            sizes["weight_group"] = ((inputs,), torch.int32)
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in sizes.items()}

    def values(self, layer: nn.Module, rows: slice) -> torch.Tensor:
        packed = layer.weight[rows]
        if self.form.bits == 4:
            packed = torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, : layer.packed_shape[1]]
        scale, middle = (self._of_inputs(part, layer) for part in layer.weight_scale[rows].float().unbind(-1))
        return (packed.float() - self.middle) * scale + middle


class BytesFp8(Widened):
    """Values in fp8 (e4m3), with an fp32 scale for the matrix, for each output, or for blocks of both; inputs are not
    quantized."""

    def __init__(self, form: Quantization, dtype: torch.dtype) -> None:
        super().__init__(form, dtype)
        self.whole = frozenset() if form.block[0] else frozenset({"weight_scale"})

    def parameters(self, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        sizes = [
            -(-size // block) if block else 1 for size, block in zip((outputs, inputs), self.form.block, strict=True)
        ]
        return {
            "weight": torch.empty(outputs, inputs, dtype=torch.uint8, device="meta"),
            "weight_scale": torch.empty(*sizes, dtype=torch.float32, device="meta"),
        }

    def values(self, layer: nn.Module, rows: slice) -> torch.Tensor:
        packed, scale = layer.weight[rows].view(FP8), layer.weight_scale
        if self.form.block[0]:
            first = rows.start
            numbers = torch.arange(first, first + len(packed), device=scale.device)
            scale = scale[numbers // self.form.block[0]]
        return packed.float() * self._of_inputs(scale, layer)
