"""A transformers checkpoint converted by LitGPT's own script, and cached in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from litgpt.config import Config
from litgpt.scripts import convert_hf_checkpoint as script

from launcher.backends.litgpt.lora import merge
from shards.load.adapter import read_adapter
from shards.machine.rates import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MODEL, CONFIG = "lit_model.pth", "model_config.yaml"


def converted(folder: Path, values: Mapping[str, Any], adapter: Path | None = None) -> Path:
    """The folder with the converted checkpoint, with an adapter merged into it if one is given; created atomically if
    it is missing.

    Its name is a digest of the checkpoint's files (with their modification times), the config and LitGPT's version.
    """

    def convert(temporary: Path) -> None:
        files = _files(folder)
        for path in files:
            (temporary / path.name).symlink_to(path.resolve())
        with patch.object(Config, "from_name", lambda name: Config(**values)):
            script.convert_hf_checkpoint(temporary, model_name=values["name"])
        for path in files:
            (temporary / path.name).unlink()

    base = _kept(folder, [dict(values)], convert)
    if adapter is None:
        return base

    def add(temporary: Path) -> None:
        shutil.copy(base / CONFIG, temporary)
        merge(base / MODEL, base / CONFIG, read_adapter(adapter), temporary / MODEL)

    return _kept(adapter, [base.name], add)


def _kept(source: Path, others: list[Any], make: Callable[[Path], None]) -> Path:
    """The cached folder that `make` fills if it is missing; its key is the files of `source` and `others`."""
    known = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _files(source)]
    text = json.dumps([str(source.resolve()), known, *others, version("litgpt")])
    home = cache_folder(os.environ) / "litgpt"
    target = home / f"{source.name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if (target / MODEL).is_file():
        return target
    temporary = home / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        make(temporary)
        if not (target / MODEL).is_file():  # another run may have made it meanwhile
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())
