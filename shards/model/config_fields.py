"""The fields of a transformers config, checked when they are read: types, and bounds of whole numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from shards.errors import PlanError

TransformersConfig = Mapping[str, Any]
"""The fields of a transformers config, as in config.json."""

MOST_LAYERS = 1000
"""A plan with this many layers takes two seconds; no causal LM has a quarter as many."""

MOST_EXPERTS = 10_000
MOST = 2**31 - 1

_BOUNDS = (
    (re.compile(r"(^|_)n(um)?_(\w+_)?layers?$|^(en|de)coder_layers$"), MOST_LAYERS),
    (re.compile(r"(^|_)n(um)?_(\w+_)?experts"), MOST_EXPERTS),
)


class ConfigFields:
    """A transformers config, or an object in it; a null field counts as absent.

    PlanError, in one line, names a field that has the wrong type or is out of bounds.
    """

    def __init__(self, fields: TransformersConfig, name: str = "config") -> None:
        self.fields = fields
        self.name = name

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number above 0."""
        return self.number(name, 1, default)

    def count(self, name: str) -> int | None:
        """A whole number above 0, or None."""
        if self.fields.get(name) is None:
            return None
        return self.size(name)

    def number(self, name: str, least: int, default: int | None = None) -> int:
        """A whole number of at least `least`."""
        value = self.fields.get(name)
        if value is None:
            value = default
        most = _most(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(name, f"{value!r}, not a whole number from {least} to {most:,}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.fields.get(name)
        if value is None:
            return default
        return bool(value)

    def texts(self, name: str) -> list[str]:
        """A list of texts, empty if it is missing."""
        value = self.fields.get(name) or []
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, f"{value!r}, not a list of texts")
        return list(value)

    def group(self, name: str) -> ConfigFields:
        """An object in the config, empty if it is missing."""
        value = self.fields.get(name) or {}
        if not isinstance(value, Mapping):
            raise self.wrong(name, f"{value!r}, not an object")
        return ConfigFields(value, f"{self.name}.{name}")

    def wrong(self, name: str, what: str) -> PlanError:
        """The error for a field."""
        return PlanError(
            f"The model's {self.name} gives {name}={what}.", f"fix {name} in config.json, or download the model again."
        )


def check_config(config: TransformersConfig) -> None:
    """PlanError for a config that a plan, or transformers, would take very long for: too many layers or experts in it.

    Also if `model_type`, by which the family is looked up, is not a text.
    """
    if not isinstance(config.get("model_type", ""), str):
        raise ConfigFields(config).wrong("model_type", f"{config['model_type']!r}, not a text")
    for fields in _objects(config):
        for name, value in fields.fields.items():
            if isinstance(value, int) and value > _most(name) != MOST:
                fields.size(name)


def _objects(config: TransformersConfig, name: str = "config") -> Iterator[ConfigFields]:
    yield ConfigFields(config, name)
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _objects(value, f"{name}.{key}")


def _most(name: str) -> int:
    return next((most for pattern, most in _BOUNDS if pattern.search(name)), MOST)
