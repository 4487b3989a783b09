"""Checks of a pytorch_model.bin, a zip archive, that are possible without torch."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

from shards.errors import CheckpointError
from shards.untrusted_files import MAX_BYTES, open_regular

if TYPE_CHECKING:
    from pathlib import Path

    from shards.checkpoint.tensor_files import TensorEntry

AS_SAFETENSORS = "save it as safetensors: model.save_pretrained(FOLDER)"


class _BoundedFile(io.FileIO):
    """A file that limits the bytes of each read, whatever length its zip directory claims to have."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = MAX_BYTES
        return super().read(min(size, MAX_BYTES))


def check_archive(path: Path) -> list[TensorEntry]:
    """Check a .bin file; CheckpointError if it is truncated, compressed, encrypted or not an archive.

    Returns no tensors: only torch can list them.
    """
    try:
        with open_regular(path) as stream, zipfile.ZipFile(_BoundedFile(stream.fileno(), closefd=False)) as archive:
            records = archive.infolist()
            packed = [r for r in records if r.compress_type != zipfile.ZIP_STORED or r.flag_bits & 1]
            orders = [r for r in records if r.filename.endswith("/byteorder")]
            if packed:
                raise no_state_dict(path, f"{packed[0].filename} is compressed or encrypted")
            if any(order.file_size != len(b"little") or archive.read(order) != b"little" for order in orders):
                raise no_state_dict(path, "its byte order is not little-endian")
            if big := [r for r in records if r.filename.endswith("/data.pkl") and r.file_size > MAX_BYTES]:
                raise no_state_dict(path, f"an index of {big[0].file_size:,} bytes")
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, RuntimeError):
        raise CheckpointError(
            f"{path} is truncated, or was written by torch older than 1.6.",
            "fetch it again, or load it with torch and save it as safetensors",
        ) from None
    return []


def no_state_dict(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a state dict of tensors ({reason.rstrip('.')}).", AS_SAFETENSORS)
