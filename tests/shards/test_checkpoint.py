from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

from shards.checkpoint.checkpoint import Checkpoint
from shards.checkpoint.tensor_files import TensorEntry
from shards.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEADERS = {
    "model-1.safetensors": {"model.a.weight": ("F32", [2, 3], [0, 24]), "model.b.weight": ("BF16", [4], [24, 32])},
    "model-2.safetensors": {"model.c.weight": ("F16", [2, 2], [0, 8]), "lm_head.weight": ("F32", [], [8, 12])},
}
SHAPES = {"model.a.weight": (2, 3), "model.b.weight": (4,), "model.c.weight": (2, 2), "lm_head.weight": ()}


def write_file(path: Path, header: dict[str, Any], data_bytes: int | None = None) -> None:
    fields = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in header.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **fields}).encode()
    size = max(end for _, _, (_, end) in header.values()) if data_bytes is None else data_bytes
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


def write_index(folder: Path, weight_map: Any = None) -> None:
    weight_map = weight_map or {name: file for file, header in HEADERS.items() for name in header}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file, header in HEADERS.items():
        write_file(tmp_path / file, header)
    write_index(tmp_path)
    return tmp_path


def test_entries_say_where_each_tensor_lies(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    first, second = folder / "model-1.safetensors", folder / "model-2.safetensors"
    data = {path: path.stat().st_size - size for path, size in ((first, 32), (second, 12))}
    assert not checkpoint.legacy
    assert checkpoint.nbytes == 44
    assert checkpoint.tensors == {
        "model.a.weight": TensorEntry("model.a.weight", first, "F32", (2, 3), data[first], 24),
        "model.b.weight": TensorEntry("model.b.weight", first, "BF16", (4,), data[first] + 24, 8),
        "model.c.weight": TensorEntry("model.c.weight", second, "F16", (2, 2), data[second], 8),
        "lm_head.weight": TensorEntry("lm_head.weight", second, "F32", (), data[second] + 8, 4),
    }


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", HEADERS["model-1.safetensors"])
    assert list(Checkpoint.open(tmp_path).tensors) == ["model.a.weight", "model.b.weight"]


def first(folder: Path) -> Path:
    return folder / "model-1.safetensors"


def rewrite(**changes: tuple[str, list[int], list[int]]) -> Callable[[Path], None]:
    """A change that rewrites the first file with other descriptions of some tensors."""

    def act(folder: Path) -> None:
        header = {
            **HEADERS["model-1.safetensors"],
            **{f"model.{name}.weight": value for name, value in changes.items()},
        }
        write_file(first(folder), header)

    return act


def cut(count: int) -> Callable[[Path], None]:
    return lambda folder: first(folder).write_bytes(first(folder).read_bytes()[:count])


def index(**changes: str) -> Callable[[Path], None]:
    weight_map = {name: file for file, header in HEADERS.items() for name in header}
    return lambda folder: write_index(folder, {**weight_map, **changes})


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def text(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def header(content: bytes) -> Callable[[Path], object]:
    return text("model-1.safetensors", struct.pack("<Q", len(content)) + content + bytes(32))


def lose(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).unlink()


def dangle(folder: Path) -> None:
    empty(folder)
    (folder / "model.safetensors").symlink_to("gone")


def pipe(file: str) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return act


def link(file: str, target: str) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(target)

    return act


def sparse(file: str, nbytes: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / file, nbytes)


def archive(*records: tuple[str, bytes], method: int = zipfile.ZIP_STORED, **fields: int) -> Callable[[Path], object]:
    """A pytorch_model.bin of these records; `fields` are changed only in the zip directory, which makes it invalid."""

    def act(folder: Path) -> None:
        empty(folder)
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w", method) as made:
            for name, content in records:
                made.writestr(f"x/{name}", content)
                for field, value in fields.items():
                    setattr(made.infolist()[-1], field, value)

    return act


def directory(nbytes: int) -> Callable[[Path], object]:
    """A sparse archive whose end record claims a directory of `nbytes` bytes."""

    def act(folder: Path) -> None:
        empty(folder)
        with (folder / "pytorch_model.bin").open("wb") as file:
            file.truncate(nbytes)
            file.seek(nbytes)
            file.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, nbytes, 0, 0))

    return act


