"""The keys of a configuration, from the dataclasses of its schema, and the nearest key to a misspelled one."""

from __future__ import annotations

import dataclasses
import difflib
import types
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, cast, get_args, get_origin, get_type_hints

from launcher.config.engines import engines, load_engine
from launcher.config.schema import ConfigError, RunConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from launcher.config.schema import BackendConfig
    from shards.untrusted_files import JsonObject

ALL = "which shows every key"
ALL_KEYS = f"python -m launcher --cfg, {ALL}"

LEAST_ALIKE = 0.7
"""The similarity of two words (difflib's ratio) from which one counts as a misspelling of the other."""

OTHER_WORDS = {
    "batch": "measure.batch_size",
    "dtype": "precision",
    "engine": "backend",
    "gpus": "devices",
    "max_tokens": "sampling.max_new_tokens",
    "n_gpus": "devices",
    "nnodes": "num_nodes",
    "nodes": "num_nodes",
    "nproc_per_node": "devices",
    "num_gpus": "devices",
    "tensor_parallel_size": "devices",
    "tp": "devices",
}
"""Names that other tools use for a key."""

SAME_VALUES = {"gpu": "cuda", "float": "fp32", "half": "fp16"}
"""Names that other tools use for a member of an Enum, for hints; a member's value (torch's dtype name) works too."""


def key_types(kind: type, prefix: str = "") -> JsonObject:
    """The type of every key of a dataclass, at every depth, by its dotted path."""
    hints = type_hints(kind)
    types: JsonObject = {}
    for field in dataclasses.fields(kind):
        path, hint = prefix + field.name, without_none(hints[field.name])
        types[path] = hint
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            types |= key_types(hint, f"{path}.")
    return types


@cache
def run_keys(engine: str) -> JsonObject:
    """The type of every key that a run with this engine has."""
    return key_types(RunConfig) | key_types(load_engine(engine), "backend.")


def known_keys(engine: str | None) -> JsonObject:
    """The type of each key that a run can have: those of all engines if the engine is not known."""
    if engine:
        return run_keys(engine)
    return {path: hint for name in engines() for path, hint in run_keys(name).items()}


def engine_of(kind: type[BackendConfig]) -> str | None:
    """The name of the engine that a dataclass configures."""
    return next((name for name, other in engines().items() if other is kind), None)


def without_none(hint: Any) -> Any:
    """`X` for a type `X | None`; other types unchanged."""
    if isinstance(hint, types.UnionType):
        return next(option for option in get_args(hint) if option is not types.NoneType)
    return hint


def is_open(hint: Any) -> bool:
    """True for a dict or a list, whose entries the user chooses."""
    return get_origin(hint) in (dict, list)


def has_key(key: str, known: Mapping[str, Any]) -> bool:
    """True if a dotted key is one of `known`, an entry with a name chosen by the user, or an item of a list."""
    if key in known:
        return True
    parts = key.split(".")
    for count in range(1, len(parts)):
        parent = ".".join(parts[:count])
        if parent in known and is_open(known[parent]):
            return get_origin(known[parent]) is dict or parts[count].isdigit()
    return False


@cache
def type_hints(kind: type) -> Mapping[str, Any]:
    """The types of a dataclass's fields by name; cached, because a configuration is read many times in a run."""
    return get_type_hints(kind)


def strays(tree: Mapping[str, Any], kind: type, prefix: str = "") -> Iterator[str]:
    """The dotted keys in a tree of plain values that the dataclass does not have."""
    hints = type_hints(kind)
    for name, value in tree.items():
        if name not in hints:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(hint := without_none(hints[name])) and isinstance(value, dict):
            yield from strays(value, cast("type", hint), f"{prefix}{name}.")


def unknown_key(key: str, engine: str | None, value: str | None = None) -> ConfigError:
    """The error for an unknown key; the hint is the nearest key with the given value, or with a valid one. `engine` is
    None if it is not known."""
    known = known_keys(engine)
    is_option = key.startswith("backend.")
    fact, hint = f"{key} is not a key of the configuration.", ALL_KEYS
    if engine and is_option:
        fact, hint = f"{key} is not an option of backend={engine}.", f"python -m launcher backend={engine} --cfg, {ALL}"
    if near := nearest(key, known):
        return ConfigError(fact, f"{near}={value or example_of(known[near])}")
    if is_option:
        for other in engines():
            engine_keys = run_keys(other)
            if near := nearest(key, [path for path in engine_keys if path.startswith("backend.")]):
                return ConfigError(fact, f"backend={other} {near}={value or example_of(engine_keys[near])}")
    return ConfigError(fact, hint)


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The key that was most likely meant: a sibling, one with the same last word, or a similar one."""
    paths = list(known)
    word = key.replace("-", "_")
    if word in paths:
        return word
    if (other := OTHER_WORDS.get(word)) in paths:
        return other
    parent, _, leaf = word.rpartition(".")
    beside = {path.rpartition(".")[2]: path for path in paths if path.rpartition(".")[0] == parent}
    if close := difflib.get_close_matches(leaf, beside, 1, cutoff=LEAST_ALIKE):
        return beside[close[0]]
    alike = difflib.get_close_matches(leaf, {path.rpartition(".")[2] for path in paths}, 1, cutoff=LEAST_ALIKE)
    same = [path for path in paths if path.rpartition(".")[2] in alike]
    return next(iter(difflib.get_close_matches(word, same, 1, cutoff=0)), None)


def wrong_value(key: str, value: Any, hint: Any) -> ConfigError:
    """The error for a value whose type does not fit its key."""
    given = str(value)
    if value is None:
        given = "null"
    if isinstance(hint, type) and issubclass(hint, Enum):
        word = SAME_VALUES.get(given.lower(), given.lower())
        by_value = {str(member.value): name for name, member in hint.__members__.items()}
        near = by_value.get(word) or difflib.get_close_matches(word, hint.__members__, 1, cutoff=0)[0]
        return ConfigError(f"{key}={given} is not one of {', '.join(hint.__members__)}.", f"{key}={near}")
    if value is None:
        return ConfigError(f"{key}=null is not a value.", f"leave {key} out")
    kind, example = _kind(hint)
    hint = f"leave {key} out"
    if example:
        hint = f"{key}={example}"
    return ConfigError(f"{key}={given} is not {kind}.", hint)


def example_of(hint: Any) -> str:
    """A value that a key of this type can have."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return next(iter(hint.__members__))
    return _kind(hint)[1] or "VALUE"


def _kind(hint: Any) -> tuple[str, str]:
    """A description of a type and an example value; no example for a group of keys."""
    kinds = {
        bool: ("true or false", "true"),
        int: ("a whole number", "1"),
        float: ("a number", "1"),
        str: ("a text", "TEXT"),
        list: ("a list", "[a,b]"),
        dict: ("a group of entries", "{a:b}"),
    }
    return kinds.get(get_origin(hint) or hint, ("a group of keys", ""))
