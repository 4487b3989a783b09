"""The quantizers of bitsandbytes: LLM.int8, and four bits a value in blocks of 64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from bitsandbytes.autograd._functions import MatmulLtState, matmul, matmul_4bit
from bitsandbytes.functional import QuantState, int8_vectorwise_quant, quantize_4bit

from shards.load.quantizers import Quantizer, set_parameters

if TYPE_CHECKING:
    from torch import nn

THRESHOLD = 6.0
"""Inputs with a value from this on are multiplied in 16 bits, as transformers' BitsAndBytesConfig has it."""

BLOCK, NESTED_BLOCK = 64, 256


class LlmInt8(Quantizer):
    """A byte a value and an fp32 scale for each output; inputs are quantized row by row, but for outliers."""

    def parameters(self, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        return {
            "weight": torch.empty(outputs, inputs, dtype=torch.int8, device="meta"),
            "weight_scale": torch.empty(outputs, dtype=torch.float32, device="meta"),
        }

    def pack(self, layer: nn.Module, values: torch.Tensor) -> None:
        packed, scale, _ = int8_vectorwise_quant(values.to(torch.float16))
        layer.weight.copy_(packed)
        layer.weight_scale.copy_(scale)

    def multiply(self, layer: nn.Module, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        state = MatmulLtState()
        state.CB, state.SCB = layer.weight, layer.weight_scale
        state.threshold, state.has_fp16_weights, state.is_training = THRESHOLD, False, False
        product: torch.Tensor = matmul(rows, layer.weight, bias=bias, state=state)
        return product


class FourBit(Quantizer):
    """Half a byte a value and a maximum for each 64 in a row; with `dq` the maxima are quantized as well."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(name, dtype)
        self.kind, _, suffix = name.partition("_")
        self.is_nested = suffix == "dq"

    def parameters(self, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        values = outputs * inputs
        blocks = -(-values // BLOCK)
        sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((-(-values // 2), 1), torch.uint8),
            "weight_absmax": ((blocks,), torch.uint8 if self.is_nested else torch.float32),
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
        packed, state = quantize_4bit(
            values.contiguous(), blocksize=BLOCK, compress_statistics=self.is_nested, quant_type=self.kind
        )
        tensors = {"weight": packed, "weight_absmax": state.absmax, "weight_code": state.code}
        if self.is_nested:
            nested = {"weight_nested_absmax": state.state2.absmax, "weight_nested_code": state.state2.code}
            tensors |= {**nested, "weight_offset": state.offset}
        set_parameters(layer, tensors)

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
            absmax=layer.weight_absmax,
            shape=torch.Size(layer.packed_shape),
            code=layer.weight_code,
            blocksize=BLOCK,
            quant_type=self.kind,
            dtype=self.dtype,
            offset=layer.weight_offset if self.is_nested else None,
            state2=nested,
        )
        product: torch.Tensor = matmul_4bit(rows, layer.weight.t(), quant_state=state, bias=bias)
        return product
