"""Quantizers for torch's own integer kernels, with torchao's arithmetic: int8 weights with int8 inputs, and int4
weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shards.errors import PlanError
from shards.load.blocks import local_tensor
from shards.load.quantized.quantizers import Quantizer, row_pieces
from shards.model.quantization import INT4_GROUP, INT4_OUTPUTS

if TYPE_CHECKING:
    from torch import nn

LEAST_ROWS = 32
"""Rows of an int8 product on CUDA: cuBLAS needs at least 17, and an aligned number."""


def rows_in_bytes(rows: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in int8 and their fp32 scales [rows, 1]: the `largest` magnitude of each row over 127.5, rounded as in
    torchao."""
    scale = largest.div(127.5).clamp_(min=torch.finfo(torch.float32).eps).float()
    return (rows * (1 / scale)).round_().clamp_(-128, 127).to(torch.int8), scale


def rows_divided(rows: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, rounded as in compressed-tensors: in the dtype of the rows, by division. Source: calculate_qparams in
    quantization/utils/helpers.py, _quantize in quantization/lifecycle/forward_helpers.py."""
    scale = largest / 127.5
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return (rows / scale).clamp_(-128, 127).round_().to(torch.int8), scale.float()


class DynamicInt8(Quantizer):
    """One byte per value and an fp32 scale for each output; each row of inputs is quantized as well, and bytes are
    multiplied.

    If a layer holds parts of rows, its ranks agree on the largest magnitude of the whole row, so that the integers are
    those of a single rank.
    """

    def parameters(self, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        return {
            "weight": torch.empty(outputs, inputs, dtype=torch.int8, device="meta"),
            "weight_scale": torch.empty(outputs, dtype=torch.float32, device="meta"),
        }

    def pack(self, layer: nn.Module, values: torch.Tensor) -> None:
        weight, scale = local_tensor(layer.weight), local_tensor(layer.weight_scale)
        for rows in row_pieces(values):
            largest = values[rows].abs().amax(1, keepdim=True)
            packed, row_scale = rows_in_bytes(values[rows], layer.largest_over_ranks(largest))
            weight[rows] = packed
            scale[rows] = row_scale[:, 0]

    def multiply(self, layer: nn.Module, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        largest = layer.largest_over_ranks(flat.abs().amax(1, keepdim=True))
        packed, scale = (rows_divided if self.form else rows_in_bytes)(flat, largest)
        missing = LEAST_ROWS - len(flat)
        if rows.device.type == "cuda" and missing > 0:
            packed = torch.cat([packed, packed.new_zeros(missing, packed.shape[1])])
        total = torch._int_mm(packed, layer.weight.t())[: len(flat)]
        product = (total.float() * scale).to(rows.dtype) * layer.weight_scale
        if bias is not None:
            product = product + bias
        return product.to(rows.dtype).view(*rows.shape[:-1], -1)


class GroupsInt4(Quantizer):
    """Half a byte per value; each group of 64 inputs of an output has a scale and a zero point (the middle of its
    range).

    Values are stored in the layout of the kernel of the device on which they were packed.
    """

    group = INT4_GROUP

    def parameters(self, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        if inputs % self.group or outputs % INT4_OUTPUTS:
            raise PlanError(
                f"A matrix of {outputs} outputs and {inputs} inputs is not whole groups of {INT4_OUTPUTS} and "
                f"{self.group}, as int4_wo needs.",
                "quantization=nf4",
            )
        return {
            "weight": torch.empty(outputs, inputs // 2, dtype=torch.uint8, device="meta"),
            "weight_scale": torch.empty(inputs // self.group, outputs, 2, dtype=self.dtype, device="meta"),
        }

    def pack(self, layer: nn.Module, values: torch.Tensor) -> None:
        if values.device.type == "cuda" and self.dtype is not torch.bfloat16:
            raise PlanError("The int4 kernels of a GPU multiply bf16 only.", "precision=bf16")
        outputs, inputs = layer.packed_shape
        integers = torch.empty(outputs, inputs, dtype=torch.int32, device=values.device)
        for rows in row_pieces(values):
            groups = values[rows].reshape(-1, inputs // self.group, self.group)
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            scale = ((high - low) / 15).clamp_(min=1e-6)
            middle = low + scale * 8
            integers[rows] = ((groups - (middle - scale * 8)) / scale).round_().clamp_(0, 15).int().view(-1, inputs)
            layer.weight_scale[:, rows] = torch.cat([scale, middle], -1).transpose(0, 1)
        layer.weight.copy_(packed_int4(integers).view(outputs, -1))

    def multiply(self, layer: nn.Module, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        if rows.device.type == "cpu":
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, layer.weight, self.group, layer.weight_scale)
        else:
            weight = layer.weight.view(torch.int32).view(*tiles(*layer.packed_shape))
            product = torch._weight_int4pack_mm(flat, weight, self.group, layer.weight_scale)
        product = product.view(*rows.shape[:-1], -1)
        if bias is None:
            return product
        return product + bias


def packed_int4(integers: torch.Tensor) -> torch.Tensor:
    """Integers from 0 to 15 [outputs, inputs] as bytes, in the layout of their device's kernel."""
    if integers.device.type == "cpu":
        packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
        return packed
    halves = (integers[:, ::2] << 4 | integers[:, 1::2]).to(torch.uint8)
    inner = tiles(*integers.shape)[3] * 2
    return torch._convert_weight_to_int4pack(halves, inner).view(torch.uint8)


def tiles(outputs: int, inputs: int) -> tuple[int, int, int, int]:
    """The shape of packed words on a GPU: 8 outputs by 16 inputs times the largest power of two that divides them, up
    to 8."""
    inner = next(count for count in (8, 4, 2) if inputs % (16 * count) == 0)
    return outputs // 8, inputs // (16 * inner), 32, inner // 2
