"""How much of a model each device gets, in numbers: exactly what the engines' own code leaves on a rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import groupby
from math import ceil, prod

from shards.model import Cut, ModelShape, Parameter

_VOCABULARY_PADDING = 64  # vllm/model_executor/layers/vocab_parallel_embedding.py
_DEEPSPEED_GRAIN = 64  # deepspeed/module_inject/tp_shard.py, tp_grain_size


def cut_up(shape: ModelShape, engine: str, n: int) -> tuple[int, ...]:
    """Parameters, counted in numbers, on each of `n` ranks under fsdp, deepspeed or vllm."""
    cut = _CUTTERS[engine]
    kinds = Counter((p.shape, p.cut, ".mlp." in p.name) for p in shape.parameters)
    return tuple(sum(count * cut(shape, n, rank, *kind) for kind, count in kinds.items()) for rank in range(n))


def spread(shape: ModelShape, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Parameters, and layers, on each of `n` devices that hold whole layers in order, as accelerate balances them.

    Each but the last is filled up to its part of the model and 1.25 layers; the first keeps room for the largest
    module. Source: get_balanced_memory and infer_auto_device_map in accelerate/utils/modeling.py.
    """
    units = [(sum(p.numel for p in members), members[0].layer is not None) for members in _in_order(shape)]
    layer = max((size for size, is_layer in units if is_layer), default=0)
    room = shape.num_parameters // n + 5 * layer // 4
    rooms = [room - max(size for size, _ in units), *[room] * (n - 1)]
    numels, layers, device = [0] * n, [0] * n, 0
    for size, is_layer in units:
        while device < n - 1 and numels[device] + size > rooms[device]:
            device += 1
        numels[device] += size
        layers[device] += is_layer
    return tuple(numels), tuple(layers)


def _in_order(shape: ModelShape) -> list[tuple[Parameter, ...]]:
    """What device_map does not divide: single parameters outside the layers, and whole layers."""
    units = groupby(shape.parameters, lambda parameter: parameter.name if parameter.layer is None else parameter.layer)
    return [tuple(members) for _, members in units]


def _fsdp_numel(model: ModelShape, n: int, rank: int, shape: tuple[int, ...], cut: Cut, mlp: bool) -> int:
    """FSDP2 cuts dim 0 as torch.chunk does: ceil(rows / N) each, the last ranks what is left, or nothing."""
    rows = shape[0] if shape else 1
    chunk = ceil(rows / n)
    return max(0, min(chunk, rows - rank * chunk)) * prod(shape[1:])


def _vllm_numel(model: ModelShape, n: int, rank: int, shape: tuple[int, ...], cut: Cut, mlp: bool) -> int:
    """vLLM cuts evenly, pads the vocabulary to 64 rows, and repeats kv heads where there are more ranks than those."""
    inputs, kv_heads = prod(shape[1:]), max(1, model.num_key_value_heads // n)
    if cut in ("embedding", "head"):
        return padded_vocabulary(model.vocab_size) // n * inputs
    if cut == "key_value":
        return kv_heads * model.head_dim * inputs
    if cut == "query_key_value":
        return (model.num_attention_heads // n + 2 * kv_heads) * model.head_dim * inputs
    return prod(shape) if cut == "whole" else prod(shape) // n


def _deepspeed_numel(model: ModelShape, n: int, rank: int, shape: tuple[int, ...], cut: Cut, mlp: bool) -> int:
    """AutoTP cuts attention by heads, MLP and head by grains of 64; it keeps the embedding whole, and for a tied model
    makes a head of its own."""
    if cut == "whole" or n == 1:
        return prod(shape)
    if cut in ("embedding", "head"):
        part = shape[0] * _grained(shape[1], n, rank)
        return part if cut == "head" else prod(shape) + (part if model.tied else 0)
    if not mlp:
        return prod(shape) // n
    if cut == "row":
        return shape[0] * _grained(shape[1], n, rank)
    return _grained(shape[0], n, rank) * prod(shape[1:])


_CUTTERS: dict[str, Callable[[ModelShape, int, int, tuple[int, ...], Cut, bool], int]] = {
    "fsdp": _fsdp_numel,
    "vllm": _vllm_numel,
    "deepspeed": _deepspeed_numel,
}


def _grained(total: int, n: int, rank: int) -> int:
    if total < _DEEPSPEED_GRAIN:
        return total // n + (rank < total % n)
    grains, rest = divmod(total, _DEEPSPEED_GRAIN)
    return (grains // n + (rank < grains % n)) * _DEEPSPEED_GRAIN + (rest if rank == n - 1 else 0)


def padded_vocabulary(rows: int) -> int:
    """The rows of a vocabulary as vLLM pads them."""
    return ceil(rows / _VOCABULARY_PADDING) * _VOCABULARY_PADDING
