"""A configuration as plain values and back, for `config.yaml` and `run.json`."""

from __future__ import annotations

import dataclasses
import typing
from enum import Enum
from typing import TYPE_CHECKING, Any

from launcher.config.engines import load_engine
from launcher.config.keys import strays, type_hints, unknown_key, without_none
from launcher.config.schema import RunConfig
from launcher.system import typed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shards.untrusted_files import JsonObject


def to_dict(value: Any) -> Any:
    """Plain lists, dicts and scalars; an Enum becomes its name, as on the command line."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(item) for item in value]
    return value


def flat(values: Mapping[str, Any], prefix: str = "") -> JsonObject:
    """Nested plain values by their dotted keys."""
    pairs: JsonObject = {}
    for name, value in values.items():
        if isinstance(value, dict):
            pairs |= flat(value, f"{prefix}{name}.")
        else:
            pairs[f"{prefix}{name}"] = value
    return pairs


def from_dict(raw: JsonObject) -> RunConfig:
    """The inverse of `to_dict` for a whole configuration; the engine's name selects its dataclass.

    ConfigError for a key that is not in the schema: a run of another version must not be resumed as a different run.
    """
    plain = {**raw, "backend": None}
    engine = raw["backend"]["name"]
    for key in (*strays(plain, RunConfig), *strays(raw["backend"], load_engine(engine), "backend.")):
        raise unknown_key(key, engine)
    config = _build(RunConfig, plain)
    config.backend = _build(load_engine(engine), raw["backend"])
    return typing.cast("RunConfig", config)


def _build(kind: type, raw: JsonObject) -> Any:
    hints = type_hints(kind)
    return kind(**{key: _convert(hints[key], value) for key, value in raw.items()})


def _convert(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    hint = without_none(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type", hint), value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint[value]
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return [_convert(item, part) for part in typed.decode(value, list)]
    return typed.decode(value, hint)
