"""DeepSpeed's AutoTP: attention split by heads, MLP and head by multiples of 64; the embedding is whole on every
rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shards.engines.base import TensorParallelModulePlanner, uneven_heads
from shards.model.shape import ModelShape, Parameter
from shards.plan.cuts import Pieces, even_piece
from shards.plan.layout import Traffic
from shards.plan.request import PlanRequest

_GRAIN = 64  # deepspeed/module_inject/tp_shard.py, tp_grain_size


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedPlanner(TensorParallelModulePlanner):
    """Tensor parallelism over all ranks; a tied model gets a separate head."""

    name: ClassVar[str] = "deepspeed"
    mixes_precision: ClassVar[bool] = False  # init_inference has one type for weights and products
    plain_only: ClassVar[str] = "AutoTP cuts plain weights only"

    def refusal(self, request: PlanRequest) -> str | None:
        shape, n = request.shape, request.tensor_parallel_size
        if n > 1 and shape.idle:
            return f"DeepSpeed's AutoTP does not cut the {shape.experts[0]} experts of a layer, which are one tensor."
        if uneven := uneven_heads(request):
            return uneven
        if shape.num_key_value_heads % n:
            return (
                f"{shape.num_key_value_heads} key and value heads cannot be divided by {n} devices, as {self.name} "
                "needs."
            )
        return None

    def pieces(self, shape: ModelShape, n: int, rank: int, parameter: Parameter) -> Pieces:
        sizes, cut = parameter.shape, parameter.cut
        if cut == "whole" or n == 1:
            return (sizes,)
        if cut == "head":
            return ((sizes[0], _grained(sizes[1], n, rank)),)
        if cut == "embedding" and shape.tied:
            return (sizes, (sizes[0], _grained(sizes[1], n, rank)))
        if cut == "embedding":
            return (sizes,)
        if ".mlp." not in parameter.name:
            return even_piece(parameter, n)
        if cut == "row":
            return ((sizes[0], _grained(sizes[1], n, rank)),)
        return ((_grained(sizes[0], n, rank), *sizes[1:]),)

    def traffic(self, request: PlanRequest) -> Traffic:
        """The embedding needs no all-reduce, attention and MLP of a Falcon have separate ones, and logits are summed as
        well, which transfers twice as much as gathering them."""
        if request.tensor_parallel_size == 1:
            return Traffic()
        return Traffic(2 * request.shape.num_layers, 2 * request.shape.vocab_size)

    def unread_bytes(self, request: PlanRequest, table: int) -> int:
        if request.tensor_parallel_size > 1 or not request.shape.tied:
            return table
        return 0


def _grained(total: int, n: int, rank: int) -> int:
    if total < _GRAIN:
        return total // n + (rank < total % n)
    grains, rest = divmod(total, _GRAIN)
    numbers = (grains // n + (rank < grains % n)) * _GRAIN
    if rank == n - 1:
        return numbers + rest
    return numbers
