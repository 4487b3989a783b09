"""Load a checkpoint into a model on the meta device: every rank holds its own shards, and never anything else."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from shards.checkpoint.checkpoint import Checkpoint, is_derived
from shards.checkpoint.open_files import OpenFiles
from shards.errors import CheckpointError
from shards.load.blocks import local_block, local_bytes, stored_tensors, whole
from shards.load.conversion import MergedEntry, converted, part_targets
from shards.load.meta import materialize
from shards.load.quantized.quantizers import packed_layers, part_bytes, part_of, whole_shape
from shards.load.quantized.stored import read_stored, with_stored
from shards.load.slices import PIECE_BYTES, TORCH_DTYPES, Target, map_target, read_targets
from shards.load.torch_files import read_torch_file
from shards.model.quantization import UNPACKED_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import nn

    from shards.checkpoint.tensor_files import TensorEntry
    from shards.load.adapter import Adapter
    from shards.load.slices import Progress


@dataclass(frozen=True, slots=True)
class LoadStats:
    """`bytes_read` by this rank from files, `local_bytes` of its parameters and buffers.

    `read_s` and `quantize_s` are the parts of `seconds` for reading (to the CPU or the device) and for packing.
    `mapped_files` are the files that some of its parameters are mapped from.
    """

    bytes_read: int
    local_bytes: int
    seconds: float
    read_s: float = 0.0
    quantize_s: float = 0.0
    mapped_files: frozenset[Path] = frozenset()


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    device: torch.device | str,
    progress: Progress = lambda done, total: None,
    adapter: Adapter | None = None,
) -> LoadStats:
    """Fill every parameter and buffer of `model`, plain or DTensor, with this rank's part of `checkpoint`.

    Tensors on meta are allocated on `device`; tied ones stay tied; buffers that are not in the checkpoint are computed.
    Only the bytes of the local shards are read. On a CPU, a local part that is stored as the model needs it is mapped
    from the file instead of copied. Names and shapes are checked before anything is allocated or read. An `adapter` is
    merged into its matrices.
    """
    began = time.perf_counter()
    if checkpoint.legacy and not checkpoint.tensors:
        checkpoint = Checkpoint.open(checkpoint.folder, read_torch_file)
    matched = match_tensors(model, checkpoint)
    adapted: set[str] = set()
    if adapter is not None:
        adapted = set(adapter.factors)
        adapter.check({whole(name, tensor)[0]: whole(name, tensor)[1] for name, tensor in stored_tensors(model)})
    materialize(model, device)
    packed = packed_layers(model)
    tensors = {name: tensor for name, tensor in stored_tensors(model) if whole(name, tensor)[0] not in packed}
    with OpenFiles(checkpoint) as files:
        targets = [
            target
            for name, tensor in tensors.items()
            for target in _targets(files, matched[name][0], tensor, may_map=whole(name, tensor)[0] not in adapted)
        ]
        later = sum(map(part_bytes, packed.values()))
        read_began = time.perf_counter()
        bytes_read = read_targets(files, targets, lambda done, total: progress(done, total + later))
        bytes_read += sum(_check_copies(files, matched[name], tensor) for name, tensor in tensors.items())
        if adapter is not None:
            for name, tensor in tensors.items():
                adapter.add(whole(name, tensor)[0], *local_block(tensor))
        entries = {name: matched[name][0] for name in packed}
        plain = bytes_read
        done_of = lambda done: progress(plain + done, plain + later)  # noqa: E731
        if any(layer.quantizer.form for layer in packed.values()):
            packed_read, quantize_s = read_stored(files, entries, packed, done_of)
        else:
            packed_read, quantize_s = _read_packed(files, entries, packed, adapter, done_of)
        read_s = time.perf_counter() - read_began - quantize_s
    mapped = frozenset(target.entry.file for target in targets if target.mapped)
    seconds = time.perf_counter() - began
    return LoadStats(plain + packed_read, local_bytes(model), seconds, read_s, quantize_s, mapped)


def match_tensors(model: nn.Module, checkpoint: Checkpoint) -> dict[str, tuple[TensorEntry, ...]]:
    """The stored entries of each parameter and persistent buffer, several for tied ones, after all checks."""
    tensors, packed = dict(stored_tensors(model)), packed_layers(model)
    first = {id(tensor): name for name, tensor in tensors.items()}
    tied: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for source in {first.get(id(parameter), name), whole(name, parameter)[0]} - {name}:
            tied.setdefault(source, []).append(name)
            tied.setdefault(name, []).append(source)
    shapes = {name: whole(name, tensor)[1] for name, tensor in tensors.items()}
    shapes |= {name: whole_shape(layer) for name, layer in packed.items()}
    checkpoint = converted(model, with_stored(checkpoint, packed), {*shapes, *tied})
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()

    def is_ignored(name: str) -> bool:
        return is_derived(name) or any(re.search(pattern, name) for pattern in patterns)

    matched = checkpoint.verify(shapes, tied, getattr(model, "base_model_prefix", ""), is_ignored)
    for name, (entry, *_) in matched.items():
        dtype = packed[name].quantizer.dtype if name in packed else tensors[name].dtype
        for stored in entry.stored:
            known = TORCH_DTYPES[stored.dtype]
            is_plain = known.is_floating_point and known.itemsize > 1
            if known != dtype and not (is_plain and dtype.is_floating_point):
                raise CheckpointError(
                    f"{stored.file} holds {stored.name} as {stored.dtype}, the model has {dtype}: a quantized "
                    "checkpoint?",
                    "use the unquantized checkpoint, or an engine that reads this quantization",
                )
    return matched


def _read_packed(
    files: OpenFiles,
    entries: Mapping[str, TensorEntry],
    layers: dict[str, nn.Module],
    adapter: Adapter | None,
    progress: Callable[[int], None],
) -> tuple[int, float]:
    """Read this rank's parts of the layers' matrices, a few at a time, and pack them with their quantizers.

    Returns the bytes read, and the seconds spent in the quantizers.
    """
    bytes_read = done = 0
    quantize_s = 0.0
    waiting: list[tuple[str, tuple[int, ...], torch.Tensor]] = []
    targets: list[Target] = []
    last = next(reversed(layers), None)
    for name, layer in layers.items():
        start, values = part_of(layer)
        entry = entries[name]
        targets += part_targets(entry, start, values)
        waiting.append((name, start, values))
        if name != last and sum(tensor.nbytes for *_, tensor in waiting) < UNPACKED_BYTES:
            continue
        bytes_read += read_targets(files, targets)
        began = time.perf_counter()
        for name_read, begin, values_read in waiting:
            if adapter is not None:
                adapter.add(name_read, begin, values_read)
            layers[name_read].quantizer.pack(layers[name_read], values_read)
            done += values_read.nbytes
        if values.device.type == "cuda":
            torch.cuda.synchronize(values.device)
        quantize_s += time.perf_counter() - began
        waiting, targets = [], []
        progress(done)
    return bytes_read, quantize_s


def _targets(files: OpenFiles, entry: TensorEntry, tensor: torch.Tensor, may_map: bool) -> list[Target]:
    """The reads for a tensor. If `may_map` and the file has its bytes as needed, the tensor is mapped to the file."""
    start, local = local_block(tensor)
    if isinstance(entry, MergedEntry):
        return list(part_targets(entry, start, local))
    target = Target(entry, start, local)
    is_part = not isinstance(tensor, DTensor) and local.untyped_storage().nbytes() > local.nbytes
    if is_part or not may_map or (mapped := map_target(files, target)) is None:
        return [target]
    if isinstance(tensor, DTensor):
        tensor._local_tensor = mapped.out
    else:
        tensor.data = mapped.out
    return [mapped]


def _check_copies(files: OpenFiles, entries: tuple[TensorEntry, ...], tensor: torch.Tensor) -> int:
    """Check that a tied tensor stored under two names has the same values under both, by comparing its first rows.

    Returns the bytes read.
    """
    start, local = local_block(tensor)
    bytes_read = 0
    for other in entries[1:]:
        if (other.file, other.offset) == (entries[0].file, entries[0].offset) or not local.numel():
            continue
        rows = local[: max(1, PIECE_BYTES // local[0].nbytes)]
        copy = torch.empty_like(rows)
        bytes_read += read_targets(files, [Target(other, start, copy)])
        if not torch.equal(copy, rows):
            raise CheckpointError(
                f"The config ties {entries[0].name} to {other.name}, but {other.file} holds other values for it.",
                "set tie_word_embeddings to false in config.json",
            )
    return bytes_read
