"""The files of a checkpoint while they are read; each must stay as it was when the checkpoint was opened. No torch."""

from __future__ import annotations

import mmap
import os
import threading
from typing import TYPE_CHECKING

from shards.checkpoint.checkpoint import FileStamp, changed
from shards.checkpoint.tensor_files import no_readahead
from shards.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from shards.checkpoint.checkpoint import Checkpoint
    from shards.checkpoint.tensor_files import TensorEntry

EXPECTED_BYTES = 128 << 10  # Linux's default limit of readahead: it drops the rest of a larger request
CACHE_PROBES = 8
STILL_THERE = "check that the file is still there and that its disk is sound"


class OpenFiles:
    """The open files of a checkpoint, checked against the stamps that they had when it was opened."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._stamps = checkpoint.stamps
        self._open: dict[Path, int] = {}
        self._mapped: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        for memory in self._mapped.values():
            memory.madvise(mmap.MADV_NORMAL)

    def fill(self, entry: TensorEntry, offset: int, memory: memoryview) -> None:
        """Read as many bytes as `memory` has from byte `offset` of the file of `entry`. Safe to call from threads."""
        done, descriptor = 0, self._descriptor(entry.file)
        try:
            while done < len(memory):
                count = os.preadv(descriptor, [memory[done:]], offset + done)
                if count == 0:
                    raise changed(entry.file)
                done += count
        except OSError as error:
            raise CheckpointError(
                f"{entry.file} cannot be read at byte {offset + done:,} for {entry.name}: {error.strerror}.",
                STILL_THERE,
            ) from None

    def expect(self, entry: TensorEntry, offset: int, nbytes: int) -> None:
        """Ask the kernel to read bytes of the file of `entry` into the page cache; CheckpointError if the file has
        changed."""
        descriptor = self._descriptor(entry.file)
        self._check(entry.file, descriptor)
        if _is_cached(descriptor, offset, nbytes):
            return
        for first in range(offset, offset + nbytes, EXPECTED_BYTES):
            length = min(EXPECTED_BYTES, offset + nbytes - first)
            os.posix_fadvise(descriptor, first, length, os.POSIX_FADV_WILLNEED)

    def mapping(self, path: Path) -> mmap.mmap | None:
        """A whole file, mapped copy-on-write; None if its file system does not support that.

        While the files are open, the kernel reads ahead only what `expect` asked for.
        """
        descriptor = self._descriptor(path)
        with self._lock:
            if path not in self._mapped:
                try:
                    self._mapped[path] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
                except OSError:
                    return None
                self._mapped[path].madvise(mmap.MADV_RANDOM)
            return self._mapped[path]

    def check(self) -> None:
        """CheckpointError if a file has changed since the checkpoint was opened."""
        for path, descriptor in self._open.items():
            self._check(path, descriptor)

    def _check(self, path: Path, descriptor: int) -> None:
        if FileStamp.of(os.fstat(descriptor)) != self._stamps[path]:
            raise changed(path)

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                try:
                    self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{path} cannot be read: {error.strerror}.", STILL_THERE) from None
                no_readahead(self._open[path])
                self._check(path, self._open[path])
            return self._open[path]


def _is_cached(descriptor: int, offset: int, nbytes: int) -> bool:
    """True if a range of a file is in the page cache, judged by a sample of its pages: testing all takes longer."""
    try:
        for at in range(offset, offset + nbytes, nbytes // CACHE_PROBES + 1):
            os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT)
    except OSError:  # not cached, or the file system does not support the question
        return False
    return True
