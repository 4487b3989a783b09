"""Hydra's and OmegaConf's errors in the words of this project: one line, with a hint."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from launcher.config.schema import BACKENDS, ConfigError, RunConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

UNREADABLE = (HydraException, OmegaConfBaseException, MarkedYAMLError, AttributeError, ValueError, AssertionError)
"""What composing raises for what a user has written: AttributeError for {..} over a null dict, ValueError for a group
that is null, AssertionError for an entry of a null dict."""

NOT = (
    ("converted to Integer", "a whole number", "1"),
    ("converted to Float", "a number", "1"),
    ("not a valid bool", "true or false", "true"),
    ("is not a ListConfig", "a list", "[a,b]"),
    ("to string:", "a text", "TEXT"),
    ("Cannot assign", "a group of entries", "{a:b}"),
    ("Invalid type assigned", "a group of keys", ""),
    ("is not Optional", "a value", ""),
)
"""OmegaConf's words, what a value is not, and one that is it."""


def in_one_line(error: Exception, overrides: Sequence[str], options: Callable[[str], list[str]]) -> ConfigError:
    """What is wrong with one of the overrides, or with a file; `options` gives those of a group."""
    text = f"{error} {error.__cause__ or ''}".strip()
    if isinstance(error, MarkedYAMLError):
        mark = error.problem_mark
        place = f"{mark.name}:{mark.line + 1}" if mark else "A file"
        return ConfigError(f"{place} is not YAML: {error.problem}.", "mend the file")
    if isinstance(error, MissingConfigException) and (found := re.search(r"find '(\w+)/([^']*)'", text)):
        return _no_option(found.group(1), found.group(2), options(found.group(1)))
    if "Config group override must be" in text:
        chosen = [(group, option, options(group)) for group, _, option in (item.partition("=") for item in overrides)]
        return _no_option(*next((group, option, all_) for group, option, all_ in chosen if all_ and option not in all_))
    if isinstance(error, AssertionError | AttributeError):
        return ConfigError("model.config has no entries here that could be changed.", "model=falcon_40b has some")
    if wrong := _wrong_value(error):
        return wrong
    inner = re.search(r"override '([\w.]+)'.*Key '(\w+)' is not in struct", text, re.DOTALL)
    if inner and not inner.group(1).endswith(inner.group(2)):
        key, entry = inner.groups()
        return ConfigError(f"{key} is given entry by entry.", f"+{key}.{entry}=VALUE")
    if found := re.search(r"(?:Key|Could not override) '([\w.]+)'", text):
        return unknown_key(found.group(1))
    if "--multirun" in text or "Ambiguous value" in text or "sweep" in text.lower():
        return ConfigError(text.splitlines()[0], "several values are a sweep: add -m")
    text = re.sub(r"See https?://\S+( for details)?|\b(full_key|object_type|reference_type)[:=].*", "", text)
    return ConfigError(" ".join(text.split()), "python -m launcher --help")


def _no_option(group: str, option: str, known: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(option, known, 1)
    hint = f"{group}={close[0]}" if close else f"one of {', '.join(known)}"
    return ConfigError(f"{group}={option}: there is no such {group}.", hint)


def _wrong_value(error: Exception) -> ConfigError | None:
    """A value of another kind than its key has, on the command line or in a file."""
    cause = error.__cause__ or error
    key, said = getattr(cause, "full_key", None), str(cause).partition("\n")[0]
    if not key:
        return None
    given = re.search(r"override \S+?=(.*)", str(error)) or re.search(r"[Vv]alue '(.*?)'(?: |,|$)", said)
    what = f"{key}={given.group(1) if given else 'null'}"
    if names := re.search(r"expected one of \[(.*)\]", said):
        close = difflib.get_close_matches(what.partition("=")[2], names.group(1).split(", "), 1, cutoff=0)
        return ConfigError(f"{what} is not one of {names.group(1)}.", f"{key}={close[0]}")
    for words, kind, example in NOT:
        if words in said:
            return ConfigError(f"{what} is not {kind}.", f"{key}={example}" if example else f"leave {key} out")
    return None


def unknown_key(key: str) -> ConfigError:
    """There is no such key; the hint names the nearest one."""
    engines = [name for name, kind in BACKENDS.items() if key.removeprefix("backend.") in _key_paths(kind)]
    if key.startswith("backend.") and engines:
        return ConfigError(f"{key} is not an option of this backend.", f"backend={engines[0]} has it")
    paths = _key_paths(RunConfig)
    leaf = key.rpartition(".")[2]
    same = [path for path in paths if path.rpartition(".")[2] == leaf]
    close = same or difflib.get_close_matches(key, paths, 1, cutoff=0.5)
    return ConfigError(f"{key} is not a key of the configuration.", close[0] if close else "python -m launcher --help")


def _key_paths(kind: Any) -> list[str]:
    paths = []
    for item in dataclasses.fields(kind):
        paths.append(item.name)
        factory = item.default_factory
        if dataclasses.is_dataclass(factory):
            paths += [f"{item.name}.{path}" for path in _key_paths(factory)]
    return paths
