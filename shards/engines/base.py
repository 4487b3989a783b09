"""Formulas that several engines share, and the planner of engines that run the transformers module."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from shards.machine.hardware import MIB
from shards.model.quantization import UNPACKED_BYTES
from shards.model.shape import ModelShape, Parameter
from shards.plan.cuts import Cutter, Pieces, cut_up, parameter_kinds
from shards.plan.layout import Layout, Traffic
from shards.plan.memory import kv_bytes_per_token
from shards.plan.request import EnginePlanner, PlanRequest

LOAD_RING_BYTES = 64 * MIB
"""Buffers through which a rank reads its shards."""

CUDA_CONTEXT_BYTES = 512 * MIB
NCCL_BYTES = 384 * MIB


def cut_layout(request: PlanRequest, cut: Cutter, ends_only: bool, buffer_bytes: int) -> Layout:
    """The layout of an engine in which every rank has a piece of every layer."""
    n = request.num_devices
    ranks: Iterable[int] = range(n)
    if ends_only:
        ranks = {0, n - 1}
    parameters = cut_up(request.shape, cut, n, request.storage, ranks)
    return Layout(parameters, ((0, request.shape.num_layers),) * len(parameters), buffer_bytes)


def driver_bytes(request: PlanRequest) -> int:
    """Memory of a CUDA context, and of NCCL's buffers if several processes share the work."""
    if request.device.kind == "cpu":
        return 0
    if request.num_devices == 1 or request.engine.one_process:
        return CUDA_CONTEXT_BYTES
    return CUDA_CONTEXT_BYTES + NCCL_BYTES


