"""The project's own tensor parallelism: heads, columns and rows evenly, the vocabulary in chunks of ceil(rows / N)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from shards.engines.base import TensorParallelModulePlanner
from shards.model.quantization import Quantization
from shards.model.shape import ModelShape, Parameter
from shards.plan.cuts import Pieces, even_piece, row_chunk
from shards.plan.request import PlanRequest

CUT_FAMILIES = ("falcon", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallelPlanner(TensorParallelModulePlanner):
    """Tensor parallelism over all ranks, for the families that `shards.parallel.tensor_parallel` supports."""

    name: ClassVar[str] = "tensor_parallel"
    plain_only: ClassVar[str] = "its layers multiply plain weights and those that they quantize"

    def runs(self, quantization: Quantization) -> bool:
        return not quantization.fused

    def refusal(self, request: PlanRequest) -> str | None:
        return uncuttable(request.shape, request.tensor_parallel_size) or self.split_group(request)

    def pieces(self, shape: ModelShape, n: int, rank: int, parameter: Parameter) -> Pieces:
        if parameter.cut == "whole":
            return (parameter.shape,)
        if parameter.cut in ("embedding", "head"):
            return row_chunk(parameter, n, rank)
        return even_piece(parameter, n)


def uncuttable(shape: ModelShape, n: int) -> str | None:
    """The reason why the model cannot be split over `n` ranks, None if it can."""
    if n == 1:
        return None
    if shape.family not in CUT_FAMILIES:
        return f"tensor_parallel cuts {', '.join(CUT_FAMILIES)}, and no model_type {shape.family!r}."
    if shape.family == "falcon" and (shape.alibi or not shape.expanded_cache):
        return "tensor_parallel cuts no older Falcon (multi-query, or with ALiBi)."
    counts = {
        "attention heads": shape.num_attention_heads,
        "key and value heads": shape.num_key_value_heads,
        "inner MLP columns": shape.intermediate_size,
    }
    for unit, count in counts.items():
        if count % n:
            return f"{count} {unit} cannot be divided by {n} devices, as tensor_parallel needs."
    if (n - 1) * ceil(shape.vocab_size / n) >= shape.vocab_size:
        return f"{shape.vocab_size} rows of the vocabulary leave one of {n} devices without any."
    return None
