"""Where the tensors of one checkpoint file lie: read from its header, checked, without torch."""

from __future__ import annotations

import collections
import json
import math
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from shards.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

AGAIN = "the copy is damaged or incomplete: fetch this file again"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_PICKLE_BYTES = 100_000_000

DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

STORAGE_DTYPES: dict[str, str] = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "FloatStorage": "F32",
    "DoubleStorage": "F64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor is the `nbytes` bytes from byte `offset` of `file`: row-major, `dtype` in the words of safetensors."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names and how many there are besides."""
    listed = sorted(names)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key occurs twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = collections.Counter(key for key, _ in pairs)
        if repeated := [key for key, count in keys.items() if count > 1]:
            raise CheckpointError(f"{what} names {some(repeated)} twice.", AGAIN)
        return dict(pairs)

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({error}).", AGAIN) from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{what} is a JSON {type(parsed).__name__}, not an object.", AGAIN)
    return parsed


def read_safetensors(path: Path) -> list[TensorEntry]:
    """The tensors of a .safetensors file, by its header alone; the data must fill the file exactly, without overlap."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = _header_length(path, stream.read(64), size)
        stream.seek(8)
        header = parse_json(stream.read(length), f"The header of {path}")
    header.pop("__metadata__", None)
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
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is no safetensors file: its header would be {length:,} bytes long (limit {MAX_HEADER_BYTES:,}).",
            AGAIN,
        )
    if 8 + length > size:
        raise CheckpointError(f"{path} is truncated: a header of {length:,} bytes in a file of {size:,}.", AGAIN)
    return length


def _safetensors_entry(path: Path, name: str, fields: Any, data: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        sound = all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)) and begin <= end
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path} describes {name} in a way that makes no sense: {str(fields)[:120]}.", AGAIN)
    entry = TensorEntry(name, path, dtype, shape, data + begin, end - begin)
    check_size(entry)
    return entry


def check_size(entry: TensorEntry) -> None:
    """The bytes of an entry are those of its shape and dtype."""
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
    """`entries`, in order of offset, fill the file from byte `data` to `size`."""
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
            f"{path} is truncated: {size:,} of {end:,} bytes are there, {some(lost)} not in full.", AGAIN
        )
    if size > end:
        raise CheckpointError(f"{path} has {size - end:,} bytes more than its header speaks of.", AGAIN)


def read_torch_zip(path: Path) -> list[TensorEntry]:
    """The tensors of a state dict that torch.save wrote (torch >= 1.6), by its index alone.

    The pickle in it is read by an unpickler that knows tensors and nothing else, so that no code of the file runs.
    Tied tensors share their bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
            return _torch_entries(path, archive, stream)
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path} is truncated, or was written by torch older than 1.6.",
            "fetch it again, or load it with torch and save it as safetensors",
        ) from None
    except (pickle.UnpicklingError, KeyError, IndexError, TypeError, ValueError, EOFError, AttributeError) as error:
        raise CheckpointError(f"{path} is no state dict of tensors ({error}).", "save it as safetensors") from None


def _torch_entries(path: Path, archive: zipfile.ZipFile, stream: BinaryIO) -> list[TensorEntry]:
    records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if records["data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"an index of {records['data.pkl'].file_size:,} bytes")
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        raise ValueError("its byte order is not little-endian")
    with archive.open(records["data.pkl"]) as pickled:
        state = _StateDictUnpickler(pickled).load()
    entries = []
    for name, value in state.items():
        if not isinstance(value, _PickledTensor):
            raise ValueError(f"{name} is a {type(value).__name__}")
        entries.append(_torch_entry(path, name, value, records[f"data/{value.storage.key}"], stream))
    return entries


def _torch_entry(
    path: Path, name: str, tensor: _PickledTensor, record: zipfile.ZipInfo, stream: BinaryIO
) -> TensorEntry:
    itemsize = DTYPE_BYTES[tensor.storage.dtype]
    nbytes = math.prod(tensor.shape) * itemsize
    start = tensor.offset * itemsize
    if record.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    if start + nbytes > record.file_size:
        raise ValueError(f"{name} takes {start + nbytes:,} bytes of a storage of {record.file_size:,}")
    if not tensor.contiguous:
        raise ValueError(f"{name} is not stored row by row")
    stream.seek(record.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", stream.read(4))
    data = record.header_offset + 30 + name_length + extra_length
    return TensorEntry(name, path, tensor.storage.dtype, tensor.shape, data + start, nbytes)


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str


@dataclass(frozen=True, slots=True)
class _PickledTensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and stride != step:
                return False
            step *= size
        return True


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> _PickledTensor:
    return _PickledTensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor: _PickledTensor, *_: Any) -> _PickledTensor:
    return tensor


class _StateDictUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and re.fullmatch(r"\w+Storage", name):
            return STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        return _Storage(dtype, str(key))
