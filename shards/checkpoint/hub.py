"""The name of a model -> a folder on this machine that holds it. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

import huggingface_hub

from shards.errors import CheckpointError

DESCRIPTION = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
SAFETENSORS = "model*.safetensors"
LEGACY = "pytorch_model*.bin"
SUBFOLDERS = "*/*"  # not downloaded: other formats and original files


def resolve(path: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder `path` itself, or the local snapshot of the hub id `path`, downloaded if it is missing.

    Downloads show their progress on a terminal, resume, and go to the cache of huggingface_hub, whose settings
    (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE) apply. The .bin files are downloaded only if there are no
    safetensors; without `weights` neither are. CheckpointError if there is no such model or its download fails.
    """
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    if os.path.lexists(folder) or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path):
        raise CheckpointError(
            f"{path} is neither a folder nor the id of a model on the hub.",
            "give a folder that holds config.json, or an id such as tiiuae/falcon-40b",
        )
    if not weights:
        return _snapshot(path, revision, *DESCRIPTION)
    snapshot = _snapshot(path, revision, *DESCRIPTION, SAFETENSORS)
    if any(snapshot.glob(SAFETENSORS)):
        return snapshot
    return _snapshot(path, revision, *DESCRIPTION, LEGACY)


def _snapshot(path: str, revision: str | None, *patterns: str) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(
                path, revision=revision, allow_patterns=list(patterns), ignore_patterns=[SUBFOLDERS]
            )
        )
    except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:
        raise _explained(path, revision, error) from None


def _explained(path: str, revision: str | None, error: Exception) -> CheckpointError:
    hub = huggingface_hub.constants.ENDPOINT
    cache = huggingface_hub.constants.HF_HUB_CACHE
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    match error:
        case huggingface_hub.errors.GatedRepoError():
            return CheckpointError(
                f"{path} is gated: {hub} does not give it to you.", f"ask at {hub}/{path}, then {log_in}"
            )
        case huggingface_hub.errors.RepositoryNotFoundError():
            return CheckpointError(
                f"There is no folder {path}, and no model {path} at {hub} that you may see.",
                f"check the spelling; if the model is private, {log_in}",
            )
        case huggingface_hub.errors.RevisionNotFoundError():
            return CheckpointError(
                f"{path} at {hub} has no revision {revision}.", "model.revision=null, which is its newest"
            )
        case huggingface_hub.errors.LocalEntryNotFoundError() if huggingface_hub.constants.HF_HUB_OFFLINE:
            return CheckpointError(
                f"{path} is not complete in the cache of the hub, and HF_HUB_OFFLINE is set.",
                f"unset HF_HUB_OFFLINE, set HF_HOME to the right cache (now {cache}), or give a folder",
            )
        case huggingface_hub.errors.LocalEntryNotFoundError():
            return CheckpointError(
                f"{hub} cannot be reached, and {path} is not complete in the cache.",
                "check the network, the proxy and HF_ENDPOINT, or give a folder that holds the model",
            )
    reason = str(error).strip().partition("\n")[0]
    return CheckpointError(f"{path} could not be downloaded from {hub}: {reason}", "run again: the download resumes")
