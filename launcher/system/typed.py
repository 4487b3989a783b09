"""Convert dataclasses to plain values and back, with type checks."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

Value = TypeVar("Value")


def to_plain(value: Any) -> Any:
    """The value as lists, dicts and scalars, for JSON."""
    return msgspec.to_builtins(value)


def decode(values: Any, kind: type[Value]) -> Value:
    """A value of type `kind` from plain values; ValueError with the location of a mistake. Unknown keys are ignored."""
    return msgspec.convert(values, kind)
