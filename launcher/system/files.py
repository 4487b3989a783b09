"""Write files atomically, by a temporary file and a rename, and read them."""

from __future__ import annotations

import contextlib
import difflib
import errno
import itertools
import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shards.untrusted_files import JsonObject

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """A context that raises UserError if the file system of `folder` gets full, or disappears."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"Cannot write in {folder}: {error.strerror}.", "free some, then resume=true") from None
        if error.filename is None:
            raise
        fact = f"{error.filename} cannot be used: {error.strerror}."
        raise UserError(fact, f"leave {folder} as it is while it is in use") from None


LOG_END_BYTES = 256 << 10
MOST_SIBLINGS = 1000


def absolute(path: Path | str) -> Path:
    """The absolute path with links resolved; a loop of links is left unresolved, and reported when it is opened."""
    return Path(os.path.realpath(path))


def sibling(path: Path) -> Path | None:
    """The regular file in the folder of `path` whose name is most similar to it; None if there is none."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, MOST_SIBLINGS) if entry.is_file()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, (name for name in names if name != path.name), 1)
    if not near:
        return None
    return path.parent / near[0]


def make_folder(parent: Path, name: str) -> Path:
    """Create a new folder in `parent`, called `name`, or `name` with a number; UserError if that is not possible."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = parent / name
            if number > 1:
                folder = parent / f"{name}-{number}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return absolute(folder)
    except OSError as error:
        fact = f"Cannot write in output_dir={parent}: {error.strerror}."
        raise UserError(fact, f"output_dir={Path.home() / 'runs'}") from None
    raise AssertionError("unreachable")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` atomically: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")  # unique among hosts
    try:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:  # paths in it may be any bytes
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by indented JSON atomically; ValueError for NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in `path`, or None for a missing file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def read_lines(path: Path) -> list[JsonObject]:
    """The objects of a JSON-lines file, up to its last complete line: the file of a killed writer is still readable."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]  # splitlines() also splits at U+2028 in a text


def read_end(log: Path) -> str:
    """The last 256 KiB of a log; empty if it is missing."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - LOG_END_BYTES))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""
