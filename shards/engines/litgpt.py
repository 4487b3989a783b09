"""LitGPT: whole layers on one device after the other, or each layer split; embedding and head are whole and never
tied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shards.engines.base import driver_bytes, layer_activation_bytes
from shards.model.shape import ModelShape, Parameter
from shards.plan.cuts import Pieces, cut_up, even_piece
from shards.plan.layout import Layout, Pool, Traffic
from shards.plan.memory import cache_bytes
from shards.plan.request import EnginePlanner, PlanRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class LitgptPlanner(EnginePlanner):
    """`generate/sequentially.py`, or with `cuts_layers` `generate/tp.py`: both answer one prompt at a time."""

    name: ClassVar[str] = "litgpt"
    plain_only: ClassVar[str] = "it converts plain weights"

    cuts_layers: bool = False

    def refusal(self, request: PlanRequest) -> str | None:
        return None

    def num_devices(self, request: PlanRequest) -> int:
        if request.device.kind == "cpu" and not self.cuts_layers:
            return 1
        return request.devices * request.num_nodes

    def tensor_parallel_size(self, request: PlanRequest) -> int:
        if self.cuts_layers:
            return request.num_devices
        return 1

    def most_devices(self, request: PlanRequest) -> int:
        if self.cuts_layers:
            return request.shape.num_attention_heads
        return request.shape.num_layers

    def pieces(self, shape: ModelShape, n: int, rank: int, parameter: Parameter) -> Pieces:
        """The matrices of layers by columns or rows; a tied embedding has a copy for the head."""
        if parameter.cut == "embedding" and shape.tied:
            return (parameter.shape, parameter.shape)
        if parameter.layer is None or parameter.cut == "whole":
            return (parameter.shape,)
        return even_piece(parameter, n)

    def layout(self, request: PlanRequest, ends_only: bool) -> Layout:
        n, shape = request.num_devices, request.shape
        if self.cuts_layers:
            parts = cut_up(shape, self.pieces, n, request.storage)
            return Layout(parts, ((0, shape.num_layers),) * n)
        least, more = divmod(shape.num_layers, n)  # the last devices have one more: chunk_sizes of sequentially.py
        counts = [least + (device >= n - more) for device in range(n)]
        ends = [sum(counts[: device + 1]) for device in range(n)]
        parameters = [0] * n
        for layer, members in shape.groups().items():
            device = next(device for device, end in enumerate(ends) if (layer or 0) < end)
            pieces = ((p, piece) for p in members for piece in self.pieces(shape, 1, 0, p))
            parameters[device] += sum(request.storage.nbytes(parameter, piece) for parameter, piece in pieces)
        return Layout(tuple(parameters), tuple(zip([0, *ends], ends, strict=False)))

    def pool(self, request: PlanRequest) -> Pool | None:
        """The cache of one prompt with its answer, allocated at the start."""
        return Pool(1, nbytes=cache_bytes(request, 1))

    def activation_bytes(self, request: PlanRequest) -> int:
        """The prefill of a layer, or the logits of all tokens of a prompt."""
        layer = layer_activation_bytes(request, request.prompt_tokens, request.shape.num_key_value_heads)
        return max(layer, request.prompt_tokens * request.shape.vocab_size * request.dtype_bytes)

    def overhead_bytes(self, request: PlanRequest) -> int:
        return driver_bytes(request)

    def load_host_bytes(self, request: PlanRequest) -> int | None:
        """LitGPT's script converts a checkpoint in the same process, if it is not yet converted."""
        return None

    def traffic(self, request: PlanRequest) -> Traffic:
        """Attention and MLP of each layer are reduced; logits are whole on every rank."""
        if request.tensor_parallel_size == 1:
            return Traffic()
        return Traffic(2 * request.shape.num_layers)

    def unread_bytes(self, request: PlanRequest, table: int) -> int:
        if request.tensor_parallel_size > 1 or not request.shape.tied:
            return table
        return 0
