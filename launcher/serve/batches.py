"""Requests collected into batches for an engine, and its tokens on their way back."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.backends.base import Prompt
from launcher.serve.app import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.backends.base import Completion, FinishReason
    from launcher.config.schema import SamplingConfig
    from launcher.serve.requests import Wanted

INDICES = 2**32  # an index is the lower 32 bits of torch's 64-bit seed, and the configured seed the upper


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one prompt; the last of them have the finish reason."""

    index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts that are answered together in one call of an engine; an empty one only keeps other ranks alive."""

    prompts: tuple[Prompt, ...]
    sampling: SamplingConfig | None


@dataclass(slots=True)
class Batches:
    """The engine of `launcher.serve.app`: HTTP threads submit, the engine's thread takes and delivers."""

    size: int
    failure: str | None = None
    _waiting: deque[tuple[Wanted, Callable[[Part], None]]] = field(default_factory=deque)
    _asked: dict[int, Callable[[Part], None]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _change: threading.Condition = field(default_factory=threading.Condition)

    def submit(self, wanted: Wanted, deliver: Callable[[Part], None]) -> None:
        """Queue a request; `deliver` is called from other threads."""
        with self._change:
            self._waiting.append((wanted, deliver))
            self._change.notify()

    def take(self, patience_s: float) -> Batch:
        """The next batch: the first waiting request, and those with the same sampling. Empty if none arrives for
        `patience_s`."""
        with self._change:
            self._change.wait_for(lambda: self._waiting, patience_s)
            if not self._waiting:
                return Batch((), None)
            sampling = self._waiting[0][0].sampling
            chosen = [item for item in self._waiting if item[0].sampling == sampling][: self.size]
            self._waiting = deque(item for item in self._waiting if item not in chosen)
            prompts = []
            for wanted, deliver in chosen:
                index = next(self._numbers) % INDICES
                self._asked[index] = deliver
                prompts.append(Prompt(index, "", wanted.token_ids))
            return Batch(tuple(prompts), sampling)

    def deliver(self, news: Sequence[Tokens]) -> None:
        """Pass new tokens to the clients that requested them."""
        for new in news:
            with self._change:
                if new.finish_reason:
                    give = self._asked.pop(new.index)
                else:
                    give = self._asked[new.index]
            give(Part(new.token_ids, new.finish_reason))

    def fail(self, message: str) -> None:
        """Tell all clients that the engine has failed."""
        with self._change:
            self.failure = message
            everybody = [*self._asked.values(), *(give for _, give in self._waiting)]
            self._asked.clear()
            self._waiting.clear()
        for give in everybody:
            give(Part(error=message))


class News:
    """Collects the new tokens of a batch in each step and passes them on: each token once, with the finish reason of a
    prompt at its last one."""

    def __init__(self, hand_on: Callable[[Sequence[Tokens]], None]) -> None:
        self.hand_on = hand_on
        self.fresh: dict[int, list[int]] = {}
        self.told: dict[int, int] = {}
        self.ended: set[int] = set()

    def on_tokens(self, index: int, token_ids: Sequence[int]) -> None:
        """New tokens of an engine that reports them before an answer is complete."""
        self.fresh.setdefault(index, []).extend(token_ids)

    def __call__(self, new_tokens: int, finished: Sequence[Completion] = ()) -> None:
        """Called after each step."""
        news = []
        for completion in finished:
            self.ended.add(completion.index)
            told = self.told.pop(completion.index, 0)
            self.fresh.pop(completion.index, None)
            news.append(Tokens(completion.index, completion.token_ids[told:], completion.finish_reason))
        for index, token_ids in self.fresh.items():
            self.told[index] = self.told.get(index, 0) + len(token_ids)
            news.append(Tokens(index, tuple(token_ids)))
        self.fresh = {}
        if news:
            self.hand_on(news)
