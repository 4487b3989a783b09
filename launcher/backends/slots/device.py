"""The forwards of a model over its slots, and what they leave on the device: nothing here waits for it."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import torch

from launcher.backends.slots.attention import use_slots
from launcher.backends.slots.cache import Reading, SlotCache, Stepping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.backends.slots.schedule import Read, Sequence, Step

BLOCK = 64
"""Attention spans as many positions as the longest row has, rounded up to a multiple of these, and a mask hides what
lies behind the others. Rows of one length need neither: without a mask CUDA has flash attention."""


class Slots:
    """The cache of a model, and of each row its newest token and the position where that will lie.

    `read` and `step` give logits [rows, vocabulary] in fp32; `keep` takes what was chosen from them.
    """

    def __init__(self, model: Any, slots: int, length: int, device: torch.device, spare: int = 0) -> None:
        self.model, self.device = model, device
        use_slots(model)
        self.cache = SlotCache(model.config, slots, length, spare)
        self.tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self.positions = torch.zeros(slots, dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)
        self.seen, self.hidden = (torch.tensor(value, dtype=model.dtype, device=device) for value in (0.0, -torch.inf))
        self.takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
        self.is_alibi = bool(getattr(model.config, "alibi", False)) or not self.takes_positions
        kinds = {layer.is_sliding: layer.size for layer in self.cache.layers}
        self.needs_mask = self.is_alibi or True in kinds  # transformers' own would not know the order in a window
        self.mask_sizes = {"sliding_attention" if kind else "full_attention": size for kind, size in kinds.items()}

    def read(self, forward: Read) -> torch.Tensor:
        """Read prompts, or a chunk of one; the logits of the last token of each."""
        self.move(forward)
        prompts = [one.prompt.token_ids[forward.start : forward.start + forward.width] for one in forward.sequences]
        ids = torch.tensor([list(one) + [0] * (forward.width - len(one)) for one in prompts], device=self.device)
        ends = torch.tensor([forward.start + len(one) for one in prompts], device=self.device)
        rows = torch.tensor([one.row for one in forward.sequences], device=self.device)
        self.cache.do(Reading(rows, ends, forward.sequences[0].row, forward.start))
        positions = torch.arange(forward.start, forward.start + forward.width, device=self.device)
        self.positions.index_copy_(0, rows, ends)
        if len(set(map(len, prompts))) == 1:
            return self._logits(ids, positions.expand(len(prompts), -1), None, 1)
        with last_tokens(self.model.get_output_embeddings(), ends - 1):
            return self._logits(ids, positions.expand(len(prompts), -1), None, 0)

    def step(self, forward: Step) -> torch.Tensor:
        """Decode a token of each row."""
        self.move(forward)
        rows = len(forward.sequences)
        lengths = {one.length + 1 for one in forward.sequences}
        is_even = len(lengths) == 1 and not self.needs_mask
        reach = max(lengths) if is_even else min(-(-max(lengths) // BLOCK) * BLOCK, self.cache.length)
        positions = self.positions[:rows, None]
        self.cache.do(Stepping(rows, positions, reach))
        mask = None if is_even else self._mask(positions, reach)
        logits = self._logits(self.tokens[:rows, None], positions, mask, 1)
        self.positions[:rows].add_(1)
        return logits

    def keep(self, forward: Read | Step, chosen: torch.Tensor) -> None:
        """Note the newest tokens of the rows of a forward."""
        rows = [one.row for one in forward.sequences]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            self.tokens[rows[0] : rows[0] + len(rows)].copy_(chosen)
        else:
            self.tokens[torch.tensor(rows, device=self.device)] = chosen

    def idle(self) -> None:
        """A forward for the sake of the other ranks, of which nothing is kept."""
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)

    def clear(self, sequences: tuple[Sequence, ...]) -> None:
        """Leave nothing of those before in the slots of some sequences."""
        for one in sequences:
            self.cache.clear(one.row)

    def move(self, forward: Read | Step) -> None:
        """Make the moves of a forward."""
        for source, target in forward.moves:
            self.cache.move(source, target)
            for tensor in (self.tokens, self.positions):
                tensor[target].copy_(tensor[source])

    def _logits(self, ids: torch.Tensor, positions: torch.Tensor, mask: Any, kept: int) -> torch.Tensor:
        return self._all_logits(ids, positions, mask, kept)[:, -1]

    def _all_logits(self, ids: torch.Tensor, positions: torch.Tensor, mask: Any, kept: int) -> torch.Tensor:
        options = {"position_ids": positions} if self.takes_positions else {}
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=kept,
            **options,
        )
        logits: torch.Tensor = output.logits
        return logits[:, -kept:].float()

    def _mask(self, positions: torch.Tensor, reach: int) -> Any:
        """The mask of a step: each row sees all up to its newest token, [rows, 1, 1, reach]; a mask for each kind of
        layer if there are several.

        Families with ALiBi make biases of a mask [rows, reach] themselves.
        """
        is_seen = self.places[:reach] <= positions
        if self.is_alibi:
            return is_seen.long()
        mask = torch.where(is_seen, self.seen, self.hidden)[:, None, None]
        masks = {kind: mask[..., :size] for kind, size in self.mask_sizes.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))


@contextlib.contextmanager
def last_tokens(head: torch.nn.Module, places: torch.Tensor) -> Iterator[None]:
    """While this lasts a model's head is given, of each row of hidden states, the one at its place only."""

    def choose(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = given
        mine = places.to(hidden.device)
        return hidden[torch.arange(len(mine), device=hidden.device), mine][:, None], *others

    hook = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()
