"""Embedded models, small enough to ship: real architectures, trained to answer the default prompts."""

from __future__ import annotations

import difflib
from pathlib import Path

from launcher.config.schema import ConfigError

EMBEDDED = Path(__file__).parent


def embedded_folder(path: str, key: str) -> Path | None:
    """The folder for a path `embedded:NAME`, None for another kind of path; ConfigError for an unknown NAME.

    `key` is the configuration key that the path belongs to.
    """
    name = path.removeprefix("embedded:")
    if name == path:
        return None
    if not (EMBEDDED / name / "config.json").is_file():
        known = sorted(config.parent.name for config in EMBEDDED.glob("*/config.json"))
        near = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
        raise ConfigError(f"There is no embedded model {name!r}.", f"{key}=embedded:{near}")
    return EMBEDDED / name
