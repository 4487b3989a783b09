"""Values that must not be read as Hydra's grammar: paths as they are, other texts in quotes."""

from __future__ import annotations

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from launcher.config.schema import ConfigError

PATHS = ("model.path", "prompts.path", "output_dir", "run_dir", "backend.python", "cluster.python")


def quoted(text: str) -> str:
    """`text` as a value of an override that stands for exactly itself: no quote, brace or `${...}` in it is read."""
    return in_quotes(re.sub(r"(\\*)\$\{", lambda found: found.group(1) * 2 + r"\${", text))  # OmegaConf's own escape


def in_quotes(text: str) -> str:
    """`text` as Hydra's grammar reads it back; `${...}` in it is still OmegaConf's."""
    text = re.sub(r"(\\*)(')", lambda found: found.group(1) * 2 + r"\'", text)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", text) + "'"


def with_quoted_paths(overrides: list[str]) -> list[str]:
    """The overrides, with a path that Hydra cannot read (`model.path=/a=b`) in quotes; ConfigError for other values."""
    return [_with_quoted_path(item) for item in overrides]


def _with_quoted_path(item: str) -> str:
    key, equals, value = item.partition("=")
    if equals and not key:
        raise ConfigError(f"{item} has no key.", "KEY=VALUE")
    try:
        OverridesParser.create().parse_override(item)
    except HydraException as error:
        if key in PATHS:
            return f"{key}={quoted(value)}"
        if not equals:
            raise ConfigError(f"{item} has no value.", "KEY=VALUE") from None
        raise ConfigError(
            f"{item} cannot be read: {_reason(error)}.", f'"{key}={quoted(value)}", in both quotes'
        ) from None
    return item


def _reason(error: HydraException) -> str:
    """What Hydra's parser says, without the override that it repeats and the tokens that it would rather have."""
    said = [line for line in str(error).splitlines() if not line.startswith(("Error parsing override", "See http"))]
    return said[0].partition(" expecting ")[0].strip() if said else type(error).__name__
