"""Compose a RunConfig from command-line overrides and `conf/`. Only this module and its folder use Hydra: no other
module sees a DictConfig."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from launcher.composition.messages import UNREADABLE, in_file, in_one_line
from launcher.composition.overrides import check_options, readable
from launcher.composition.trees import composed
from launcher.config.bounds import check
from launcher.config.keys import engine_of, strays, unknown_key
from launcher.config.machine import settle_machine
from launcher.config.schema import BackendConfig, RunConfig
from launcher.config.unread import check_read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig


def compose_run(overrides: list[str], config_dirs: tuple[str, ...] = (), for_others: tuple[str, ...] = ()) -> RunConfig:
    """The typed and checked configuration of one run; ConfigError for any mistake.

    Keys in `for_others` may be among the overrides even if this run does not use them.
    """
    overrides = readable(overrides)
    check_options(overrides, config_dirs)
    try:
        config = typed(composed(overrides, config_dirs), config_dirs)
    except UNREADABLE as error:
        raise in_one_line(error, overrides, config_dirs) from None
    given = {item.partition("=")[0].lstrip("+") for item in overrides}.difference(for_others)
    for part, key in ((config, "output_dir"), (config, "run_dir"), (config.prompts, "path"), (config.model, "path")):
        if path := getattr(part, key):
            setattr(part, key, os.path.expanduser(path))
    path = config.model.path  # if the path overrides that of the preset, the model is named after the path
    if "model.path" in given and "model.name" not in given:
        config.model.name = path.removeprefix("embedded:")
        if ":" not in path:
            config.model.name = Path(os.path.realpath(path)).name or path
    settle_machine(config, given)
    check(config)
    check_read(config, given)
    return config


def typed(tree: DictConfig, config_dirs: Sequence[str]) -> RunConfig:
    """The composed values as dataclasses; ConfigError for an unknown key."""
    kind = OmegaConf.get_type(tree, "backend") or BackendConfig
    plain = cast("dict[str, Any]", OmegaConf.to_container(tree))
    options = plain.pop("backend", None) or {}
    unknown = [*strays(plain, RunConfig), *strays(options, kind, "backend.")]
    if unknown:
        raise in_file(unknown_key(unknown[0], engine_of(kind)), unknown[0], config_dirs)
    return cast("RunConfig", OmegaConf.to_object(tree))


def command_of(overrides: Sequence[str], config_dirs: Sequence[str]) -> tuple[str, ...]:
    """The command line that composes the same configuration."""
    return ("python", "-m", "launcher", *overrides, *(f"--config-dir={folder}" for folder in config_dirs))
