"""Where the tensors of a pytorch_model.bin lie: read without torch, and without running what is pickled in it."""

from __future__ import annotations

import collections
import math
import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from shards.checkpoint.tensor_files import DTYPE_BYTES, TensorEntry, no_readahead
from shards.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

MAX_PICKLE_BYTES = 100_000_000

STORAGE_DTYPES: dict[str, str] = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "FloatStorage": "F32",
    "DoubleStorage": "F64",
}  # fmt: skip


def read_torch_zip(path: Path) -> list[TensorEntry]:
    """The tensors of a state dict that torch.save wrote (torch >= 1.6), by its index alone.

    The pickle in it is read by an unpickler that knows tensors and nothing else, so that no code of the file runs.
    Tied tensors share their bytes.
    """
    try:
        with path.open("rb") as stream:
            no_readahead(stream.fileno())
            archive = zipfile.ZipFile(stream)
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
