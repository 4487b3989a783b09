"""The tensors of one checkpoint file: read from its header, checked, without torch."""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shards.errors import CheckpointError
from shards.untrusted_files import MAX_BYTES, listed, open_regular, parse_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shards.untrusted_files import JsonObject

AGAIN = "the copy is damaged or incomplete: fetch this file again"
MAX_DIMENSIONS = 64  # torch's limit

DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A stored tensor: `nbytes` bytes from byte `offset` of `file`, row-major, with `dtype` as safetensors names it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        """The entries in files that the tensor consists of."""
        return (self,)


def json_object(text: bytes, name: str) -> JsonObject:
    """A JSON object in which no key occurs twice."""
    value = parse_json(text, name, CheckpointError, AGAIN, unique=True)
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is a JSON {type(value).__name__}, not an object.", AGAIN)
    return value


def no_readahead(descriptor: int) -> None:
    """Turn off readahead for a file: the kernel would read megabytes after a header, or another rank's rows."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def read_safetensors(path: Path) -> list[TensorEntry]:
    """The tensors of a .safetensors file, by its header alone; the data must fill the file exactly, without overlap.

    The safetensors library is not used: it does not tell where a tensor's bytes are, and needs numpy or torch.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        no_readahead(stream.fileno())
        length = _header_length(path, stream.read(64), size)
        stream.seek(8)
        header = json_object(stream.read(length), f"The header of {path}")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise CheckpointError(f"The header of {path} has __metadata__ that are no texts by name.", AGAIN)
    entries = [_safetensors_entry(path, name, fields, 8 + length) for name, fields in header.items()]
    _check_layout(path, sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)), 8 + length, size)
    return entries


def _header_length(path: Path, head: bytes, size: int) -> int:
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer of {size} bytes, not the file itself.", "run `git lfs pull`"
        )
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors header.", AGAIN)
    length: int = struct.unpack("<Q", head[:8])[0]
    if length > MAX_BYTES:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header would be {length:,} bytes long (limit {MAX_BYTES:,}).",
            AGAIN,
        )
    if 8 + length > size:
        raise CheckpointError(f"{path} is truncated: a header of {length:,} bytes in a file of {size:,}.", AGAIN)
    return length


def _safetensors_entry(path: Path, name: str, fields: Any, data: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        sound = isinstance(dtype, str) and len(shape) <= MAX_DIMENSIONS and begin <= end
        sound = sound and all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path} describes {name} in a way that makes no sense: {str(fields)[:120]}.", AGAIN)
    entry = TensorEntry(name, path, dtype, shape, data + begin, end - begin)
    check_size(entry)
    return entry


def check_size(entry: TensorEntry) -> None:
    """CheckpointError if an entry has more or fewer bytes than its shape and dtype need."""
    if entry.dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{entry.file} holds {entry.name} as {entry.dtype}, which is not supported.",
            f"convert the checkpoint to one of {', '.join(DTYPE_BYTES)}",
        )
    wanted = math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]
    if wanted != entry.nbytes:
        raise CheckpointError(
            f"{entry.file} gives {entry.name} {entry.nbytes:,} bytes, but {entry.dtype} {list(entry.shape)} "
            f"takes {wanted:,}.",
            AGAIN,
        )


def _check_layout(path: Path, entries: Sequence[TensorEntry], data: int, size: int) -> None:
    """CheckpointError unless `entries`, in order of offset, fill the file exactly from byte `data` to `size`."""
    end, previous = data, "the header"
    for entry in entries:
        if entry.offset < end:
            raise CheckpointError(f"{path}: {entry.name} overlaps {previous} by {end - entry.offset:,} bytes.", AGAIN)
        if entry.offset > end:
            raise CheckpointError(
                f"{path}: {entry.offset - end:,} bytes before {entry.name} belong to no tensor.", AGAIN
            )
        end, previous = entry.offset + entry.nbytes, entry.name
    if size < end:
        lost = [entry.name for entry in entries if entry.offset + entry.nbytes > size]
        raise CheckpointError(
            f"{path} is truncated: {size:,} of {end:,} bytes are there, {listed(lost)} not in full.", AGAIN
        )
    if size > end:
        raise CheckpointError(f"{path} has {size - end:,} bytes more than its header speaks of.", AGAIN)
