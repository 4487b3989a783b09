"""What DeepSpeed-Inference cannot do, found before anything starts. No torch, no DeepSpeed."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.schema import ConfigError, DeepSpeedConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.config.schema import RunConfig

OPERATION = "deepspeed_shm_comm"
SEGMENT_BYTES = 69_206_024
"""What each rank of the shared-memory all-reduce allocates. Source: allreduce_workspace in csrc/cpu/comm/shm.cpp."""

KERNEL_FAMILIES = ("bloom", "gpt2", "gpt_neo", "gpt_neox", "gptj", "internlm", "llama", "opt")
"""Decoder models that DeepSpeed has kernels for. Source: module_inject/replace_policy.py."""

UNCUTTABLE = {
    "gpt2": "DeepSpeed's own list excludes it",
    "xlnet": "DeepSpeed's own list excludes it",
    "xlm": "DeepSpeed's own list excludes it",
    "codegen": "it interleaves the blocks of its fused projection",
    "glm": "it cuts its fused projections in several blocks",
    "gpt_bigcode": "it gives every rank all keys and values",
    "mpt": "it cuts its fused projection in several blocks",
    "olmo2": "it cuts the heads and not the norm over all of them",
    "phi3": "it cuts its fused projections in several blocks",
}
"""Families that AutoTP does not cut, or cuts otherwise than by one block a rank, which is what our loader fills."""

PLAIN = "backend.kernel_inject=false, which is tensor parallel with transformers' own layers"


def refuse_deepspeed(config: RunConfig, model_config: Mapping[str, Any], on_cuda: bool, longest: int) -> None:
    """Raise ConfigError for what DeepSpeed would get wrong, most of it in silence.

    `longest` is the most tokens that a prompt and its answer have together.
    """
    options = config.backend
    if not isinstance(options, DeepSpeedConfig):
        return
    family = str(model_config.get("model_type"))
    if options.kernel_inject:
        raise ConfigError(f"backend.kernel_inject=true: {_without_kernels(family, on_cuda)}.", PLAIN)
    if config.devices * config.num_nodes > 1:
        _refuse_cut(family, model_config)
    if options.max_out_tokens is not None and options.max_out_tokens < longest:
        raise ConfigError(
            f"backend.max_out_tokens={options.max_out_tokens}, and the longest prompt with its answer has {longest}.",
            f"backend.max_out_tokens={longest}, or null for as long as needed",
        )


def _without_kernels(family: str, on_cuda: bool) -> str:
    """Why kernel injection is of no use for a model."""
    if family not in KERNEL_FAMILIES:
        return f"DeepSpeed has no kernels for {family}; it would replace nothing, shard nothing and not say so"
    if not on_cuda:
        return f"DeepSpeed's kernels for {family} run on CUDA only"
    return (
        f"DeepSpeed's layers for {family} keep keys and values to themselves and return tuples, where transformers 5 "
        "looks for them in its own cache and takes tensors"
    )


def _refuse_cut(family: str, model_config: Mapping[str, Any]) -> None:
    """Refuse what AutoTP would cut wrongly over several devices."""
    elsewhere = "backend=fsdp, or devices=1"
    if reason := UNCUTTABLE.get(family):
        raise ConfigError(f"DeepSpeed's AutoTP cannot be used for {family}: {reason}.", elsewhere)
    if family == "falcon" and model_config.get("alibi"):
        raise ConfigError(
            "DeepSpeed's AutoTP cuts the heads of a Falcon and not its alibi, which has one slope a head.", elsewhere
        )


def notes_deepspeed(config: RunConfig, on_cuda: bool) -> list[str]:
    """What the user should know before a run that will be slower than it could be."""
    single_node = config.devices > 1 and config.num_nodes == 1
    if not isinstance(config.backend, DeepSpeedConfig) or on_cuda or not single_node:
        return []
    elsewhere = config.backend.python is not None or _compiled_before()
    reason = (None if elsewhere else missing_compiler()) or missing_shared_memory(config.devices)
    return [f"DeepSpeed's ranks add up over gloo, two to three times slower: {reason}"] if reason else []


def extensions_folder() -> Path:
    """Where the shared-memory all-reduce is compiled: in this virtual environment, else in the user's cache.

    By version, since what was compiled for one torch crashes under another, and apart from what other environments
    compile: their ninja would start over, and their locks outlive them.
    """
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    own = sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK)
    root = Path(sys.prefix) if own else Path.home() / ".cache"
    return root / "torch_extensions" / f"torch-{version('torch')}_deepspeed-{version('deepspeed')}"


def _compiled_before() -> bool:
    return (extensions_folder() / OPERATION / f"{OPERATION}.so").is_file()


def missing_compiler() -> str | None:
    """What is missing to compile the shared-memory all-reduce."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler):
        return None
    return f"no {compiler} here to compile its shared-memory all-reduce with (apt install g++)"


def missing_shared_memory(ranks: int) -> str | None:
    """Whether /dev/shm lacks the room that the ranks of this node need."""
    try:
        room = os.statvfs("/dev/shm")
    except OSError as error:
        return f"/dev/shm: {error.strerror}"
    free, needed = room.f_bavail * room.f_frsize, ranks * SEGMENT_BYTES
    if free >= needed:
        return None
    mib = 1 << 20
    return f"/dev/shm has {free // mib} MiB free, {ranks} ranks need {needed // mib + 1} (docker run --shm-size=1g)"
