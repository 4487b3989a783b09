"""Command-line overrides and `conf/` -> RunConfig. The border of Hydra: nothing past this module sees a DictConfig."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher.bounds import check
from launcher.config import BACKENDS, ConfigError, RunConfig
from launcher.quoting import in_quotes, with_quoted_paths

if TYPE_CHECKING:
    from collections.abc import Sequence

OPEN_KEYS = ("backend.extra.",)  # entries of these need no + before them


def conf_dir() -> Path:
    """The folder of configuration files: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def options(group: str) -> list[str]:
    """What `group=` can be set to."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def groups() -> list[str]:
    """The configuration groups, by name."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def compose_run(overrides: list[str], config_dirs: tuple[str, ...] = ()) -> RunConfig:
    """The typed, checked configuration of one run; ConfigError with one line for whatever is wrong with it."""
    _register_schemas()
    overrides = [f"+{item}" if item.startswith(OPEN_KEYS) else item for item in with_quoted_paths(overrides)]
    search = (
        [f"hydra.searchpath=[{','.join(in_quotes(f'file://{Path(d).absolute()}') for d in config_dirs)}]"]
        if config_dirs
        else []
    )
    try:
        with initialize_config_dir(str(conf_dir().absolute()), version_base="1.3"):
            composed = compose("config", overrides=overrides + search)
        if unknown := set(composed) - {item.name for item in dataclasses.fields(RunConfig)}:
            raise _unknown_key(str(min(unknown)))
        config = cast("RunConfig", OmegaConf.to_object(composed))
    except (HydraException, OmegaConfBaseException, AttributeError) as error:  # OmegaConf: {..} over a null dict
        raise _in_one_line(error) from None
    check(config)
    return config


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


def _in_one_line(error: Exception) -> ConfigError:
    """Hydra's and OmegaConf's messages as one line with a hint."""
    text = f"{error} {error.__cause__ or ''}".strip()
    if isinstance(error, MissingConfigException) and (found := re.search(r"find '(\w+)/([^']*)'", text)):
        group, option = found.groups()
        close = difflib.get_close_matches(option, options(group), 1)
        hint = f"{group}={close[0]}" if close else f"one of {', '.join(options(group))}"
        return ConfigError(f"{group}={option}: there is no such {group}.", hint)
    inner = re.search(r"override '([\w.]+)'.*Key '(\w+)' is not in struct", text, re.DOTALL)
    if inner and not inner.group(1).endswith(inner.group(2)):
        key, entry = inner.groups()
        return ConfigError(f"{key} is given entry by entry.", f"+{key}.{entry}=VALUE")
    if found := re.search(r"(?:Key|Could not override) '([\w.]+)'", text):
        return _unknown_key(found.group(1))
    if "--multirun" in text or "Ambiguous value" in text or "sweep" in text.lower():
        return ConfigError(text.splitlines()[0], "several values are a sweep: add -m")
    text = re.sub(r"See https?://\S+( for details)?|\b(full_key|object_type)[:=]\S*", "", text)
    return ConfigError(" ".join(text.split()), "python -m launcher --help")


def _unknown_key(key: str) -> ConfigError:
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
