"""How much of a model each device gets: exactly what the engines' own code leaves on a rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import groupby
from math import ceil

from shards.model.quantization import Storage
from shards.model.shape import ModelShape, Parameter

_VOCABULARY_PADDING = 64  # vllm/model_executor/layers/vocab_parallel_embedding.py
_DEEPSPEED_GRAIN = 64  # deepspeed/module_inject/tp_shard.py, tp_grain_size
CUT_FAMILIES = ("falcon", "llama", "mistral", "qwen2", "qwen3")


Pieces = tuple[tuple[int, ...], ...]
NUMBERS = Storage()


def cut_up(
    shape: ModelShape, engine: str, n: int, storage: Storage = NUMBERS, ranks: Iterable[int] | None = None
) -> tuple[int, ...]:
    """Bytes of parameters on each of `n` ranks (or on some of them) under an engine that cuts; with no `storage`
    counted in numbers."""
    cut = _CUTTERS[engine]
    kinds = _kinds(shape, storage)
    return tuple(
        sum(count * sum(storage.nbytes(p, piece) for piece in cut(shape, n, rank, p)) for p, count in kinds)
        for rank in (range(n) if ranks is None else ranks)
    )


def misfit(shape: ModelShape, n: int, storage: Storage) -> str | None:
    """Why vLLM's quantized layers cannot be cut for `n` ranks, None if they can."""
    if storage.quantization is None:
        return None
    quantized = [p for p, _ in _kinds(shape, storage) if storage.quantization.applies(p)]
    found = (storage.quantization.misfit(p, piece) for p in quantized for piece in _vllm_pieces(shape, n, 0, p))
    return next((why for why in found if why), None)


def uncuttable(shape: ModelShape, n: int) -> str | None:
    """Why our own tensor-parallel cut cannot be made for `n` ranks, None if it can."""
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
    uneven = next((f"{count} {what}" for what, count in counts.items() if count % n), None)
    if uneven is None and (n - 1) * ceil(shape.vocab_size / n) >= shape.vocab_size:
        return f"{shape.vocab_size} rows of the vocabulary leave one of {n} devices without any."
    return f"{uneven} cannot be divided by {n} devices, as tensor_parallel needs." if uneven else None


def whole_bytes(shape: ModelShape, storage: Storage) -> int:
    """Bytes of all parameters, each once."""
    return sum(count * storage.nbytes(p) for p, count in _kinds(shape, storage))


@lru_cache(maxsize=16)
def _kinds(shape: ModelShape, storage: Storage) -> tuple[tuple[Parameter, int], ...]:
    """One parameter of each kind that is cut and stored alike, and how many there are."""
    first: dict[tuple[object, ...], Parameter] = {}
    keys = [(p.shape, p.cut, ".mlp." in p.name, storage.kind(p)) for p in shape.parameters]
    for key, parameter in zip(keys, shape.parameters, strict=True):
        first.setdefault(key, parameter)
    return tuple((first[key], count) for key, count in Counter(keys).items())


