"""The folders of configuration files: groups, their options, and the defaults of a run."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from launcher.config.engines import brought, conf_folders
from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


def conf_dir() -> Path:
    """The folder of the built-in configuration files: inside the installed package, next to it in a checkout."""
    package = Path(__file__).parents[1]
    if (package / "conf").is_dir():
        return package / "conf"
    return package.parent / "conf"


def folders(config_dirs: Sequence[str]) -> list[Path]:
    """The folders of configuration files: built-in, the user's, and those of packages with engines; ConfigError for a
    user's folder that does not exist."""
    for name in config_dirs:
        if not name or not Path(name).is_dir():
            raise ConfigError(f"--config-dir={name} is not a folder.", "--config-dir=FOLDER, which has model/mine.yaml")
    return [conf_dir(), *map(Path, config_dirs), *conf_folders()]


@cache
def groups() -> list[str]:
    """The configuration groups, by name."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def options(group: str, config_dirs: Sequence[str] = ()) -> list[str]:
    """The options of a group, including those in the user's folders and in packages with engines."""
    names = {path.stem for folder in folders(config_dirs) for path in (folder / group).glob("*.yaml")}
    if group == "backend":
        names.update(brought())
    return sorted(names)


@cache
def default_options() -> dict[str, str]:
    """The default option of each group."""
    base = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
    chosen: dict[str, str] = {}
    for entry in base["defaults"]:
        if isinstance(entry, dict):
            chosen |= entry
    return chosen
