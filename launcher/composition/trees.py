"""The tree of values that overrides and files give. What the built-in files give is composed once in a process: most
points of a sweep differ by values alone, and Hydra takes a sixth of a second."""

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
"""Trees of chosen files that are kept; there are some 50 presets of experiments."""


def composed(overrides: Sequence[str], config_dirs: Sequence[str]) -> DictConfig:
    """The values of overrides in Hydra's grammar; one of UNREADABLE for a mistake in them, or in a file."""
    own_folders = folders(config_dirs)[1:]
    _register(own_folders)
    search = ",".join(in_quotes(f"file://{folder.absolute()}") for folder in own_folders)
    everything = [*overrides, f"hydra.searchpath=[{search}]"]
    parsed = [parse(item) for item in overrides]
    changes = all(override.type is OverrideType.CHANGE and not override.package for override in parsed)
    if own_folders or not changes:  # files of others may change while this process lives
        return _by_hydra(everything)
    chosen = [item for item, override in zip(overrides, parsed, strict=True) if override.key_or_group in groups()]
    chosen.sort(key=lambda item: item.partition("=")[0])  # of one group the last stays the last
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
    """The values of files, composed anew where any of the arguments is another."""
    return _by_hydra(chosen)


def _by_hydra(overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(conf_dir().absolute()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def _register(own_folders: Sequence[Path]) -> None:
    """Tell Hydra the types of all values."""
    store = ConfigStore.instance()
    known = store.repo.get("schema", {})
    if "run.yaml" not in known:
        store.store(group="schema", name="run", node=RunConfig, package="_global_")
    for name, schema in engines().items():
        entry = known.get("backend", {}).get(f"{name}.yaml")
        if entry is None or OmegaConf.get_type(entry.node) is not schema:
            store.store(group="schema/backend", name=name, node=schema)
        if name in brought() and not any((folder / f"backend/{name}.yaml").is_file() for folder in own_folders):
            store.store(group="backend", name=name, node=schema)  # with its defaults, where it has no file
