"""Read files written by others: regular files of bounded size, and JSON of finite numbers and bounded depth."""

from __future__ import annotations

import collections
import errno
import json
import math
import os
import re
import stat
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from shards.errors import UserError

JsonObject = dict[str, Any]
"""A JSON object, or a dictionary that becomes one; its values are checked when they are read."""

MAX_BYTES = 32 << 20  # the index of a model with a trillion parameters in 384 experts has 23 MiB
MAX_DEPTH = 50
MAX_DIGITS = 18
"""Digits of a whole number, at most: all such numbers fit into 64 bits."""

_UNUSUAL = re.compile(rf"\d{{{MAX_DIGITS + 1}}}|[eE]\+?\d{{3}}|NaN|Infinity")
"""The form of a number that may be out of bounds; texts without it, as most are, need no check of each number."""


def open_regular(path: Path) -> BinaryIO:
    """A regular file, opened to read; OSError for a folder, and for a pipe or device, which may never answer or end."""
    _check_regular(path, os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # it may have been replaced
    try:
        _check_regular(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _check_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a regular file", str(path))


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes; OSError with the reason in its `strerror`."""
    with open_regular(path) as stream:
        return bounded(stream, str(path), most)


def bounded(stream: BinaryIO, name: str, most: int = MAX_BYTES) -> bytes:
    """The rest of a stream; OSError if that is more than `most` bytes."""
    content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EOVERFLOW, f"it has more than {most:,} bytes", name)
    return content


def read_json(path: Path, error: type[UserError], hint: str, most: int = MAX_BYTES) -> Any:
    """The JSON value in a file; FileNotFoundError if there is no file, `error` for any other fault."""
    try:
        content = read_bytes(path, most)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}.", hint) from None
    return parse_json(content, str(path), error, hint)


def parse_json(text: bytes | str, name: str, error: type[UserError], hint: str, unique: bool = False) -> Any:
    """A JSON value; `error` if it is malformed or has NaN, infinities, very long numbers or deep nesting.

    With `unique` no key may occur twice in an object.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        hooks: JsonObject = {}
        if unique:
            hooks["object_pairs_hook"] = _unique
        if _UNUSUAL.search(text):
            hooks |= {"parse_constant": _refuse_constant, "parse_float": _finite, "parse_int": _whole}
        value = json.loads(text, **hooks)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(value)
    except RecursionError:
        raise error(f"{name} is not valid JSON: more than {MAX_DEPTH} levels deep.", hint) from None
    except ValueError as problem:
        raise error(f"{name} is not valid JSON: {problem}.", hint) from None
    return value


def read_json_lines(path: Path, error: type[UserError], hint: str, most: int = MAX_BYTES) -> Iterator[Any]:
    """The JSON values of a file, up to its last complete line; FileNotFoundError if there is no file.

    `error` for a line of more than `most` bytes, or any other fault.
    """
    try:
        with open_regular(path) as stream:
            number = 0
            while (line := stream.readline(most)).endswith(b"\n"):
                number += 1
                yield parse_json(line, f"{path}:{number}", error, hint)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}.", hint) from None
    if len(line) == most:
        raise error(f"{path}:{number + 1} has more than {most:,} bytes.", hint)


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names and how many there are besides."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:most])
    if len(ordered) > most:
        return f"{shown} and {len(ordered) - most} more"
    return shown


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:MAX_DIGITS]} is too large a number")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    counts = collections.Counter(key for key, _ in pairs)
    if repeated := [key for key, count in counts.items() if count > 1]:
        raise ValueError(f"it names {listed(repeated)} twice")
    return dict(pairs)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(child for child in item.values() if isinstance(child, dict | list))
            elif isinstance(item, list):
                inner.extend(child for child in item if isinstance(child, dict | list))
        if not inner:
            return
        level = inner
    raise RecursionError
