"""Dataclasses as plain values and back, with their types checked."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

Value = TypeVar("Value")


def to_plain(value: Any) -> Any:
    """Lists, dicts and scalars, as JSON has them."""
    return msgspec.to_builtins(value)


def decode(values: Any, kind: type[Value]) -> Value:
    """A `kind` from plain values; ValueError with the location of a mistake. Unknown keys are ignored."""
    return msgspec.convert(values, kind)
