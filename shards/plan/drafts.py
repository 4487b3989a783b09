"""The draft model in a plan: its memory on each device, and its time in a step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from shards.plan.cuts import whole_bytes
from shards.plan.roofline import Limit

if TYPE_CHECKING:
    from shards.plan.request import PlanRequest


def draft_bytes(request: PlanRequest, rank: int) -> tuple[int, int]:
    """Parameters, and keys and values, of a draft on a device: it is whole in every process, on its first device."""
    draft = request.draft
    if draft is None or (request.engine.one_process and rank > 0):
        return 0, 0
    alone = replace(request, shape=draft, quantization=None)
    windows = draft.windows or (None,) * draft.num_layers
    places = request.batch_size * sum(map(alone.kept_tokens, windows))
    width = 2 * draft.cached_heads() * draft.head_dim * request.product_bytes
    return whole_bytes(draft, alone.storage), places * width


def with_guesses(request: PlanRequest, limit: Limit | None) -> Limit | None:
    """The limit of a decode step in which all guesses hold, or of one without if guessing takes too long.

    A draft is read once for each guess, before the step that checks them all.
    """
    guesses = request.guessed_tokens
    if limit is None or not guesses:
        return limit
    bandwidth = request.device.bandwidth
    drafting = 0.0
    if request.draft is not None and bandwidth:
        drafting = guesses * request.draft.step_parameters * request.dtype_bytes / bandwidth
    seconds = limit.seconds + drafting
    tokens_per_s = limit.tokens_per_s * (guesses + 1) * limit.seconds / seconds
    return Limit(seconds, limit.bound, tokens_per_s) if tokens_per_s > limit.tokens_per_s else limit
