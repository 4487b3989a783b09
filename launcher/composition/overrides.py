"""Convert command-line overrides to Hydra's grammar, check their keys, and quote paths that it cannot parse."""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from launcher.composition.presets import default_options, groups, options
from launcher.composition.quoting import for_shell, quoted
from launcher.config.engines import load_engine, names
from launcher.config.keys import (
    ALL_KEYS,
    LEAST_ALIKE,
    example_of,
    has_key,
    is_open,
    known_keys,
    nearest,
    unknown_key,
    wrong_value,
)
from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hydra.core.override_parser.types import Override

PATHS = ("model.path", "prompts.path", "output_dir", "run_dir", "backend.python", "cluster.python")
COMMANDS = ("compare", "doctor", "experiments", "plan", "probe", "report", "serve", "status")


def chosen_engine(overrides: Sequence[str]) -> str | None:
    """The engine of a run; None if the option names one of the user's own files, or several engines (a sweep).

    ConfigError for an invalid engine of a package.
    """
    chosen = [item.partition("=")[2] for item in overrides if item.lstrip("+").startswith("backend=")]
    name = [default_options()["backend"], *chosen][-1]
    if name not in names():
        return None
    load_engine(name)
    return name


def readable(overrides: Sequence[str]) -> list[str]:
    """The overrides in Hydra's grammar; ConfigError for an unknown key or an invalid value.

    A leading `+` is only kept for an entry whose name the user chooses; a path that Hydra cannot parse
    (`model.path=/a=b`) is quoted.
    """
    engine = chosen_engine(overrides)
    known = known_keys(engine)
    return [_readable(item, engine, known) for item in overrides]


def _readable(item: str, engine: str | None, known: Mapping[str, Any]) -> str:
    written, equals, value = item.partition("=")
    key = written.lstrip("+~")
    if equals and not key:
        raise ConfigError(f"{item} has no key.", f"KEY{item}, where {ALL_KEYS}")
    if not equals and not written.startswith("~"):
        if item in COMMANDS:
            raise ConfigError(f"{item} is a separate command.", f"python -m launcher.{item}")
        every = {option: group for group in groups() for option in options(group)}
        near = nearest(item, known)
        if near is not None and item not in every:
            raise ConfigError(f"{item} has no value.", f"{near}={example_of(known[near])}")
        for option in difflib.get_close_matches(item, every, 1, cutoff=LEAST_ALIKE):
            raise ConfigError(f"{item} has no value.", f"{every[option]}={option}")
        raise ConfigError(f"{item} has no value.", ALL_KEYS)
    is_entry = has_key(key, known) and key not in known
    if not has_key(key.partition("@")[2] or key, known) and key not in groups():
        raise unknown_key(key, engine, value)
    if written.startswith("~") and not is_entry:
        raise ConfigError(f"{item} would remove {key}, which every run needs.", f"leave ~{key} out")
    try:
        parse(item)
    except HydraException as error:
        if key in PATHS:
            return f"{key}={quoted(value)}"
        kind = known.get(key, str)
        if not is_open(kind) and kind is not str:
            raise wrong_value(key, value, kind) from None
        lines = [
            line for line in str(error).splitlines() if not line.startswith(("Error parsing override", "See http"))
        ]
        reason = [*lines, type(error).__name__][0].partition(" expecting ")[0].strip()
        text = quoted(value)
        if is_open(kind) and value.startswith("["):
            text = f"[{','.join(quoted(part.strip()) for part in value.strip('[]').split(','))}]"
        hint = f"{for_shell(f'{key}={text}')}, in these quotes"
        raise ConfigError(f"{key}={value} cannot be read: {reason}.", hint) from None
    if key.startswith(NAMED_BY_THE_USER) and not written.startswith("~"):
        return f"+{item.lstrip('+')}"
    if is_entry or key not in known or is_open(known[key]):
        return item
    return item.lstrip("+")


NAMED_BY_THE_USER = ("adapter.paths", "backend.extra", "cluster.environment")
"""Keys that are empty by default, so that their entries are always new and need a `+` in Hydra's grammar. An entry of
model.config without a `+` must exist in the preset."""


@lru_cache(10_000)
def parse(item: str) -> Override:
    """An override parsed by Hydra's grammar; HydraException for an invalid one, or one with too many digits or
    levels."""
    try:
        return OverridesParser.create().parse_override(item)
    except (ValueError, RecursionError, OverflowError) as error:
        raise HydraException(str(error)) from None


def check_options(overrides: Sequence[str], config_dirs: Sequence[str]) -> None:
    """ConfigError for a group that is set to an unknown option."""
    for override in map(parse, overrides):
        key = override.key_or_group
        text = override.input_line or ""
        if override.is_sweep_override():
            raise ConfigError(f"{text} has several values, which are a sweep.", f"-m {text}")
        if key in groups() and override.value() not in (known := options(key, config_dirs)):
            raise no_option(key, text.partition("=")[2], known)


def no_option(group: str, given: str, known: Sequence[str]) -> ConfigError:
    """The error for an unknown option of a group."""
    fact = f"{group}={given} is not one of {', '.join(known)}."
    if close := nearest(given, known):
        return ConfigError(fact, f"{group}={close}")
    if group == "model" and "/" in given:
        return ConfigError(fact, f"model.path={given}")
    if group == "prompts" and re.search(r"[/.]", given):
        return ConfigError(fact, f"prompts=file prompts.path={given}")
    return ConfigError(fact, f"{group}={default_options().get(group, known[0])}")


def option_like(word: str) -> str:
    """The hint for an unknown flag: keys are written without dashes."""
    key, _, value = word.lstrip("-").partition("=")
    near = nearest(key, known_keys(None))
    if near is None:
        return "python -m launcher --help"
    return f"{near}={value or example_of(known_keys(None)[near])}"
