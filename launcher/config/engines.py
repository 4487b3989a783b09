"""The engines by name: the built-in ones, and those of installed packages."""

from __future__ import annotations

import difflib
import gc
import importlib
import importlib.util
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.schema import BackendConfig, ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

BUILT_IN = {
    "dummy": "launcher.backends.dummy:DummyConfig",
    "fsdp": "launcher.backends.fsdp.engine:FsdpConfig",
    "deepspeed": "launcher.backends.deepspeed.engine:DeepSpeedConfig",
    "tensor_parallel": "launcher.backends.tensor_parallel.engine:TensorParallelConfig",
    "vllm": "launcher.backends.vllm.engine:VllmConfig",
    "transformers": "launcher.backends.transformers.engine:TransformersConfig",
    "litgpt": "launcher.backends.litgpt.engine:LitgptConfig",
    "endpoint": "launcher.backends.endpoint.engine:EndpointConfig",
}

GROUP = "launcher.backends"
"""The group of entry points in which a package registers its engines: mine = "package.module:MineConfig"."""

NO_PLAN = "no plan: this engine's memory is not known here"


@cache
def brought() -> dict[str, EntryPoint]:
    """The engines that installed packages register, by name; ConfigError for a name that is already taken."""
    entries: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in BUILT_IN or entry.name in entries:
            owner = "the launcher itself"
            if entry.name in entries:
                owner = _package(entries[entry.name])
            raise ConfigError(
                f"{_package(entry)} brings an engine {entry.name!r}, and so does {owner}.",
                f"pip uninstall {_package(entry)}",
            )
        entries[entry.name] = entry
    return entries


def names() -> tuple[str, ...]:
    """The names of all engines."""
    return (*BUILT_IN, *brought())


@cache
def load_engine(name: str) -> type[BackendConfig]:
    """The engine of this name; ConfigError for an unknown name, or if the package's engine is invalid."""
    kind: Any
    if name in BUILT_IN:
        kind = resolve(BUILT_IN[name])
        return kind  # type: ignore[no-any-return]
    if name not in brought():
        near = difflib.get_close_matches(str(name), names(), 1, cutoff=0)[0]
        raise ConfigError(f"There is no engine {name!r} among {', '.join(names())}.", f"backend={near}")
    entry = brought()[name]
    source = f"{_package(entry)} brings backend={entry.name} as {entry.value}"
    hint = f"ask its authors, or pip uninstall {_package(entry)}"
    try:
        kind = entry.load()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        fact = f"{source}, which cannot be imported: {type(error).__name__}: {lines[0]}."
        raise ConfigError(fact, hint) from error
    if not (isinstance(kind, type) and issubclass(kind, BackendConfig)):
        raise ConfigError(f"{source}, which is no subclass of {BackendConfig.__module__}.BackendConfig.", hint)
    if getattr(kind, "name", None) != entry.name or ":" not in kind.implementation:
        raise ConfigError(
            f"{source}, which has name={getattr(kind, 'name', None)!r} and implementation={kind.implementation!r}.",
            f'name: str = "{entry.name}" and implementation: ClassVar[str] = "module:Class"',
        )
    return kind


def engines() -> dict[str, type[BackendConfig]]:
    """All engines by name, without those of packages that cannot be loaded."""
    usable = {}
    for name in names():
        try:
            usable[name] = load_engine(name)
        except ConfigError:
            continue
    return usable


def example_with(ability: str) -> str:
    """`backend=NAME` of the first engine with this ability (`can_score`, `is_reference`), for a hint."""
    return next(f"backend={name}" for name, kind in engines().items() if getattr(kind, ability))


def planned_engines() -> tuple[str, ...]:
    """The engines that have a planner."""
    return tuple(name for name, kind in engines().items() if kind.planner_class)


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.module.partition(".")[0]


def conf_folders() -> list[Path]:
    """The `conf` folders of packages that register engines, found without importing the packages."""
    folders = []
    for package in dict.fromkeys(entry.module.partition(".")[0] for entry in brought().values()):
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        for location in spec.submodule_search_locations or ():
            if (Path(location) / "conf").is_dir():
                folders.append(Path(location) / "conf")
    return folders


def resolve(reference: str) -> Any:
    """The object that "module:name" refers to; imports the module.

    Garbage collection is off during the import: it would free nothing and take a sixth of an engine's import time.
    """
    module, _, name = reference.partition(":")
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        if was_enabled:
            gc.enable()
