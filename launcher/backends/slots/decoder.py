"""Continuous batching: each prompt takes a slot as soon as one is free, while the others go on decoding."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from launcher.backends.base import LENGTH, STOP, Completion, Generation
from launcher.backends.memory import DECODE, PREFILL, Clock, PhasePeaks
from launcher.backends.sampling import Sampler
from launcher.backends.slots.device import Slots
from launcher.backends.slots.drafting.guesses import AheadSlots, Guesses
from launcher.backends.slots.drafting.speculation import Speculation
from launcher.backends.slots.queue import Queue
from launcher.backends.slots.schedule import NEAR, Read, Schedule, Step
from launcher.results.figures.metrics import ROWS, SLOTS
from launcher.results.figures.speculation import GUESSING
from shards.parallel.fully_shard import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from launcher.backends.base import OnStep, Prompt
    from launcher.backends.slots.drafting.guesses import Guesser
    from launcher.backends.slots.drafting.speculation import Checked
    from launcher.backends.slots.schedule import Sequence
    from launcher.config.schema import SamplingConfig
    from shards.machine.world import World

    Kind = type[Read | Step | Guesses]

LATE = {"cpu": 0, "cuda": 4}
"""The number of forwards after which the host reads the tokens of a forward, and so notices the end of an answer:
reading at once would synchronize with the device. (A flag on the device would be read just as late, cost another copy,
and free no slot sooner.) Tokens that a row makes after its end stay in its own slot, are dropped, and count as computed
in vain."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens chosen in one forward, while they are copied to the host."""

    forward: Read | Step
    number: int
    tokens: torch.Tensor
    gaps: torch.Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, forward: Read | Step, number: int, tokens: torch.Tensor, gaps: torch.Tensor) -> Chosen:
        if tokens.device.type != "cuda":
            return cls(forward, number, tokens, gaps, None)
        tokens, gaps = tokens.to("cpu", non_blocking=True), gaps.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return cls(forward, number, tokens, gaps, copied)

    def values(self) -> tuple[list[list[int]], list[list[float]]]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.tokens[:, None].tolist(), self.gaps[:, None].tolist()


