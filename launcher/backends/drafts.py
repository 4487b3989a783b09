"""The source of draft tokens for engines that run a transformers module: a draft model, whole on the first device of
each process, or prompt lookup, which needs no model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from launcher.backends.memory import parameter_bytes
from launcher.backends.slots.drafting.guesses import Draft, Guesser, Lookup
from launcher.config.parts.speculative import DRAFT, NGRAM
from shards.checkpoint.checkpoint import Checkpoint
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.parallel.families import keep_kv_heads_only

if TYPE_CHECKING:
    from collections.abc import Callable

    from launcher.backends.base import DeviceMemory
    from launcher.config.parts.speculative import SpeculativeConfig


def make_guesser(
    speculative: SpeculativeConfig, dtype: torch.dtype, device: torch.device, prepare: Callable[[torch.nn.Module], None]
) -> Guesser | None:
    """The guesser of a run, None without speculative decoding. `prepare` is called with a draft model after its weights
    are loaded."""
    if speculative.name == NGRAM:
        return Lookup(speculative.ngram_max or 1, speculative.ngram_min or 1, device)
    if speculative.name != DRAFT:
        return None
    folder = Path(speculative.model or "")
    model = build_meta(folder, dtype, False)
    keep_kv_heads_only(model)
    load_weights(model, Checkpoint.open(folder), device, lambda done, total: None)
    prepare(model)
    return Draft(model, device)


def with_draft(memory: DeviceMemory, guesser: Guesser | None) -> DeviceMemory:
    """The memory of a device, including its draft model."""
    if not isinstance(guesser, Draft):
        return memory
    memory = replace(memory, draft_parameter_bytes=parameter_bytes(guesser.model, guesser.device))
    if guesser.slots is None:
        return memory
    return replace(memory, draft_cache_bytes=sum(guesser.slots.cache.num_bytes().values()))