def spread(shape: ModelShape, n: int, storage: Storage = NUMBERS) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes (or numbers) of parameters, and layers, on each of `n` devices, as accelerate balances them in order.

    Each but the last is filled up to its part of the model and 1.25 layers; the first keeps room for the largest
    module. Source: get_balanced_memory and infer_auto_device_map in accelerate/utils/modeling.py.
    """
    units = [(sum(map(storage.nbytes, members)), members[0].layer is not None) for members in _in_order(shape)]
    layer = max((size for size, is_layer in units if is_layer), default=0)
    room = sum(size for size, _ in units) // n + 5 * layer // 4
    rooms = [room - max(size for size, _ in units), *[room] * (n - 1)]
    held, layers, device = [0] * n, [0] * n, 0
    for size, is_layer in units:
        while device < n - 1 and held[device] + size > rooms[device]:
            device += 1
        held[device] += size
        layers[device] += is_layer
    return tuple(held), tuple(layers)


def _in_order(shape: ModelShape) -> list[tuple[Parameter, ...]]:
    """What device_map does not divide: single parameters outside the layers, and whole layers."""
    units = groupby(shape.parameters, lambda parameter: parameter.name if parameter.layer is None else parameter.layer)
    return [tuple(members) for _, members in units]


def _fsdp_pieces(model: ModelShape, n: int, rank: int, parameter: Parameter) -> Pieces:
    """FSDP2 cuts dim 0 as torch.chunk does: ceil(rows / N) each, the last ranks what is left, or nothing."""
    rows = parameter.shape[0] if parameter.shape else 1
    chunk = ceil(rows / n)
    return ((max(0, min(chunk, rows - rank * chunk)), *parameter.shape[1:]),)


def _vllm_pieces(model: ModelShape, n: int, rank: int, parameter: Parameter) -> Pieces:
    """vLLM cuts evenly, pads the vocabulary to 64 rows, and repeats kv heads where there are more ranks than those."""
    shape, kv_heads = parameter.shape, max(1, model.num_key_value_heads // n)
    if parameter.cut == "whole":
        return (shape,)
    if parameter.cut == "row":
        return ((*shape[:-1], shape[-1] // n),)
    rows = {
        "embedding": padded_vocabulary(model.vocab_size) // n,
        "head": padded_vocabulary(model.vocab_size) // n,
        "key_value": kv_heads * model.head_dim,
        "query_key_value": (model.num_attention_heads // n + 2 * kv_heads) * model.head_dim,
        "column": shape[0] // n,
    }
    return ((rows[parameter.cut], *shape[1:]),)


def _deepspeed_pieces(model: ModelShape, n: int, rank: int, parameter: Parameter) -> Pieces:
    """AutoTP cuts attention by heads, MLP and head by grains of 64; it keeps the embedding whole, and for a tied model
    makes a head of its own."""
    shape, cut = parameter.shape, parameter.cut
    if cut == "whole" or n == 1:
        return (shape,)
    if cut in ("embedding", "head"):
        part = (shape[0], _grained(shape[1], n, rank))
        return (part,) if cut == "head" else (shape, part) if model.tied else (shape,)
    if ".mlp." not in parameter.name:
        return ((shape[0], shape[1] // n),) if cut == "row" else ((shape[0] // n, *shape[1:]),)
    if cut == "row":
        return ((shape[0], _grained(shape[1], n, rank)),)
    return ((_grained(shape[0], n, rank), *shape[1:]),)


def _tensor_parallel_pieces(model: ModelShape, n: int, rank: int, parameter: Parameter) -> Pieces:
    """Our own cut: heads, columns and rows evenly, the vocabulary in chunks of ceil(rows / N)."""
    shape, cut = parameter.shape, parameter.cut
    if cut == "whole":
        return (shape,)
    if cut in ("embedding", "head"):
        return _fsdp_pieces(model, n, rank, parameter)
    return ((shape[0], shape[1] // n),) if cut == "row" else ((shape[0] // n, *shape[1:]),)


_CUTTERS: dict[str, Callable[[ModelShape, int, int, Parameter], Pieces]] = {
    "fsdp": _fsdp_pieces,
    "vllm": _vllm_pieces,
    "deepspeed": _deepspeed_pieces,
    "tensor_parallel": _tensor_parallel_pieces,
}


def _grained(total: int, n: int, rank: int) -> int:
    if total < _DEEPSPEED_GRAIN:
        return total // n + (rank < total % n)
    grains, rest = divmod(total, _DEEPSPEED_GRAIN)
    return (grains // n + (rank < grains % n)) * _DEEPSPEED_GRAIN + (rest if rank == n - 1 else 0)


def padded_vocabulary(rows: int) -> int:
    """The rows of a vocabulary as vLLM pads them."""
    return ceil(rows / _VOCABULARY_PADDING) * _VOCABULARY_PADDING
