"""Command-line overrides and `conf/` -> RunConfig. The border of Hydra: nothing past this module sees a DictConfig."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from launcher.config.bounds import check
from launcher.config.messages import UNREADABLE, in_one_line, unknown_key
from launcher.config.overrides import in_quotes, with_quoted_paths
from launcher.config.schema import BACKENDS, ConfigError, RunConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

OPEN_KEYS = ("backend.extra.",)  # entries of these need no + before them


def conf_dir() -> Path:
    """The folder of configuration files: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def options(group: str, config_dirs: Sequence[str] = ()) -> list[str]:
    """What `group=` can be set to, with what the user's own folders have of it."""
    return sorted({path.stem for folder in _folders(config_dirs) for path in (folder / group).glob("*.yaml")})


def groups() -> list[str]:
    """The configuration groups, by name."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def _folders(config_dirs: Sequence[str]) -> list[Path]:
    """Where configuration files are; ConfigError for a folder of the user's that is none."""
    for name in config_dirs:
        if not name or not Path(name).is_dir():
            raise ConfigError(f"--config-dir={name} is not a folder.", "--config-dir=FOLDER, which has model/mine.yaml")
    return [conf_dir(), *map(Path, config_dirs)]


def compose_run(overrides: list[str], config_dirs: tuple[str, ...] = ()) -> RunConfig:
    """The typed, checked configuration of one run; ConfigError with one line for whatever is wrong with it."""
    _register_schemas()
    overrides = [f"+{item}" if item.startswith(OPEN_KEYS) else item for item in with_quoted_paths(overrides)]
    own = ",".join(in_quotes(f"file://{folder.absolute()}") for folder in _folders(config_dirs)[1:])
    search = [f"hydra.searchpath=[{own}]"] if own else []
    try:
        with initialize_config_dir(str(conf_dir().absolute()), version_base="1.3"):
            composed = compose("config", overrides=overrides + search)
        if unknown := set(composed) - {item.name for item in dataclasses.fields(RunConfig)}:
            raise unknown_key(str(min(unknown)))
        config = cast("RunConfig", OmegaConf.to_object(composed))
    except UNREADABLE as error:
        raise in_one_line(error, overrides, lambda group: options(group, config_dirs)) from None
    _complete(config, {item.partition("=")[0].lstrip("+") for item in overrides})
    check(config)
    return config


def _complete(config: RunConfig, given: set[str]) -> None:
    """Paths with the user's `~` in full; a model of another path than its preset's is named after that."""
    for part, key in ((config, "output_dir"), (config, "run_dir"), (config.prompts, "path"), (config.model, "path")):
        if path := getattr(part, key):
            setattr(part, key, os.path.expanduser(path))
    path = config.model.path
    if "model.path" in given and "model.name" not in given:
        config.model.name = path.removeprefix("embedded:") if ":" in path else Path(path).resolve().name or path


def command_of(overrides: Sequence[str], config_dirs: Sequence[str]) -> tuple[str, ...]:
    """The command that composes the same."""
    return ("python", "-m", "launcher", *overrides, *(f"--config-dir={folder}" for folder in config_dirs))


def expand_sweep(overrides: list[str]) -> list[list[str]]:
    """The points of `-m a=1,2 b=x,y`: one list of overrides each, the last key fastest."""
    overrides = with_quoted_paths(overrides)
    parsed = OverridesParser.create().parse_overrides(overrides)
    axes = []
    for text, override in zip(overrides, parsed, strict=True):
        if override.is_sweep_override():
            key = override.get_key_element()
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([text])
    return [list(point) for point in itertools.product(*axes)]


def _register_schemas() -> None:
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=RunConfig, package="_global_")
    for name, schema in BACKENDS.items():
        store.store(group="schema/backend", name=name, node=schema)
