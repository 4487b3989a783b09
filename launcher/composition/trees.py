"""Compose the tree of values from overrides and files.

Trees of built-in files are cached: most points of a sweep differ only in values, and Hydra takes a sixth of a second.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TYPE_CHECKING

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher.composition.overrides import parse
from launcher.composition.presets import conf_dir, folders, groups
from launcher.composition.quoting import in_quotes
from launcher.config.engines import brought, engines
from launcher.config.schema import RunConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from omegaconf import DictConfig

MOST_KEPT = 128
"""The number of cached trees; there are about 50 presets of experiments."""


def composed(overrides: Sequence[str], config_dirs: Sequence[str]) -> DictConfig:
    """The tree for overrides in Hydra's grammar; raises one of UNREADABLE for a mistake in them, or in a file."""
    own_folders = folders(config_dirs)[1:]
    _register(own_folders)
    search = ",".join(in_quotes(f"file://{folder.absolute()}") for folder in own_folders)
    everything = [*overrides, f"hydra.searchpath=[{search}]"]
    parsed = [parse(item) for item in overrides]
    changes = all(override.type is OverrideType.CHANGE and not override.package for override in parsed)
    if own_folders or not changes:  # not cached: files of the user or a package may change during this process
        return _by_hydra(everything)
    chosen = [item for item, override in zip(overrides, parsed, strict=True) if override.key_or_group in groups()]
    chosen.sort(key=lambda item: item.partition("=")[0])  # a stable sort, so that the last option of a group still wins
    tree = copy.deepcopy(_of_files(tuple(chosen), conf_dir(), tuple(engines().items())))
    for override in parsed:
        if override.key_or_group not in groups():
            try:
                OmegaConf.update(tree, override.key_or_group, override.value(), merge=True)
            except OmegaConfBaseException as error:
                raise HydraException(f"{override.input_line} does not fit.") from error  # as Hydra itself does
    return tree


@lru_cache(MOST_KEPT)
def _of_files(chosen: tuple[str, ...], *_: object) -> DictConfig:
    """The cached tree of the chosen files; the other arguments are only part of the cache key."""
    return _by_hydra(chosen)


def _by_hydra(overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(conf_dir().absolute()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def _register(own_folders: Sequence[Path]) -> None:
    """Register the schemas of the run and of all engines with Hydra."""
    store = ConfigStore.instance()
    known = store.repo.get("schema", {})
    if "run.yaml" not in known:
        store.store(group="schema", name="run", node=RunConfig, package="_global_")
    for name, schema in engines().items():
        entry = known.get("backend", {}).get(f"{name}.yaml")
        if entry is None or OmegaConf.get_type(entry.node) is not schema:
            store.store(group="schema/backend", name=name, node=schema)
        if name in brought() and not any((folder / f"backend/{name}.yaml").is_file() for folder in own_folders):
            store.store(group="backend", name=name, node=schema)  # an engine without a file has its defaults
