"""Blocks of checkpoint tensors, read by their exact bytes into allocated tensors."""

from __future__ import annotations

import math
import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shards.checkpoint.open_files import OpenFiles
from shards.checkpoint.tensor_files import DTYPE_BYTES, TensorEntry
from shards.load.ring import Ring

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Progress = Callable[[int, int], None]

THREADS = 4
PIECE_BYTES = 8 << 20
RING = 2 * THREADS  # buffers, so at most 64 MiB of host memory whatever the model
EXACT_RUN_BYTES = 256 << 10  # parts of rows with at least so many bytes are read alone, smaller ones with whole rows

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32, "U64": torch.uint64,
    "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A read: `out` receives the block of `entry` that begins at index `start` and has the shape of `out`.

    If it is `mapped`, `out` is already those bytes of the file, which only have to be brought into the page cache.
    """

    entry: TensorEntry
    start: tuple[int, ...]
    out: torch.Tensor
    mapped: bool = False


@dataclass(frozen=True, slots=True)
class _Piece:
    """A contiguous read of `shape` elements at byte `offset` of a file; `out` takes all rows, cut at `start` in the
    other dimensions."""

    entry: TensorEntry
    offset: int
    shape: tuple[int, ...]
    start: tuple[int, ...]
    out: torch.Tensor
    mapped: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.entry.dtype]

    def cut(self, stored: torch.Tensor) -> torch.Tensor:
        """The part of the stored elements that `out` takes."""
        for dim, first in enumerate(self.start, start=1):
            stored = stored.narrow(dim, first, self.out.shape[dim])
        return stored

    @property
    def in_place(self) -> bool:
        """True if the bytes of the file are those of `out`: contiguous, without a cast, in host memory."""
        return bool(
            self.out.device.type == "cpu"
            and self.out.shape == self.shape
            and self.out.dtype == TORCH_DTYPES[self.entry.dtype]
            and self.out.is_contiguous()
        )


def map_target(files: OpenFiles, target: Target) -> Target | None:
    """The same read with a tensor that is mapped to the file: it takes no memory, and the ranks of a machine share its
    pages.

    None if the bytes of the file are not those of the tensor: contiguous, without a cast, in host memory.
    """
    entry, out = target.entry, target.out
    row = math.prod(entry.shape[1:]) * DTYPE_BYTES[entry.dtype]
    offset = entry.offset
    if target.start:
        offset += target.start[0] * row
    as_stored = out.device.type == "cpu" and out.dtype == TORCH_DTYPES[entry.dtype] and out.is_contiguous()
    if not as_stored or not out.numel() or out.shape[1:] != entry.shape[1:]:
        return None
    block = _in_file(files, entry, offset, out.shape)
    if block is None:
        return None
    return Target(entry, target.start, block, mapped=True)


def _in_file(files: OpenFiles, entry: TensorEntry, offset: int, shape: Sequence[int]) -> torch.Tensor | None:
    """The values of `shape` at byte `offset` in the mapped file; None if they are not aligned."""
    dtype = TORCH_DTYPES[entry.dtype]
    if offset % dtype.itemsize or (memory := files.mapping(entry.file)) is None:
        return None
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def read_targets(files: OpenFiles, targets: Sequence[Target], progress: Progress = lambda done, total: None) -> int:
    """Read all targets in the order of their bytes on disk; returns the bytes read.

    Raises CheckpointError if a file has changed since its checkpoint was opened, checked before and after.
    """
    pieces: list[_Piece] = []
    for target in targets:
        entry, out = target.entry, target.out
        ends = zip(target.start, out.shape, entry.shape, strict=True)
        is_inside = all(first + size <= whole for first, size, whole in ends)
        assert is_inside, f"{entry.name} {entry.shape} has no block {tuple(out.shape)} at {target.start}"
        if out.dim() == 0:
            pieces.append(_Piece(entry, entry.offset, (1,), (), out.reshape(1), target.mapped))
        elif out.numel():
            pieces += _cut(target, entry.offset, entry.shape, target.start, out)
    pieces.sort(key=lambda piece: (piece.entry.file, piece.offset))
    total = sum(piece.nbytes for piece in pieces)
    gpus = sorted({target.out.device for target in targets if target.out.device.type == "cuda"}, key=str)
    ring = Ring(RING, PIECE_BYTES, pinned=bool(gpus))
    done = 0
    with ThreadPoolExecutor(THREADS, "read", _use_device, (gpus,)) as pool:
        try:
            for nbytes in pool.map(lambda piece: _read_piece(files, ring, piece), pieces):
                done += nbytes
                progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        files.check()
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    return done


def _use_device(gpus: Sequence[torch.device]) -> None:
    """Set the device of a new thread, which would otherwise open a context on the first GPU of the machine."""
    if gpus:
        torch.cuda.set_device(gpus[0])


def _cut(
    target: Target, offset: int, shape: tuple[int, ...], start: tuple[int, ...], out: torch.Tensor
) -> Iterator[_Piece]:
    """Pieces of at most PIECE_BYTES that fill `out` from the row-major tensor of `shape` at byte `offset`."""
    entry = target.entry
    row = math.prod(shape[1:]) * DTYPE_BYTES[entry.dtype]
    through = tuple(out.shape[1:]) != shape[1:]
    cut_row = row * math.prod(out.shape[1:]) // max(1, math.prod(shape[1:]))
    if len(shape) > 1 and (row > PIECE_BYTES or (through and cut_row >= EXACT_RUN_BYTES)):
        for index in range(out.shape[0]):
            yield from _cut(target, offset + (start[0] + index) * row, shape[1:], start[1:], out[index])
        return
    rows = max(1, PIECE_BYTES // row)
    for first in range(0, out.shape[0], rows):
        block = out[first : first + rows]
        at = offset + (start[0] + first) * row
        yield _Piece(entry, at, (block.shape[0], *shape[1:]), start[1:], block, target.mapped)


def _read_piece(files: OpenFiles, ring: Ring, piece: _Piece) -> int:
    with torch.inference_mode():
        if piece.mapped:
            files.expect(piece.entry, piece.offset, piece.nbytes)
            piece.out.reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].max()  # reading a byte of each page maps it
        elif piece.in_place:
            files.fill(piece.entry, piece.offset, _bytes_of(piece.out))
        elif (
            piece.out.device.type == "cpu"
            and (stored := _in_file(files, piece.entry, piece.offset, piece.shape)) is not None
        ):
            files.expect(piece.entry, piece.offset, piece.nbytes)
            piece.out.copy_(piece.cut(stored))
        else:
            buffer = ring.take()
            try:
                raw = buffer.memory[: piece.nbytes]
                files.fill(piece.entry, piece.offset, _bytes_of(raw))
                buffer.copy(raw.view(TORCH_DTYPES[piece.entry.dtype]).view(piece.shape), piece.cut, piece.out)
            finally:
                ring.give_back(buffer)
    return piece.nbytes


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
