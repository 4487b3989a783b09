"""Compose a RunConfig from command-line overrides and `conf/`. Only this module and its folder use Hydra: no other
module sees a DictConfig."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from launcher.composition.messages import UNREADABLE, in_file, in_one_line
from launcher.composition.overrides import check_options, readable
from launcher.composition.presets import conf_dir, folders
from launcher.composition.quoting import in_quotes
from launcher.config.bounds import check
from launcher.config.engines import brought, engines
from launcher.config.keys import engine_of, strays, unknown_key
from launcher.config.machine import settle_machine
from launcher.config.schema import BackendConfig, RunConfig
from launcher.config.unread import check_read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig


def compose_run(overrides: list[str], config_dirs: tuple[str, ...] = (), for_others: tuple[str, ...] = ()) -> RunConfig:
    """The typed, checked configuration of one run; ConfigError with one line for any mistake.

    Keys `for_others` may be among the overrides even if this run does not use them.
    """
    own_folders = folders(config_dirs)[1:]
    search = ",".join(in_quotes(f"file://{folder.absolute()}") for folder in own_folders)
    overrides = readable(overrides)
    check_options(overrides, config_dirs)
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
    try:
        with initialize_config_dir(str(conf_dir().absolute()), version_base="1.3"):
            composed = compose("config", overrides=[*overrides, f"hydra.searchpath=[{search}]"])
        config = typed(composed, config_dirs)
    except UNREADABLE as error:
        raise in_one_line(error, overrides, config_dirs) from None
    given = {item.partition("=")[0].lstrip("+") for item in overrides}.difference(for_others)
    for part, key in ((config, "output_dir"), (config, "run_dir"), (config.prompts, "path"), (config.model, "path")):
        if path := getattr(part, key):
            setattr(part, key, os.path.expanduser(path))
    path = config.model.path  # a model of another path than its preset's is named after that
    if "model.path" in given and "model.name" not in given:
        config.model.name = path.removeprefix("embedded:")
        if ":" not in path:
            config.model.name = Path(os.path.realpath(path)).name or path
    settle_machine(config, given)
    check(config)
    check_read(config, given)
    return config


def typed(composed: DictConfig, config_dirs: Sequence[str]) -> RunConfig:
    """The composed values as dataclasses; ConfigError for an unknown key."""
    kind = OmegaConf.get_type(composed, "backend") or BackendConfig
    tree = cast("dict[str, Any]", OmegaConf.to_container(composed))
    options = tree.pop("backend", None) or {}
    unknown = [*strays(tree, RunConfig), *strays(options, kind, "backend.")]
    if unknown:
        raise in_file(unknown_key(unknown[0], engine_of(kind)), unknown[0], config_dirs)
    return cast("RunConfig", OmegaConf.to_object(composed))


def command_of(overrides: Sequence[str], config_dirs: Sequence[str]) -> tuple[str, ...]:
    """The command line that composes the same configuration."""
    return ("python", "-m", "launcher", *overrides, *(f"--config-dir={folder}" for folder in config_dirs))
