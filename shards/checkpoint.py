"""A checkpoint on disk: which tensors there are, where their bytes lie, and whether they fit a model. No torch."""

from __future__ import annotations

import mmap
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import CheckpointError
from shards.tensor_files import AGAIN, TensorEntry, no_readahead, parse_json, read_safetensors, some
from shards.torch_zip import read_torch_zip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Reader = Callable[[Path], list[TensorEntry]]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPECTED_BYTES = 128 << 10  # the least that Linux, as it comes, reads ahead at a time; the rest of a wish is dropped
CACHE_PROBES = 8
STILL_THERE = "check that the file is still there and that its disk is sound"
DERIVED = r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.masked_bias$"
LEGACY_SINGLE, LEGACY_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells a file from a later one under the same name."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder by name. `stamps` are the files as they were when their headers were read.

    `legacy` is True for pytorch_model*.bin, where tied tensors may share their bytes.
    """

    folder: Path
    legacy: bool
    tensors: Mapping[str, TensorEntry]
    stamps: Mapping[Path, FileStamp]

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """Read and check all headers of a transformers checkpoint; whatever is wrong is one CheckpointError."""
        folder = Path(folder)
        try:
            return _open(folder)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or folder} cannot be read: {error.strerror}.", "check the path and its permissions"
            ) from None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; tied ones that share their bytes count once."""
        return sum({(entry.file, entry.offset): entry.nbytes for entry in self.tensors.values()}.values())

    def check_mapped(self, paths: Iterable[Path]) -> None:
        """No file that is in use as memory was written to; one that was replaced or removed is still there for us."""
        for path in paths:
            try:
                now = FileStamp.of(path.stat())
            except OSError:
                continue
            if now.inode == self.stamps[path].inode and now != self.stamps[path]:
                raise changed(path)

    def verify(
        self,
        expected: Mapping[str, Sequence[int]],
        tied: Mapping[str, Sequence[str]] | None = None,
        prefix: str = "",
        ignore: Callable[[str], bool] = lambda name: False,
    ) -> dict[str, tuple[TensorEntry, ...]]:
        """The entry of each tensor of a model, which are its names and shapes in `expected`.

        A tensor may be stored under one of its `tied` names as well or instead, hence a tuple, and with or without the
        `prefix` of the base model ("transformer", "model"). Missing, surplus and misshapen tensors are one error;
        surplus ones that `ignore` knows are none.
        """
        found = {name: tuple(self._stored([name, *(tied or {}).get(name, ())], prefix)) for name in expected}
        used = {entry.name for entries in found.values() for entry in entries}
        misshapen = [
            f"{entry.name} is {list(entry.shape)} where the model has {list(expected[name])}"
            for name, entries in found.items()
            for entry in entries
            if entry.shape != tuple(expected[name])
        ]
        self._complain(
            missing=[name for name, entries in found.items() if not entries],
            surplus=[name for name in self.tensors if name not in used and not ignore(name)],
            misshapen=misshapen,
        )
        return found

    def _stored(self, names: Iterable[str], prefix: str) -> Iterable[TensorEntry]:
        for name in names:
            spellings = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
            if spelling := next((spelling for spelling in spellings if spelling in self.tensors), None):
                yield self.tensors[spelling]

    def _complain(self, **wrong: Sequence[str]) -> None:
        parts = [f"{len(names)} {kind} ({some(names)})" for kind, names in wrong.items() if names]
        if parts:
            raise CheckpointError(
                f"The checkpoint in {self.folder} does not fit its config: {', '.join(parts)}.",
                "config.json and the weight files must come from the same model and revision",
            )


