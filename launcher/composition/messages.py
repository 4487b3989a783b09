"""Convert errors of Hydra and OmegaConf to one-line errors, using their fields and the types of the schema, not their
texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from yaml import MarkedYAMLError

from launcher.composition.overrides import chosen_engine, no_option
from launcher.composition.presets import options
from launcher.config.keys import example_of, known_keys, unknown_key, wrong_value
from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLES = {
    "prompts.path": "questions.txt",
    "model.path": "tiiuae/falcon-7b",
    "speculative.model": "embedded:tiny_draft",
}

UNREADABLE = (
    HydraException, OmegaConfBaseException, MarkedYAMLError, AttributeError, ValueError, AssertionError, RecursionError,
)  # fmt: skip
"""Exceptions that a user's mistake can raise while composing: AttributeError if {..} overrides a null dict, ValueError
if a group is null, AssertionError for an entry of a null dict."""


def in_one_line(error: Exception, overrides: Sequence[str], config_dirs: Sequence[str]) -> ConfigError:
    """The ConfigError for a mistake in an override, or in a file."""
    if isinstance(error, RecursionError):
        return ConfigError("A file of the configuration has too many levels.", "fewer nested [ and {")
    causes = (error.__cause__, error.__context__)  # Hydra wraps OmegaConf's error in its own
    cause = next((other for other in causes if isinstance(other, OmegaConfBaseException)), error)
    key, engine = getattr(cause, "full_key", None), chosen_engine(overrides)
    is_interpolation = isinstance(cause, InterpolationResolutionError | UnsupportedInterpolationType)
    if is_interpolation and not key:
        key = next((item.partition("=")[0].lstrip("+") for item in overrides if "${" in item), None)
    if isinstance(error, MarkedYAMLError):
        source = "A file"
        if mark := error.problem_mark:
            source = f"{mark.name}:{mark.line + 1}"
        return ConfigError(
            f"{source} is not YAML: {error.problem}.",
            "fix that line: KEY: VALUE, indented by two spaces under its KEY:",
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return no_option(group, option, options(group, config_dirs))
    if isinstance(error, AssertionError | AttributeError) and not isinstance(error, OmegaConfBaseException):
        return ConfigError(
            "model.config has no entries here that could be changed.",
            "model=falcon_40b model.weights=random, which has some",
        )
    if key and isinstance(cause, MissingMandatoryValue):
        return ConfigError(f"{key} has no value.", f"{key}={EXAMPLES.get(key, 'VALUE')}")
    if key and isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return in_file(unknown_key(key, engine), key, config_dirs)
    if key and is_interpolation:
        example = example_of(known_keys(engine).get(key))
        return ConfigError(f"{key} cannot be resolved: {_first_line(cause)}.", f"{key}={example}")
    if key and (hint := known_keys(engine).get(key)) is not None:
        return in_file(wrong_value(key, getattr(cause, "value", None), hint), key, config_dirs)
    return ConfigError(f"{_first_line(cause).rstrip('.')}.", "python -m launcher --help")


def in_file(error: ConfigError, key: str, config_dirs: Sequence[str]) -> ConfigError:
    """The error, with the name of the user's file that sets the key added, if there is one."""
    line = re.compile(rf"^\s*[\"']?{re.escape(key.rpartition('.')[2])}[\"']?\s*:", re.MULTILINE)
    for path in (path for folder in config_dirs for path in sorted(Path(folder).rglob("*.yaml"))):
        if line.search(path.read_text(encoding="utf-8", errors="replace")):
            return ConfigError(f"{path}: {error.fact}", error.hint)
    return error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