ENTRY = b'"a": {"dtype": "F32", "shape": [4], "data_offsets": [%d, %d]}'
FILE, INDEX = "model-1.safetensors", "model.safetensors.index.json"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "empty folder": (empty, "holds no checkpoint"),
    "index lost": (lose(INDEX), "has weight files (model-1.safetensors, model-2.safetensors) but no"),
    "index half written": (text(INDEX, b'{"weight_map": {'), "is not valid JSON"),
    "index of something else": (text(INDEX, b"[1]"), "is a JSON list"),
    "index without a map": (text(INDEX, b"{}"), "has no weight_map"),
    "index out of its folder": (index(**{"model.x": "../model-1.safetensors"}), "points outside its folder"),
    "file missing": (lose(FILE), "1 of 2 files"),
    "link to nowhere": (dangle, "model.safetensors cannot be read: No such file"),
    "file empty": (cut(0), "has 0 bytes, too few"),
    "file cut in its header": (cut(40), "a header of 189 bytes in a file of 40"),
    "file cut in its data": (cut(220), "220 of 229 bytes are there, model.a.weight, model.b.weight not in full"),
    "file too long": (lambda folder: first(folder).open("ab").write(b"xyz"), "has 3 bytes more"),
    "no safetensors file": (text(FILE, b"PK\3\4" + bytes(range(60, 120))), "is not a safetensors file"),
    "Git LFS pointer": (text(FILE, b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "header of garbage": (header(b"\xff\xfe{{{{"), "is not valid JSON"),
    "header without a shape": (header(b'{"a": {"dtype": "F32", "data_offsets": [0, 32]}}'), "makes no sense"),
    "header with a negative size": (rewrite(b=("BF16", [-4], [24, 32])), "model.b.weight in a way that makes no sense"),
    "tensor twice": (header(b"{%s, %s}" % (ENTRY % (0, 16), ENTRY % (16, 32))), "names a twice"),
    "tensors overlap": (rewrite(b=("BF16", [4], [20, 28])), "model.b.weight overlaps model.a.weight by 4 bytes"),
    "hole between tensors": (rewrite(b=("BF16", [4], [28, 36])), "4 bytes before model.b.weight belong to no tensor"),
    "size is not shape times dtype": (rewrite(b=("F32", [4], [24, 32])), "8 bytes, but F32 [4] takes 16"),
    "unknown dtype": (rewrite(b=("F4", [16], [24, 32])), "model.b.weight as F4"),
    "index names what no file has": (index(x=FILE), "lacks 1 tensors that its index names: x."),
    "tensor in another file": (
        index(**{"model.a.weight": "model-2.safetensors"}),
        "model-1.safetensors holds 1 tensors that its index has not, or has in another file: model.a.weight.",
    ),
    "file is a pipe": (pipe(FILE), "model-1.safetensors cannot be read: it is a pipe"),
    "index is a pipe": (pipe(INDEX), "index.json cannot be read: it is a pipe"),
    "index is a device": (link(INDEX, "/dev/zero"), "index.json cannot be read: it is a pipe, a socket or a device"),
    "index is a loop": (link(INDEX, INDEX), "index.json cannot be read: Too many levels of symbolic links"),
    "index is very long": (sparse(INDEX, 5 << 30), "index.json cannot be read: it has more than 33,554,432 bytes"),
    "index is deep": (text(INDEX, b'{"a":' * 90 + b"1" + b"}" * 90), "more than 50 levels deep"),
    "index is deeper": (text(INDEX, b"[" * 10**6), "more than 50 levels deep"),
    "header of a large number": (header(b'{"a": %s}' % (b"9" * 5000)), "is not valid JSON: a number of 5,000 digits"),
    "dtype is a list": (header(b'{"a": {"dtype": [], "shape": [8], "data_offsets": [0, 32]}}'), "makes no sense"),
    "many dimensions": (
        header(b'{"a": {"dtype": "F32", "shape": [8%s], "data_offsets": [0, 32]}}' % (b",1" * 10**5)),
        "makes no sense",
    ),
    "archive is a pipe": (lambda folder: (empty(folder), os.mkfifo(folder / "pytorch_model.bin")), "it is a pipe"),
    "archive is packed": (archive(("data.pkl", b"x" * 99), method=zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
    "archive is encrypted": (archive(("data.pkl", b"x"), flag_bits=1), "is compressed or encrypted"),
    "archive of another method": (archive(("data.pkl", b"x"), compress_type=99), "is compressed or encrypted"),
    "archive of another version": (archive(("data.pkl", b"x"), extract_version=200), "is truncated, or was written"),
    "archive of another order": (archive(("byteorder", b"big___")), "its byte order is not little-endian"),
    "archive of a long order": (archive(("byteorder", b"x"), file_size=5 << 30), "its byte order is not little-endian"),
    "archive of a long index": (archive(("data.pkl", b"x"), file_size=5 << 30), "an index of 5,368,709,120 bytes"),
    "archive of a long directory": (directory(3 << 30), "is truncated, or was written"),
    "unreadable": (lambda folder: (first(folder).unlink(), first(folder).mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_one_line_that_names_what_is_wrong(folder: Path, kind: str) -> None:
    spoil, fact = BAD[kind]
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    line = str(caught.value)
    assert fact in line
    assert "HINT: " in line
    assert "\n" not in line


def without(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in SHAPES.items() if name not in names}


@pytest.mark.parametrize(
    ("expected", "fact"),
    [
        ({**SHAPES, "model.d.weight": (1,), "model.e.weight": (2,)}, "2 missing (model.d.weight, model.e.weight)"),
        (without("model.a.weight", "model.c.weight"), "2 surplus (model.a.weight, model.c.weight)"),
        ({**SHAPES, "model.a.weight": (3, 2)}, "1 misshapen (model.a.weight is [2, 3] where the model has [3, 2])"),
        ({**SHAPES, **{f"model.{i}": (1,) for i in range(9)}}, "9 missing (model.0, model.1, model.2 and 6 more)"),
        ({"x": (1,), **without("model.a.weight")}, "1 missing (x), 1 surplus (model.a.weight)"),
    ],
)
def test_what_does_not_fit_the_model_is_named(folder: Path, expected: dict[str, tuple[int, ...]], fact: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder).verify(expected, prefix="model")
    assert fact in str(caught.value)


def test_names_with_and_without_the_prefix_of_the_base_model_fit(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    bare = {name.removeprefix("model."): shape for name, shape in SHAPES.items()}
    for names in (SHAPES, bare):
        found = checkpoint.verify(names, prefix="model")
        assert {name: entries[0].shape for name, entries in found.items()} == names


def test_a_tied_tensor_may_be_stored_under_either_name(folder: Path) -> None:
    expected = {"model.embed.weight": (), **without("lm_head.weight")}
    found = Checkpoint.open(folder).verify(expected, tied={"model.embed.weight": ["lm_head.weight"]})
    assert [entry.name for entry in found["model.embed.weight"]] == ["lm_head.weight"]


def test_ignored_tensors_are_no_surplus(folder: Path) -> None:
    found = Checkpoint.open(folder).verify(without("lm_head.weight"), ignore=lambda name: name == "lm_head.weight")
    assert set(found) == set(without("lm_head.weight"))


def test_no_torch_is_imported() -> None:
    code = "import sys, shards.checkpoint.checkpoint; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
