"""Bytes of a model on each device, from the pieces of each parameter that an engine's code leaves on a rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from math import ceil

from shards.model.quantization import Storage
from shards.model.shape import ModelShape, Parameter

NUMBERS = Storage()

Pieces = tuple[tuple[int, ...], ...]
"""The shapes of a rank's pieces of one parameter."""

Cutter = Callable[[ModelShape, int, int, Parameter], Pieces]
"""Model, number of ranks, rank, parameter -> the rank's pieces."""

Factors = Mapping[tuple[str, str], tuple[int, ...]]
"""The shapes of the factors A [r, inputs] and B [outputs, r] of an adapter, by the name of the module and of the
factor."""


def cut_up(
    shape: ModelShape, cut: Cutter, n: int, storage: Storage = NUMBERS, ranks: Iterable[int] | None = None
) -> tuple[int, ...]:
    """Bytes of parameters on each of `n` ranks, or on some of them; without `storage` the number of values."""
    kinds = parameter_kinds(shape, storage)
    if ranks is None:
        ranks = range(n)
    return tuple(
        sum(count * sum(storage.nbytes(p, piece) for piece in cut(shape, n, rank, p)) for p, count in kinds)
        for rank in ranks
    )


def whole_bytes(shape: ModelShape, storage: Storage) -> int:
    """Bytes of all parameters, each once."""
    return sum(count * storage.nbytes(p) for p, count in parameter_kinds(shape, storage))


@lru_cache(maxsize=256)
def parameter_kinds(shape: ModelShape, storage: Storage) -> tuple[tuple[Parameter, int], ...]:
    """One parameter of each kind that is cut and stored alike, and the number of parameters of that kind."""
    first: dict[tuple[object, ...], Parameter] = {}
    keys = [(p.shape, p.cut, ".mlp." in p.name, storage.kind(p)) for p in shape.parameters]
    for key, parameter in zip(keys, shape.parameters, strict=True):
        first.setdefault(key, parameter)
    return tuple((first[key], count) for key, count in Counter(keys).items())


def even_piece(parameter: Parameter, n: int) -> Pieces:
    """The n-th part of a matrix: of its columns if it is row-parallel (cut "row"), else of its rows."""
    rows, *columns = parameter.shape
    if parameter.cut == "row":
        return ((rows, columns[0] // n),)
    return ((rows // n, *columns),)


def row_chunk(parameter: Parameter, n: int, rank: int) -> Pieces:
    """Dim 0 cut as by torch.chunk: ceil(rows / N) each, the last ranks get what is left, or nothing."""
    rows, *columns = parameter.shape or (1,)
    chunk = ceil(rows / n)
    return ((max(0, min(chunk, rows - rank * chunk)), *columns),)


def spread(shape: ModelShape, n: int, storage: Storage = NUMBERS) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes (or values) of parameters, and layers, on each of `n` devices, as accelerate distributes them in order.

    Each device but the last is filled up to its share of the model plus 1.25 layers; the first one reserves room for
    the largest module. Source: get_balanced_memory and infer_auto_device_map in accelerate/utils/modeling.py.
    """
    units = _units(shape, storage)
    layer = max((size for size, is_layer in units if is_layer), default=0)
    room = sum(size for size, _ in units) // n + 5 * layer // 4
    rooms = [room - max(size for size, _ in units), *[room] * (n - 1)]
    filled, layers, device = [0] * n, [0] * n, 0
    for size, is_layer in units:
        while device < n - 1 and filled[device] + size > rooms[device]:
            device += 1
        filled[device] += size
        layers[device] += is_layer
    return tuple(filled), tuple(layers)


@lru_cache(maxsize=256)
def _units(shape: ModelShape, storage: Storage) -> tuple[tuple[int, bool], ...]:
    """The indivisible units of a device map, in order: (bytes, True for a layer) of single parameters outside the
    layers and of whole layers."""
    units = []
    for layer_or_name, members in groupby(shape.parameters, lambda p: p.name if p.layer is None else p.layer):
        units.append((sum(map(storage.nbytes, members)), isinstance(layer_or_name, int)))
    return tuple(units)


def spread_evenly(count: int, total: int) -> frozenset[int]:
    """The numbers of `count` out of `total` layers, evenly spaced, including the last layer."""
    return frozenset(number for number in range(total) if (number + 1) * count // total > number * count // total)


def factor_parameters(shape: ModelShape, adapters: Sequence[Factors]) -> tuple[Parameter, ...]:
    """The factors of adapters as parameters, each cut like the matrix that it adapts."""
    cuts = {p.name.removesuffix(".weight"): p.cut for p in shape.parameters if len(p.shape) == 2}
    added = []
    for (module, factor), sizes in (item for adapter in adapters for item in adapter.items()):
        cut = cuts.get(module, "whole")
        is_cut = (factor == "A") == (cut == "row")
        added.append(Parameter(f"{module}.weight_lora_{factor.lower()}", sizes, cut if is_cut else "whole"))
    return tuple(added)
