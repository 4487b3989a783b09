"""A checkpoint on disk: which tensors there are, where their bytes lie, and whether they fit a model. No torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shards.checkpoint.archives import check_archive
from shards.checkpoint.tensor_files import AGAIN, TensorEntry, json_object, read_safetensors
from shards.errors import CheckpointError
from shards.untrusted_files import listed, read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Reader = Callable[[Path], list[TensorEntry]]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SAME_DOWNLOAD = "the index and the weight files must come from the same download"
DERIVED = r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.masked_bias$"
LEGACY_SINGLE, LEGACY_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True, slots=True)
class FileStamp:
    """The identity of a file's content: it distinguishes a file from a later one under the same name."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder by name. `stamps` are the files as they were when their headers were read.

    `legacy` is True for pytorch_model*.bin: there, tied tensors may share their bytes, and `tensors` is empty unless a
    reader for such files was given.
    """

    folder: Path
    legacy: bool
    tensors: Mapping[str, TensorEntry]
    stamps: Mapping[Path, FileStamp]

    @classmethod
    def open(cls, folder: Path | str, read_torch_file: Reader = check_archive) -> Checkpoint:
        """Read and check all headers of a transformers checkpoint; any fault raises CheckpointError.

        Of pytorch_model*.bin only the archive is checked, unless `read_torch_file` is the reader in shards.load, which
        needs torch.
        """
        folder = Path(folder)
        try:
            return _open(folder, read_torch_file)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or folder} cannot be read: {error.strerror}.", "check the path and its permissions"
            ) from None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; tied ones that share their bytes count once."""
        return sum({(entry.file, entry.offset): entry.nbytes for entry in self.tensors.values()}.values())

    def check_mapped(self, paths: Iterable[Path]) -> None:
        """CheckpointError if a mapped file was written to. After a file is replaced or removed, the mapping still has
        the old one."""
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
        """The entries of each tensor of a model, whose names and shapes are in `expected`.

        A tensor may be stored under one of its `tied` names as well or instead, hence a tuple, and with or without the
        `prefix` of the base model ("transformer", "model"). One CheckpointError reports all missing, surplus and
        misshapen tensors, except surplus ones for which `ignore` returns True.
        """
        matched: dict[str, tuple[TensorEntry, ...]] = {}
        for name in expected:
            matched[name] = ()
            for alias in (name, *(tied or {}).get(name, ())):
                spellings = (alias, alias.removeprefix(f"{prefix}."), f"{prefix}.{alias}")
                stored = next((spelling for spelling in spellings if spelling in self.tensors), None)
                if stored is not None:
                    matched[name] += (self.tensors[stored],)
        used = {entry.name for entries in matched.values() for entry in entries}
        misshapen = [
            f"{entry.name} is {list(entry.shape)} where the model has {list(expected[name])}"
            for name, entries in matched.items()
            for entry in entries
            if entry.shape != tuple(expected[name])
        ]
        faults = {
            "missing": [name for name, entries in matched.items() if not entries],
            "surplus": [name for name in self.tensors if name not in used and not ignore(name)],
            "misshapen": misshapen,
        }
        parts = [f"{len(names)} {kind} ({listed(names)})" for kind, names in faults.items() if names]
        if parts:
            raise CheckpointError(
                f"The checkpoint in {self.folder} does not fit its config: {', '.join(parts)}.",
                "config.json and the weight files must come from the same model and revision",
            )
        return matched


def changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} changed while it was in use.", "wait until nothing writes to the checkpoint, then run again"
    )


def is_derived(name: str) -> bool:
    """True for a tensor that old checkpoints store and current models compute."""
    return re.search(DERIVED, name) is not None


def _open(folder: Path, read_torch_file: Reader) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.", "give the folder that holds config.json and the weights")
    layouts: tuple[tuple[str, Reader, bool], ...] = (
        (SINGLE, read_safetensors, False), (INDEX, read_safetensors, True),
        (LEGACY_SINGLE, read_torch_file, False), (LEGACY_INDEX, read_torch_file, True),
    )  # fmt: skip
    for name, read, indexed in layouts:
        if os.path.lexists(folder / name):  # a broken link is reported when it is read
            if not indexed:
                return _read(folder, [folder / name], None, read)
            mapping = _weight_map(folder / name)
            return _read(folder, [folder / file for file in sorted(set(mapping.values()))], mapping, read)
    stray = [path.name for path in (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))]
    if stray:
        raise CheckpointError(f"{folder} has weight files ({listed(stray)}) but no {INDEX}.", "fetch the index as well")
    raise CheckpointError(
        f"{folder} holds no checkpoint: no {SINGLE}, {INDEX} or pytorch_model*.bin.",
        "fetch the weights, or use model.weights=random",
    )


def has_weights(folder: Path) -> bool:
    """True if a folder has files with names of weight files."""
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", INDEX, "pytorch_model*.bin*"))


def _weight_map(path: Path) -> dict[str, str]:
    """The file name of each tensor, from an index; CheckpointError if a file does not exist."""
    mapping = json_object(read_bytes(path), str(path)).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(file, str) for file in mapping.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files.", AGAIN)
    files = set(mapping.values())
    if outside := [file for file in files if Path(file).name != file]:
        raise CheckpointError(f"{path} points outside its folder: {listed(outside)}.", AGAIN)
    if missing := [file for file in files if not (path.parent / file).exists()]:
        raise CheckpointError(
            f"{len(missing)} of {len(files)} files of {path} are missing: {listed(missing)}.", "fetch the missing files"
        )
    return mapping


def _read(folder: Path, files: Sequence[Path], mapping: Mapping[str, str] | None, read: Reader) -> Checkpoint:
    stamps = {path: FileStamp.of(path.stat()) for path in files}
    by_file = {path: read(path) for path in files}
    if read is check_archive:
        return Checkpoint(folder, True, {}, stamps)
    if mapping is not None:
        for path, entries in by_file.items():
            stored, indexed = {entry.name for entry in entries}, {n for n, file in mapping.items() if file == path.name}
            if lacking := indexed - stored:
                fact = f"{path} lacks {len(lacking)} tensors that its index names: {listed(lacking)}."
                raise CheckpointError(fact, SAME_DOWNLOAD)
            if surplus := stored - indexed:
                fact = f"{path} holds {len(surplus)} tensors that its index has not, or has in another file"
                raise CheckpointError(f"{fact}: {listed(surplus)}.", SAME_DOWNLOAD)
    tensors = {entry.name: entry for entries in by_file.values() for entry in entries}
    if not tensors:
        raise CheckpointError(f"{files[0]} holds no tensor.", AGAIN)
    return Checkpoint(folder, read is not read_safetensors, tensors, stamps)
