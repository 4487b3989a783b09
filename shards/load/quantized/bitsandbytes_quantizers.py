"""The quantizers of bitsandbytes: LLM.int8, and four bits per value in blocks of 64."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from bitsandbytes.autograd._functions import MatmulLtState, matmul, matmul_4bit
from bitsandbytes.functional import QuantState, int8_vectorwise_quant, quantize_4bit, quantize_blockwise

from shards.load.blocks import local_tensor
from shards.load.quantized.quantizers import PIECE_VALUES, Quantizer, row_pieces

if TYPE_CHECKING:
    from torch import nn

THRESHOLD = 6.0
"""Inputs with a value of at least this are multiplied in 16 bits, as in transformers' BitsAndBytesConfig."""

BLOCK, NESTED_BLOCK = 64, 256


class LlmInt8(Quantizer):
    """One byte per value and an fp32 scale for each output; inputs are quantized row by row, except for outliers."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(name, dtype)
        # bitsandbytes warns at each product that it casts inputs other than fp16.
        logging.getLogger(matmul.__module__).setLevel(logging.ERROR)

    def parameters(self, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        return {
            "weight": torch.empty(outputs, inputs, dtype=torch.int8, device="meta"),
            "weight_scale": torch.empty(outputs, dtype=torch.float32, device="meta"),
        }

    def pack(self, layer: nn.Module, values: torch.Tensor) -> None:
        weight, scales = local_tensor(layer.weight), local_tensor(layer.weight_scale)
        for rows in row_pieces(values):
            weight[rows], scales[rows], _ = int8_vectorwise_quant(values[rows].to(torch.float16))

    def multiply(self, layer: nn.Module, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        state = MatmulLtState()
        state.CB, state.SCB = layer.weight, layer.weight_scale
        state.threshold, state.has_fp16_weights, state.is_training = THRESHOLD, False, False
        product: torch.Tensor = matmul(rows, layer.weight, bias=bias, state=state)
        return product


class FourBit(Quantizer):
    """Half a byte per value and a maximum for each block of 64 in a row; with `dq` the maxima are quantized as well.

    If rows are whole blocks, they are stored as rows, and can be sharded.
    """

    whole = frozenset({"weight_code"})

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(name, dtype)
        self.kind, _, suffix = name.partition("_")
        self.is_nested = suffix == "dq"

    def parameters(self, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        values = outputs * inputs
        blocks, rows = -(-values // BLOCK), inputs % BLOCK == 0
        sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((outputs, inputs // 2) if rows else (-(-values // 2), 1), torch.uint8),
            "weight_absmax": (
                (outputs, inputs // BLOCK) if rows else (blocks,),
                torch.uint8 if self.is_nested else torch.float32,
            ),
            "weight_code": ((16,), torch.float32),
        }
        if self.is_nested:
            sizes |= {
                "weight_nested_absmax": ((-(-blocks // NESTED_BLOCK),), torch.float32),
                "weight_nested_code": ((256,), torch.float32),
                "weight_offset": ((), torch.float32),
            }
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in sizes.items()}

    def pack(self, layer: nn.Module, values: torch.Tensor) -> None:
        weight, stored = local_tensor(layer.weight).view(-1), local_tensor(layer.weight_absmax).view(-1)
        absmax = torch.empty_like(stored, dtype=torch.float32) if self.is_nested else stored
        for number, piece in enumerate(values.reshape(-1).split(PIECE_VALUES)):
            packed, state = quantize_4bit(piece, blocksize=BLOCK, quant_type=self.kind)
            first = number * PIECE_VALUES
            weight[first // 2 : first // 2 + len(packed)] = packed[:, 0]
            absmax[first // BLOCK : first // BLOCK + len(state.absmax)] = state.absmax
            layer.weight_code.copy_(state.code)
        if self.is_nested:
            layer.weight_offset.copy_(absmax.mean())
            packed, state = quantize_blockwise(absmax - layer.weight_offset, blocksize=NESTED_BLOCK)
            stored.copy_(packed)
            layer.weight_nested_absmax.copy_(state.absmax)
            layer.weight_nested_code.copy_(state.code)

    def multiply(self, layer: nn.Module, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        nested = None
        if self.is_nested:
            nested = QuantState(  # type: ignore[no-untyped-call]
                absmax=layer.weight_nested_absmax,
                code=layer.weight_nested_code,
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
        state = QuantState(  # type: ignore[no-untyped-call]
            absmax=layer.weight_absmax.view(-1),
            shape=torch.Size(layer.packed_shape),
            code=layer.weight_code,
            blocksize=BLOCK,
            quant_type=self.kind,
            dtype=self.dtype,
            offset=layer.weight_offset if self.is_nested else None,
            state2=nested,
        )
        product: torch.Tensor = matmul_4bit(rows, layer.weight.view(-1, 1).t(), quant_state=state, bias=bias)
        return product