def layer_activation_bytes(request: PlanRequest, rows: int, cached_heads: int) -> int:
    """Temporaries of one layer for `rows` tokens.

    For each token its input, the norms and their sum (4 h); in attention the fused, ordered and rotated heads and their
    output; in the MLP the inner activations (2 I, gated 3 I).
    """
    shape, n = request.shape, request.tensor_parallel_size
    heads = shape.num_attention_heads + 2 * cached_heads
    attention = (3 * heads + shape.num_attention_heads) * shape.head_dim
    mlp = (2 + shape.gated_mlp) * shape.intermediate_size
    return rows * request.dtype_bytes * (4 * shape.hidden_size + max(attention, mlp) // n)


def widened_bytes(request: PlanRequest) -> int:
    """The largest matrix of a quantization that is dequantized for multiplication."""
    quantization = request.quantization
    if quantization is None or not quantization.unpacks:
        return 0
    widened = [p.numel for p, _ in parameter_kinds(request.shape, request.storage) if quantization.applies(p)]
    return request.dtype_bytes * max(widened, default=0)


def narrowed_bytes(request: PlanRequest, cut: Cutter, n: int) -> int:
    """The largest matrix that autocast copies to a narrower type, among those that `cut` leaves on one of `n` devices;
    0 if products have the type of the weights."""
    shape = request.shape
    if request.mixed_bytes is None:
        return 0
    kinds = (parameter for parameter, _ in parameter_kinds(shape, request.storage))
    multiplied = [p for p in kinds if len(p.shape) == 2 and (p.cut != "embedding" or shape.tied)]
    sizes = [prod(piece) for parameter in multiplied for piece in cut(shape, n, 0, parameter)]
    return request.mixed_bytes * max(sizes, default=0)


def uneven_heads(request: PlanRequest) -> str | None:
    """The reason why heads cannot be split evenly for tensor parallelism, None if they can."""
    heads, n = request.shape.num_attention_heads, request.tensor_parallel_size
    if heads % n == 0:
        return None
    name = request.engine.name
    return f"{heads} attention heads cannot be divided by {n} devices, as tensor parallelism with {name} needs."


def tensor_parallel_traffic(request: PlanRequest) -> Traffic:
    """All-reduces after the embedding and after attention and MLP of each layer (a single one in a parallel layer);
    every rank has its part of the logits."""
    shape = request.shape
    if request.tensor_parallel_size == 1:
        return Traffic()
    all_reduces = 2 - shape.parallel_attention
    return Traffic(1 + shape.num_layers * all_reduces, shape.vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlanner(EnginePlanner, ABC):
    """An engine that runs the transformers module, with weights loaded by `shards.load`.

    `kv_heads_only`: only kv heads are cached, unlike transformers' own Falcon. `prefill_tokens`: the most prompt tokens
    read at a time into slots; None for a static batch, whose cache grows with each token.
    """

    mixes_precision: ClassVar[bool] = True

    kv_heads_only: bool = True
    prefill_tokens: int | None = None

    @property
    def has_slots(self) -> bool:
        return self.prefill_tokens is not None

    def window_tokens(self, window: int) -> int:
        """Tokens that a layer with a sliding window keeps: in a slot the newest replaces the one that is no longer
        needed."""
        if self.has_slots:
            return window
        return window - 1

    def refusal(self, request: PlanRequest) -> str | None:
        return self.split_group(request)

    def ranks_of_matrix(self, request: PlanRequest) -> int:
        """The number of ranks over which a matrix is split."""
        return self.tensor_parallel_size(request)

    def split_group(self, request: PlanRequest) -> str | None:
        """The reason why a quantization cannot store the pieces of the matrices, None if it can."""
        quantization, n = request.quantization, self.ranks_of_matrix(request)
        if quantization is None:
            return None
        for parameter, _ in parameter_kinds(request.shape, request.storage):
            if not quantization.applies(parameter):
                continue
            for piece in self.pieces(request.shape, n, 0, parameter):
                if reason := quantization.split_group(parameter, piece):
                    return reason
        return None

    def pieces(self, shape: ModelShape, n: int, rank: int, parameter: Parameter) -> Pieces:
        """The pieces of a parameter on one of `n` ranks."""
        return (parameter.shape,)

    def layout(self, request: PlanRequest, ends_only: bool) -> Layout:
        return cut_layout(request, self.pieces, ends_only, self.buffer_bytes(request))

    def buffer_bytes(self, request: PlanRequest) -> int:
        """Parameters that a device gathers, dequantizes or converts: for quantized weights that are dequantized, and
        for mixed precision, the largest matrix."""
        return widened_bytes(request) + narrowed_bytes(request, self.pieces, request.num_devices)

    def kv_heads(self, request: PlanRequest) -> int:
        return max(1, request.shape.cached_heads(self.kv_heads_only) // request.tensor_parallel_size)

    def unsliced_bytes(self, request: PlanRequest, first: int, end: int) -> int:
        """transformers keeps sliding windows as views, which hold all keys and values of a prompt until the next
        step."""
        if self.has_slots:
            return 0
        lost = sum(request.lost_tokens(window) for window in request.shape.windows[first:end])
        return request.batch_size * lost * kv_bytes_per_token(request) // request.shape.num_layers

    def activation_bytes(self, request: PlanRequest) -> int:
        """The prefill of one layer with its mask, plus a copy of one layer's keys and values, joined or expanded to the
        query heads; or these and the logits of the last tokens, also in fp32."""
        shape, e, n = request.shape, request.dtype_bytes, request.tensor_parallel_size
        rows = request.batch_size * request.prompt_tokens
        if self.prefill_tokens is not None:
            rows = min(rows, self.prefill_tokens)
        layer = layer_activation_bytes(request, rows, shape.cached_heads(self.kv_heads_only))
        logits = request.batch_size * (1 + request.guessed_tokens) * shape.vocab_size * (e + 4)
        mask = rows * request.context * (1 + e)
        again = 2 * request.batch_size * request.context * shape.num_attention_heads * shape.head_dim * e // n
        return max(layer + mask + again, again + logits)

    def overhead_bytes(self, request: PlanRequest) -> int:
        return driver_bytes(request)

    def load_host_bytes(self, request: PlanRequest) -> int | None:
        """Every process reads its own shards through small buffers: never more than the shards, plus on a CPU the
        weights that wait for packing."""
        of_process = LOAD_RING_BYTES
        if request.device.kind == "cpu":
            of_process += self.packing_bytes(request)
        if self.one_process:
            return of_process
        return min(request.devices, request.num_devices) * of_process

    def packing_bytes(self, request: PlanRequest) -> int:
        """The peak of temporaries while quantized weights are loaded.

        Whole matrices wait until there are UNPACKED_BYTES of them; for a quantized checkpoint it is the stored tensors
        and a copy of their words, and for torch's kernel two copies of the integers in four bytes.
        """
        quantization, n = request.quantization, self.ranks_of_matrix(request)
        if quantization is None:
            return 0
        chosen = [p for p in request.shape.parameters if quantization.applies(p)]
        pieces = [(p, piece) for p in chosen for piece in self.pieces(request.shape, n, 0, p)]
        if not quantization.kept:
            sizes = [request.dtype_bytes * prod(piece) for _, piece in pieces]
            return min(sum(sizes), UNPACKED_BYTES + max(sizes, default=0))
        if quantization.scales == 2 and not quantization.unpacks:
            return max((9 * prod(piece) for _, piece in pieces), default=0)
        return 2 * max((request.storage.nbytes(p, piece) for p, piece in pieces), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorParallelModulePlanner(ModulePlanner, ABC):
    """A module of which every layer is cut over all devices."""

    def tensor_parallel_size(self, request: PlanRequest) -> int:
        return request.num_devices

    def traffic(self, request: PlanRequest) -> Traffic:
        return tensor_parallel_traffic(request)
