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

from shards.machine.rates import cache_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

MODEL = "lit_model.pth"


def converted(folder: Path, values: Mapping[str, Any]) -> Path:
    """The folder with the converted checkpoint; it is converted now if it is missing, atomically.

    Its name is a digest of the checkpoint's files (with their modification times), the config and LitGPT's version.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    known = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    text = json.dumps([str(folder.resolve()), known, dict(values), version("litgpt")])
    home = cache_folder(os.environ) / "litgpt"
    target = home / f"{folder.name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if (target / MODEL).is_file():
        return target
    temporary = home / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for path in files:
            (temporary / path.name).symlink_to(path.resolve())
        with patch.object(Config, "from_name", lambda name: Config(**values)):
            script.convert_hf_checkpoint(temporary, model_name=values["name"])
        for path in files:
            (temporary / path.name).unlink()
        if not (target / MODEL).is_file():  # another run may have made it meanwhile
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
