"""The forwards of a model over its slots, and the state that they keep on the device; nothing here waits for it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from launcher.backends.slots.attention import can_be_packed, use_slots
from launcher.backends.slots.cache import Reading, SlotCache, Stepping
from launcher.backends.slots.straight import StraightStep, straight_step
from shards.parallel.packed import packed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.backends.slots.schedule import Read, Sequence, Step

BLOCK = 64
"""Attention spans the length of the longest row, rounded up to a multiple of BLOCK, and a mask hides the rest of the
shorter rows. Rows of equal length need neither: without a mask CUDA can use flash attention."""

Forward = Callable[[int, int], torch.Tensor]
"""(rows, reach) -> the logits of at least `rows` rows, whose attention spans at least `reach` positions."""


class Slots:
    """The cache of a model, and for each row its newest token and that token's position.

    `read` and `step` return logits [rows, vocabulary] in fp32; `keep` stores the tokens chosen from them. All inputs of
    a step are in tensors that are allocated once: they have the same addresses in every step. `static` are prepared
    forwards, for certain numbers of rows and reaches only.
    """

    def __init__(self, model: Any, slots: int, length: int, device: torch.device, spare: int = 0) -> None:
        self.model, self.device = model, device
        use_slots(model)
        self.cache = SlotCache(model.config, slots, length, spare)
        self.static: Forward | None = None
        self.tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self.positions = torch.zeros(slots, dtype=torch.long, device=device)
        self.places_now = torch.zeros(slots, 1, dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)
        self.seen, self.hidden = (torch.tensor(value, dtype=model.dtype, device=device) for value in (0.0, -torch.inf))
        self.takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
        self.is_alibi = bool(getattr(model.config, "alibi", False)) or not self.takes_positions
        kinds = {layer.is_sliding: layer.size for layer in self.cache.layers}
        self.straight: StraightStep | None = None
        self.is_straight_checked = False
        if len(kinds) == 1:  # all layers share one mask
            self.straight = straight_step(model)
        self.needs_mask = self.is_alibi or True in kinds  # transformers' mask ignores the order in a ring buffer
        # Not on CUDA: the attention of each packed prompt would be a separate launch.
        self.packs = device.type == "cpu" and can_be_packed(model) and self.takes_positions and not self.needs_mask
        self.mask_sizes = {"sliding_attention" if kind else "full_attention": size for kind, size in kinds.items()}
        width = -(-length // BLOCK) * BLOCK  # kernels need rows of a mask to begin at multiples of 16 bytes
        self.is_seen = torch.zeros(slots, width, dtype=torch.bool, device=device)
        self.mask = torch.zeros(slots, width, dtype=torch.long if self.is_alibi else model.dtype, device=device)
        self.shown: Any = None
        self.wide_logits: torch.Tensor | None = None
        self.computed_rows = 0  # rows of all decode steps so far

    def read(self, forward: Read) -> torch.Tensor:
        """Read prompts, or a chunk of one; returns the logits of the last token of each."""
        self.move(forward)
        if forward.is_packed:
            return self._read_packed(forward)
        prompts = [one.prompt.token_ids[forward.start : forward.start + forward.width] for one in forward.sequences]
        ids = self._sent([list(one) + [0] * (forward.width - len(one)) for one in prompts])
        ends = self._sent([forward.start + len(one) for one in prompts])
        rows = self._sent([one.row for one in forward.sequences])
        self.cache.do(Reading(rows, ends, forward.sequences[0].row, forward.start))
        positions = torch.arange(forward.start, forward.start + forward.width, device=self.device)
        self.positions.index_copy_(0, rows, ends)
        if len(set(map(len, prompts))) == 1:
            return self._logits(ids, positions.expand(len(prompts), -1), None, 1)
        rows_of_last = torch.arange(len(prompts), device=self.device)
        with last_tokens(self.model.get_output_embeddings(), rows_of_last, ends - 1):
            return self._logits(ids, positions.expand(len(prompts), -1), None, 0)

    def _read_packed(self, forward: Read) -> torch.Tensor:
        prompts = [one.prompt.token_ids for one in forward.sequences]
        lengths = tuple(map(len, prompts))
        ids = torch.tensor([list(chain.from_iterable(prompts))], device=self.device)
        ends = torch.tensor(lengths, device=self.device)
        rows = torch.tensor([one.row for one in forward.sequences], device=self.device)
        self.cache.do(Reading(rows, ends, forward.sequences[0].row, lengths=lengths))
        positions = torch.cat([self.places[:length] for length in lengths])[None]
        self.positions.index_copy_(0, rows, ends)
        with (
            packed(lengths),
            last_tokens(self.model.get_output_embeddings(), torch.zeros_like(rows), ends.cumsum(0) - 1),
        ):
            return self._logits(ids, positions, None, 0)

    def step(self, forward: Step) -> torch.Tensor:
        """Decode one token of each row."""
        self.move(forward)
        rows = len(forward.sequences)
        lengths = {one.length + 1 for one in forward.sequences}
        longest = max(lengths)
        if self.static is not None:
            logits = self.static(rows, longest)
        elif len(lengths) == 1 and not self.needs_mask:
            logits = self.lay_out(rows, longest, is_masked=False).next_logits(rows, longest)
        else:
            reach = min(-(-longest // BLOCK) * BLOCK, self.cache.length)
            logits = self.lay_out(rows, reach).next_logits(rows, reach)
        self.computed_rows += len(logits)
        self.positions[:rows].add_(1)
        return logits[:rows]

    def lay_out(self, rows: int, reach: int, is_masked: bool = True) -> Slots:
        """Write where the newest tokens of the first `rows` rows go, and the mask of what they attend to.

        Rows among them that decode nothing write to the position of their next token, or to the end of their slot,
        which stays unused.
        """
        positions = self.places_now[:rows]
        torch.clamp(self.positions[:rows, None], max=self.cache.length - 1, out=positions)
        self.cache.do(Stepping(rows, positions, reach))
        self.shown = self._mask(positions, reach) if is_masked else None
        return self

    def next_logits(self, rows: int, reach: int) -> torch.Tensor:
        """The logits for the inputs that `lay_out` wrote, by the straight step if the model has one."""
        return self.decode(self.tokens[:rows, None], self.places_now[:rows], self.shown)[:, -1]

    def decode(self, ids: torch.Tensor, positions: torch.Tensor, mask: Any) -> torch.Tensor:
        """The logits [rows, tokens, vocabulary] of the new tokens `ids` [rows, tokens].

        The first straight step of these slots is compared with the model's own forward: if a bit differs, this step and
        all later ones are the model's own.
        """
        if self.straight is None:
            return self._all_logits(ids, positions, mask, ids.shape[1])
        logits = self.straight(ids, positions, mask, self.cache)
        if self.is_straight_checked:
            return self._widened(logits)
        own = self._all_logits(ids, positions, mask, ids.shape[1])  # last: its keys and values stay in the cache
        if torch.allclose(logits.to(own.dtype), own, rtol=0.0, atol=0.0, equal_nan=True):
            self.is_straight_checked = True
        else:
            print("decode steps: transformers' own forward, since the straight one has other logits", flush=True)
            self.straight = None
        return own

    def forward(self, rows: int, reach: int) -> torch.Tensor:
        """The logits for the inputs that `lay_out` wrote, by the model's own forward."""
        return self._logits(self.tokens[:rows, None], self.places_now[:rows], self.shown, 1)

    def keep(self, forward: Read | Step, chosen: torch.Tensor) -> None:
        """Store the newest tokens of the rows of a forward."""
        rows = [one.row for one in forward.sequences]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            self.tokens[rows[0] : rows[0] + len(rows)].copy_(chosen)
        else:
            self.tokens.index_copy_(0, self._sent(rows), chosen)

    def idle(self) -> None:
        """A forward that only serves the collectives of the other ranks; its result is dropped."""
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)

    def clear(self, sequences: tuple[Sequence, ...]) -> None:
        """Overwrite the slots of some sequences with zeros."""
        for one in sequences:
            self.cache.clear(one.row)

    def move(self, forward: Read | Step) -> None:
        """Copy slots as the moves of a forward say."""
        for source, target in forward.moves:
            self.cache.move(source, target)
            for tensor in (self.tokens, self.positions):
                tensor[target].copy_(tensor[source])

    def _sent(self, values: list[Any]) -> torch.Tensor:
        """Integers on the device, through pinned memory: from pageable memory the host would wait for all earlier
        steps."""
        return torch.tensor(values, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)

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
        return self._widened(output.logits[:, -kept:])

    def _widened(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits in fp32: those of other types in a buffer that the next ones overwrite."""
        if logits.dtype is torch.float32:
            return logits
        size = self.wide_logits.shape[1:] if self.wide_logits is not None else None
        if self.wide_logits is None or size != logits.shape[1:]:
            self.wide_logits = torch.empty(self.cache.slots, *logits.shape[1:], device=logits.device)
        return self.wide_logits[: len(logits)].copy_(logits)

    def _mask(self, positions: torch.Tensor, reach: int) -> Any:
        """The mask of a step [rows, 1, 1, reach]: each row attends to all positions up to its newest token; a mask for
        each kind of layer if there are several.

        Families with ALiBi make biases from a mask [rows, reach] themselves.
        """
        rows = len(positions)
        is_seen, mask = self.is_seen[:rows, :reach], self.mask[:rows, :reach]
        torch.le(self.places[:reach], positions, out=is_seen)
        if self.is_alibi:
            return mask.copy_(is_seen)
        torch.where(is_seen, self.seen, self.hidden, out=mask)
        mask = mask[:, None, None]
        masks = {kind: mask[..., :size] for kind, size in self.mask_sizes.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))


@contextlib.contextmanager
def last_tokens(head: torch.nn.Module, rows: torch.Tensor, places: torch.Tensor) -> Iterator[None]:
    """A context in which a model's head sees only some positions of the hidden states [rows, tokens, size], each as a
    row of its own."""

    def choose(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = given
        return hidden[rows.to(hidden.device), places.to(hidden.device)][:, None], *others

    hook = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()
