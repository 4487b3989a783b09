"""Read and write JSON files of typed values; UserError for values of wrong types."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, TypeVar

from launcher.system.files import write_json
from launcher.system.typed import decode, to_plain
from shards.errors import UserError
from shards.untrusted_files import read_bytes, read_json, read_json_lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

Value = TypeVar("Value")

MAX_RUN_BYTES = 256 << 20  # largest size of a file; a record contains the time of every token
AGAIN = "run it again"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
"""Exceptions that checking malformed values can raise."""


def read_value(path: Path, check: Callable[[Any], Value]) -> Value | None:
    """The value in a JSON file, converted by `check`; None for a missing file, UserError for an unreadable one."""
    try:
        values = read_json(path, UserError, AGAIN, MAX_RUN_BYTES)
    except FileNotFoundError:
        return None
    try:
        return check(values)
    except UserError as error:
        raise UserError(f"{path}: {error.fact}", AGAIN) from None
    except MALFORMED as error:
        raise unreadable(path, error) from None


def read_typed(path: Path, kind: type[Value]) -> Value | None:
    """`read_value` for a dataclass or a builtin type such as `list[str]`."""
    return read_value(path, lambda values: decode(values, kind))


def read_word(path: Path, form: str) -> str | None:
    """The single word in a file, None for a missing file; UserError if it does not match the pattern `form`."""
    try:
        word = read_bytes(path, 100).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", AGAIN) from None
    if not re.fullmatch(form, word):
        raise UserError(f"{path} is not a valid file of a run: {word!r}.", AGAIN)
    return word


def write_typed(path: Path, value: Any) -> None:
    """Write a dataclass as a JSON file, atomically."""
    write_json(path, to_plain(value))


def read_typed_lines(path: Path, kind: type[Value]) -> Iterator[Value]:
    """The values of a JSON-lines file, up to its last complete line; none for a missing file."""
    try:
        for values in read_json_lines(path, UserError, AGAIN, MAX_RUN_BYTES):
            yield decode(values, kind)
    except FileNotFoundError:
        return
    except MALFORMED as error:
        raise unreadable(path, error) from None


def lines_of(values: Sequence[Any], ensure_ascii: bool = True) -> str:
    """Dataclasses as JSON lines."""
    return "".join(json.dumps(to_plain(value), ensure_ascii=ensure_ascii) + "\n" for value in values)


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that is not a valid file of a run."""
    reason = f"{error}"
    if isinstance(error, KeyError):
        reason = f"it has no {error}"
    return UserError(f"{path} is not a valid file of a run: {reason}.", AGAIN)