@dataclass(slots=True)
class SlotDecoder:
    """The generation loop of a model over `num_slots` sequences of at most `length` tokens."""

    model: torch.nn.Module
    eos_token_ids: tuple[int, ...]
    device: torch.device
    world: World
    seed: int
    peaks: PhasePeaks
    num_slots: int
    length: int
    prefill_tokens: int
    splits_prompts: bool
    guesser: Guesser | None = None
    gather: Callable[[torch.Tensor, torch.Tensor], object] = dist.all_gather_into_tensor
    ahead: int = 0  # draft tokens per row and step, at most
    on_tokens: Callable[[int, SequenceOf[int]], None] | None = None
    slots: Slots | None = None
    must_clear: bool = False
    pending: deque[Chosen | Checked] = field(default_factory=deque)

    @property
    def kv_cache_bytes(self) -> dict[torch.device, int]:
        """Bytes of the cache on each device."""
        if self.slots is None:
            return {}
        return self.slots.cache.num_bytes()

    @torch.inference_mode()
    def generate(self, prompts: SequenceOf[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Generation:
        """Generate new tokens for each prompt that this rank answers, in the order of the prompts."""
        call, late = _Call(self, prompts, sampling, on_step), LATE[self.device.type]
        if self.guesser is not None:
            late = 0
        self.pending.clear()
        while call.queue.fill():
            call.forward()
            while len(self.pending) > late:
                call.take(self.pending.popleft())
            call.report()
        while self.pending:
            call.take(self.pending.popleft())
            call.report()
        return call.generation()

    def ready(self, longest: int) -> Slots:
        """The slots, allocated again if a call needs longer ones than before."""
        if self.slots is None or longest > self.slots.cache.length:
            self.length = max(longest, self.length)
            self.slots = None
            if self.guesser is None:
                self.slots = Slots(self.model, self.num_slots, self.length, self.device)
            else:
                self.slots = AheadSlots(self.model, self.num_slots, self.length, self.device, self.ahead)
        return self.slots


class _Call:
    """One call of `SlotDecoder.generate`."""

    def __init__(
        self, decoder: SlotDecoder, prompts: SequenceOf[Prompt], sampling: SamplingConfig, on_step: OnStep
    ) -> None:
        self.decoder, self.sampling, self.on_step = decoder, sampling, on_step
        most = sampling.max_new_tokens
        longest = max((len(prompt.token_ids) for prompt in prompts), default=1)
        self.slots = decoder.ready(longest + most + decoder.ahead)
        if decoder.guesser is not None:
            decoder.guesser.ready(decoder.num_slots, self.slots.cache.length, decoder.ahead)
        near: int | None = NEAR[decoder.device.type]
        ranks, rank = 1, 0
        if decoder.splits_prompts:
            ranks, rank = decoder.world.world_size, decoder.world.rank
        if self.slots.packs and (decoder.guesser is None or decoder.guesser.packs):
            near = None
        schedules = [Schedule(decoder.num_slots, most, decoder.prefill_tokens, near) for _ in range(ranks)]
        self.schedule = schedules[rank]
        is_told = sampling.ignore_eos and decoder.guesser is None  # the ends of answers are known in advance
        is_apart = ranks > 1 and not is_sharded(decoder.model)
        votes = ranks > 1 and not is_told
        self.queue = Queue(prompts, schedules, rank, votes, is_apart, decoder.gather)
        self.sampler = Sampler(sampling, decoder.seed, decoder.device, decoder.model.get_output_embeddings())
        self.speculation: Speculation | None = None
        if decoder.guesser is not None and isinstance(self.slots, AheadSlots):
            self.speculation = Speculation(decoder.guesser, self.slots, self.sampler, sampling, decoder.ahead)
        self.eos = frozenset(decoder.eos_token_ids)
        if sampling.ignore_eos:
            self.eos = frozenset()
        self.order = {prompt.index: place for place, prompt in enumerate(prompts)}
        self.generators: dict[int, torch.Generator | None] = {}
        self.kinds: list[Kind | None] = []  # the kind of each forward; None for an idle one
        self.rows_before = self.slots.computed_rows
        self.ended: list[Sequence] = []
        self.new_tokens, self.reported = 0, 0
        self.clock = Clock(decoder.device)

    def forward(self) -> None:
        """Launch the next forward of this rank, an idle one if there is nothing to do."""
        forward = self.schedule.next()
        self.queue.follow()
        if forward is None:
            self.kinds.append(None)
            if not self.queue.is_apart:
                self.slots.idle()
            self.clock.mark()
            return
        self.kinds.append(type(forward))
        phase = DECODE
        if isinstance(forward, Read):
            phase = PREFILL
        if isinstance(forward, Read) and self.speculation is not None:
            self.speculation.guesser.read(forward)
        if isinstance(forward, Step) and self.speculation is not None:
            generators = [self._generator(sequence) for sequence in forward.sequences]
            guesses = self.speculation.guess(forward, generators)
            self.kinds.insert(-1, Guesses)
            self.clock.mark()
            checked = self.speculation.check(forward, len(self.kinds) - 1, guesses, generators)
            self.decoder.pending.append(checked)
        else:
            self._choose(forward)
        self.schedule.begin(forward)
        self.clock.mark()
        self.decoder.peaks.end(phase)

    def _choose(self, forward: Read | Step) -> None:
        """Launch a forward and the choice of a token for each row, without waiting for either."""
        if isinstance(forward, Read):
            if self.decoder.must_clear and not forward.start:
                self.slots.clear(forward.sequences)
            logits = self.slots.read(forward)
        else:
            logits = self.slots.step(forward)
        if isinstance(forward, Step) or forward.is_last:
            tokens, gaps = self.sampler.choose(logits, [self._generator(sequence) for sequence in forward.sequences])
            self.slots.keep(forward, tokens)
            self.decoder.pending.append(Chosen.of(forward, len(self.kinds) - 1, tokens, gaps))

    def _generator(self, sequence: Sequence) -> torch.Generator | None:
        if sequence.begun == 0:
            self.generators[sequence.prompt.index] = self.sampler.generator(sequence.prompt)
        return self.generators[sequence.prompt.index]

    def take(self, chosen: Chosen | Checked) -> None:
        """Read the tokens of a forward. Tokens after the end of a sequence are dropped."""
        for sequence, tokens, gaps in zip(chosen.forward.sequences, *chosen.values(), strict=True):
            for token, gap in zip(tokens, gaps, strict=True):
                self.decoder.must_clear |= not math.isfinite(gap)
                if not sequence.is_ended:
                    self._give(sequence, chosen.number, token, gap)
            sequence.begun = max(sequence.begun, len(sequence.token_ids))

    def _give(self, sequence: Sequence, number: int, token: int, gap: float) -> None:
        """Append a new token, made by forward `number`, to a sequence."""
        sequence.token_ids.append(token)
        sequence.gaps.append(gap)
        sequence.forwards.append(number)
        self.new_tokens += 1
        if self.decoder.on_tokens is not None:
            self.decoder.on_tokens(sequence.prompt.index, (token,))
        if token in self.eos or len(sequence.token_ids) == self.sampling.max_new_tokens:
            sequence.is_ended = True
            self.schedule.end(sequence)
            self.ended.append(sequence)

    def report(self) -> None:
        """Report what is new since the last call."""
        new = [self._completion(sequence) for sequence in self.ended[self.reported :]]
        self.reported = len(self.ended)
        self.on_step(self.new_tokens, new)
        self.new_tokens = 0

    def _completion(self, sequence: Sequence, marks: SequenceOf[float] | None = None) -> Completion:
        reason, token_ids, gaps = LENGTH, tuple(sequence.token_ids), tuple(sequence.gaps)
        if token_ids[-1] in self.eos:
            reason = STOP
        if marks is None:
            return Completion(sequence.prompt.index, token_ids, reason, top2_gaps=gaps)
        times = [marks[number] for number in sequence.forwards]
        itl_s = tuple(later - earlier for earlier, later in pairwise(times))
        return Completion(sequence.prompt.index, token_ids, reason, times[0], itl_s, gaps)

    def generation(self) -> Generation:
        """All completions, with their times."""
        marks = self.clock.marks()
        spent: dict[Kind | None, float] = {Read: 0.0, Step: 0.0, Guesses: 0.0, None: 0.0}
        for kind, before, after in zip(self.kinds, (0.0, *marks), marks, strict=False):
            spent[kind] += after - before
        steps = slot_steps = self.kinds.count(Step)
        if not self.queue.is_apart:
            slot_steps += self.kinds.count(None)  # a step of other ranks counts, with all slots empty here
        rows = self.slots.computed_rows - self.rows_before
        counters: dict[str, float] = {SLOTS: slot_steps * self.decoder.num_slots, ROWS: rows}
        if self.speculation is not None:
            counters |= {**self.speculation.counters, GUESSING: spent[Guesses]}
        ordered = sorted(self.ended, key=lambda sequence: self.order[sequence.prompt.index])
        return Generation(
            tuple(self._completion(sequence, marks) for sequence in ordered),
            prefill_s=spent[Read],
            decode_s=spent[Step] + spent[Guesses],
            decode_steps=steps,
            counters=counters,
        )