class OpenFiles:
    """The open files of a checkpoint, held to the stamps that they had when it was opened."""

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
        """Have bytes of the file of `entry` brought into the page cache, if it is still the same file."""
        descriptor = self._descriptor(entry.file)
        self._check(entry.file, descriptor)
        if _is_cached(descriptor, offset, nbytes):
            return
        for first in range(offset, offset + nbytes, EXPECTED_BYTES):
            length = min(EXPECTED_BYTES, offset + nbytes - first)
            os.posix_fadvise(descriptor, first, length, os.POSIX_FADV_WILLNEED)

    def mapping(self, path: Path) -> mmap.mmap | None:
        """A whole file as memory of which a write makes a private copy; None where its file system cannot do that.

        While the files are open, the kernel adds nothing to what `expect` asked for.
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
        """No file has changed since it was opened."""
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
    """Whether a range of a file is in the page cache, by some of its bytes: asking for it all takes longer."""
    try:
        for at in range(offset, offset + nbytes, nbytes // CACHE_PROBES + 1):
            os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT)
    except OSError:  # it would have to be read, or the file system cannot tell
        return False
    return True


def changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} changed while it was in use.", "wait until nothing writes to the checkpoint, then run again"
    )


def is_derived(name: str) -> bool:
    """Whether old checkpoints hold it and today's models compute it."""
    return re.search(DERIVED, name) is not None


def _open(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.", "give the folder that holds config.json and the weights")
    layouts: tuple[tuple[str, bool, bool], ...] = (
        (SINGLE, False, False), (INDEX, False, True), (LEGACY_SINGLE, True, False), (LEGACY_INDEX, True, True),
    )  # fmt: skip
    for name, legacy, indexed in layouts:
        if os.path.lexists(folder / name):  # a link to nowhere is named when it is read
            mapping = _weight_map(folder / name) if indexed else None
            files = [folder / file for file in sorted(set(mapping.values()))] if mapping else [folder / name]
            return _read(folder, files, mapping, legacy)
    raise _nothing_found(folder)


def _nothing_found(folder: Path) -> CheckpointError:
    stray = [path.name for path in (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))]
    if stray:
        return CheckpointError(f"{folder} has weight files ({some(stray)}) but no {INDEX}.", "fetch the index as well")
    return CheckpointError(
        f"{folder} holds no checkpoint: no {SINGLE}, {INDEX} or pytorch_model*.bin.",
        "fetch the weights, or use model.weights=random",
    )


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name to file name, from an index; the files exist."""
    mapping = parse_json(path.read_bytes(), str(path)).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files.", AGAIN)
    files = set(mapping.values())
    if outside := [file for file in files if Path(file).name != file]:
        raise CheckpointError(f"{path} points outside its folder: {some(outside)}.", AGAIN)
    if missing := [file for file in files if not (path.parent / file).exists()]:
        raise CheckpointError(
            f"{len(missing)} of {len(files)} files of {path} are missing: {some(missing)}.", "fetch the missing files"
        )
    return mapping


def _read(folder: Path, files: Sequence[Path], mapping: Mapping[str, str] | None, legacy: bool) -> Checkpoint:
    stamps = {path: FileStamp.of(path.stat()) for path in files}
    read: Reader = read_torch_zip if legacy else read_safetensors
    by_file = {path: read(path) for path in files}
    if mapping is not None:
        for path, entries in by_file.items():
            _check_index(
                path, {entry.name for entry in entries}, {n for n, file in mapping.items() if file == path.name}
            )
    tensors = {entry.name: entry for entries in by_file.values() for entry in entries}
    if not tensors:
        raise CheckpointError(f"{files[0]} holds no tensor.", AGAIN)
    return Checkpoint(folder, legacy, tensors, stamps)


def _check_index(path: Path, held: set[str], indexed: set[str]) -> None:
    hint = "the index and the weight files must come from the same download"
    if lacking := indexed - held:
        raise CheckpointError(f"{path} lacks {len(lacking)} tensors that its index names: {some(lacking)}.", hint)
    if surplus := held - indexed:
        raise CheckpointError(
            f"{path} holds {len(surplus)} tensors that its index has not, or has in another file: {some(surplus)}.",
            hint,
        )
