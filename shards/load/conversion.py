"""Conversion of a checkpoint's names and layouts to those of the current transformers modules.

transformers renames tensors of older layouts while it loads them, and merges some: the matrices of a layer's experts
into one of three dimensions, gate and up projections into one. Here only names and positions are converted, so that a
rank still reads only its own bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

from shards.checkpoint.tensor_files import TensorEntry
from shards.errors import CheckpointError
from shards.load.slices import Target

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import torch
    from torch import nn

    from shards.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor that is one block, at `start` with `shape`, of a merged tensor; stacked ones have a leading
    dimension of 1."""

    entry: TensorEntry
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MergedEntry(TensorEntry):
    """A tensor that is stored in parts. File, offset and dtype are those of the first part."""

    parts: tuple[Part, ...]

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """The entries of the files that it consists of."""
        return tuple(part.entry for part in self.parts)


def note_conversions(model: nn.Module) -> None:
    """Store on a model how its checkpoint's tensors are renamed and merged; FSDP replaces the class that defines it."""
    model.conversions = get_model_conversion_mapping(model)


def converted(model: nn.Module, checkpoint: Checkpoint, expected: Iterable[str]) -> Checkpoint:
    """The same checkpoint with the `expected` names of the modules, and merged tensors as MergedEntry.

    Names that match none of them stay as they are, for `Checkpoint.verify` to report. CheckpointError if transformers
    makes a tensor from stored ones by anything but stacking and joining.
    """
    transforms: Sequence[Any] = getattr(model, "conversions", ())
    if not transforms:
        return checkpoint
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    renamings = [item for item in transforms if not isinstance(item, WeightConverter)]
    known, prefix = dict.fromkeys(expected, True), getattr(model, "base_model_prefix", "")
    tensors: dict[str, TensorEntry] = {}
    merged: dict[str, dict[str, list[TensorEntry]]] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if new not in known or new in tensors or (new == name and pattern is not None):
            tensors[name] = checkpoint.tensors[name]
        elif pattern is None:
            tensors[new] = replace(checkpoint.tensors[name], name=new)
        else:
            merged.setdefault(new, {}).setdefault(pattern, []).append(checkpoint.tensors[name])
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for name, found in merged.items():
        tensors[name] = _merged(name, by_pattern[next(iter(found))], found)
    return replace(checkpoint, tensors=tensors)


def _merged(name: str, converter: Any, found: Mapping[str, list[TensorEntry]]) -> MergedEntry:
    """The tensor that MergeModulelist (each pattern's tensors, stacked), Concatenate, or both in turn would make."""
    in_order = [found[pattern] for pattern in converter.source_patterns if pattern in found]
    stacked, axis = _layout(name, converter.operations)
    blocks = in_order
    if not stacked:
        blocks = [[entry] for entries in in_order for entry in entries]
    parts, at = [], 0
    for block in blocks:
        for number, entry in enumerate(block):
            shape, start = entry.shape, [0] * len(entry.shape)
            if stacked:
                shape, start = (1, *shape), [number, *start]
            start[axis] += at
            parts.append(Part(entry, tuple(start), shape))
        at += parts[-1].shape[axis]
    first = parts[0].entry
    ends = [[a + n for a, n in zip(part.start, part.shape, strict=True)] for part in parts]
    shape = tuple(map(max, zip(*ends, strict=False)))
    numel = sum(math.prod(part.shape) for part in parts)
    if numel != math.prod(shape) or len({len(block) for block in blocks}) != 1:
        raise CheckpointError(
            f"The {len(parts)} stored tensors of {name} do not fit together: they have {numel:,} values of "
            f"{math.prod(shape):,}.",
            "fetch the checkpoint again: some of its tensors are missing",
        )
    nbytes = sum(part.entry.nbytes for part in parts)
    return MergedEntry(name, first.file, first.dtype, shape, first.offset, nbytes, tuple(parts))


def _layout(name: str, operations: Sequence[Any]) -> tuple[bool, int]:
    """The layout of merged tensors: True if they are stacked, and the axis along which the results are joined."""
    kinds = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in operations]
    match kinds:
        case [("MergeModulelist", 0)]:
            return True, 0
        case [("MergeModulelist", 0), ("Concatenate", int(axis))] if axis > 0:
            return True, axis
        case [("Concatenate", int(axis))] if axis >= 0:
            return False, axis
    raise CheckpointError(
        f"{name} is stored in a layout from which transformers makes it by {', '.join(kind for kind, _ in kinds)}.",
        "an engine with loaders of its own, or load it with transformers 5 and save its state_dict() by module",
    )


def part_targets(entry: TensorEntry, start: tuple[int, ...], out: torch.Tensor) -> Iterator[Target]:
    """The reads for the block `out` that begins at `start`: for a merged tensor one for each part."""
    if not isinstance(entry, MergedEntry):
        yield Target(entry, start, out)
        return
    for part in entry.parts:
        low = [max(a, b) for a, b in zip(start, part.start, strict=True)]
        ends = zip(start, out.shape, part.start, part.shape, strict=True)
        sizes = [min(a + n, b + m) - first for (a, n, b, m), first in zip(ends, low, strict=True)]
        if min(sizes) <= 0:
            continue
        view = out
        for dim, (first, size) in enumerate(zip(low, sizes, strict=True)):
            view = view.narrow(dim, first - start[dim], size)
        inside = [a - b for a, b in zip(low, part.start, strict=True)]
        if len(part.shape) > len(part.entry.shape):  # stacked
            inside, view = inside[1:], view[0]
        yield Target(part.entry, tuple(inside), view)
