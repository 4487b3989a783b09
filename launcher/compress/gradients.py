"""Estimate the importance of weights from the gradients of a loss, for pruning coupled structures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from launcher.config.schema import ConfigError
from launcher.prompts.prompts import encode
from shards.load.load import load_weights
from shards.load.meta import build_meta

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from shards.checkpoint.checkpoint import Checkpoint

MOST_TOKENS = 512


def importance(checkpoint: Checkpoint, names: Collection[str], prompts: Path) -> dict[str, torch.Tensor]:
    """|weight x gradient| of parameters by name, in fp32: the first-order estimate of how the loss changes if a weight
    is removed.

    The loss is that of next-token prediction, summed over the prompts in a file (one per line), with one backward pass
    for each.
    Source: Ma, Fang, Wang, LLM-Pruner (2023), equation 5.
    """
    lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [prompt.token_ids[:MOST_TOKENS] for prompt in encode(lines, checkpoint.folder)] if lines else []
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ConfigError(
            f"prompts={prompts} has no line of two tokens or more.", "prompts= with sentences, one a line"
        )
    model = build_meta(checkpoint.folder, torch.float32)
    load_weights(model, checkpoint, "cpu")
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for row in rows:
        ids = torch.tensor([row])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    scores = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        scores[name] = parameter.grad.mul_(parameter.detach()).abs_()
    return scores
