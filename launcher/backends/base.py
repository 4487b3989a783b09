"""The protocol of an engine in its rank: prompts in, completions and memory out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from launcher.config.schema import RunConfig, SamplingConfig
    from launcher.results.measured import RequestFailure, ServerRepeat
    from shards.machine.world import World
    from shards.plan.plan import Plan

FinishReason = Literal["stop", "length"]
STOP: FinishReason = "stop"
LENGTH: FinishReason = "length"

Phase = Literal["load", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the set. `index` is its place in the set, `token_ids` what every engine is given.

    `arrival_s` is when it comes, in seconds from the first, where the set says that; `adapter` the one of
    `adapter.paths` that it is for."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    arrival_s: float | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer of an engine to one prompt.

    `token_ids` are the new tokens only, up to and including the EOS token that ended them.
    `ttft_s` is the time from the start of the call to the first token; `itl_s` the gaps between the tokens after it.
    `top2_gaps` is the difference of the two largest logits at each token, empty where the engine does not show logits.
    An engine that gives a text and no ids says how many tokens there are, in `num_tokens`.
    """

    index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    ttft_s: float | None = None
    itl_s: tuple[float, ...] = ()
    top2_gaps: tuple[float, ...] = ()
    text: str | None = None
    num_tokens: int | None = None

    @property
    def new_tokens(self) -> int:
        """The number of new tokens."""
        if self.num_tokens is not None:
            return self.num_tokens
        return len(self.token_ids)

    @property
    def answer(self) -> tuple[int, ...] | str:
        """The part that is compared: the tokens, or the text where there are none."""
        if self.text is not None:
            return self.text
        return self.token_ids

    @property
    def e2el_s(self) -> float | None:
        """The time to the last token."""
        if self.ttft_s is None:
            return None
        return self.ttft_s + sum(self.itl_s)


def as_token_ids(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """The EOS ids of a model, of which its files name none, one or several."""
    if eos is None:
        return ()
    if isinstance(eos, int):
        return (eos,)
    return tuple(eos)


@dataclass(frozen=True, slots=True)
class Generation:
    """One call of `Backend.generate`: completions in the order of the prompts, and the time of its two kinds of steps.

    An engine that does not tell prefill from decode (vLLM) gives None, and so one that does not count its decode steps.
    `counters` are numbers of the engine's own, by names of `launcher.results.metrics.COUNTERS`. `failures` are the
    prompts that a server did not answer, `server` is what was seen of it. `wall_s` is the time from the first prompt to
    the last answer, where a call has more to do than that.
    """

    completions: tuple[Completion, ...]
    prefill_s: float | None = None
    decode_s: float | None = None
    decode_steps: int | None = None
    counters: dict[str, float] = field(default_factory=dict)
    failures: tuple[RequestFailure, ...] = ()
    server: ServerRepeat | None = None
    wall_s: float | None = None


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """The most that CUDA's allocator held on a device in one phase of a run."""

    phase: Phase
    peak_allocated_bytes: int
    peak_reserved_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes that one device (one rank) holds. A value that could not be read is None, `reasons` says why by field.

    `phases` are empty where the allocator was not watched by phase. `fragmented_bytes` are the most that were free in
    blocks of which another part was in use, `step_growth_bytes` the most by which a decode step made the allocator
    reserve more. `draft_parameter_bytes` and `draft_cache_bytes` are those of a draft model, 0 where there is none.
    `offloaded_bytes` are parameters that lie in main memory or on a disk, and in none of the others.
    """

    rank: int
    device: str
    device_name: str = ""
    device_uuid: str | None = None
    parameter_bytes: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_reserved_bytes: int | None = None
    tensor_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    phases: tuple[PhaseMemory, ...] = ()
    fragmented_bytes: int | None = None
    step_growth_bytes: int | None = None
    nvml_used_bytes: int | None = None
    host_anonymous_bytes: int | None = None
    draft_parameter_bytes: int = 0
    draft_cache_bytes: int = 0
    offloaded_bytes: int = 0
    reasons: dict[str, str] = field(default_factory=dict)


class OnStep(Protocol):
    """Called after each step of an engine."""

    def __call__(self, new_tokens: int, finished: Sequence[Completion] = ()) -> None:
        """Report `new_tokens` new tokens, and the answers that are complete, where an engine does so before its call
        returns.

        It may raise, to end the call.
        """


class Backend(Protocol):
    """An engine, made in the process that will use it. Its subclass of `launcher.config.schema.BackendConfig` says how
    it runs (one process a device, data parallel, batches)."""

    def __init__(self, config: RunConfig) -> None: ...

    def load(self, plan: Plan | None, world: World, progress: Callable[[int, int], None]) -> None:
        """Put this rank's part of the model on its device; `progress(done_bytes, total_bytes)` as it comes.

        There is a plan where the engine has a planner."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Generation:
        """Answer `prompts` as one batch; with continuous batching the whole set.

        Data-parallel ranks call it equally often: each with prompts of its own, none if it has none left; with
        continuous batching all with the same, of which each answers some.
        """

    def barrier(self) -> None:
        """Return when every rank has come here; the clocks of a repeat start behind it."""

    def memory(self) -> list[DeviceMemory]:
        """One entry for each device that this process answers for, as it is now."""

    def close(self) -> None:
        """Give back what the process holds outside itself (workers, shared memory, process groups)."""


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Seconds of one process for its part of a model: to join the other ranks, to read the checkpoint (or to make
    random values), to quantize what was read, and to build, cut and allocate the model and to lay out its weights."""

    join_s: float
    read_s: float
    quantize_s: float
    place_s: float


@runtime_checkable
class TimedBackend(Protocol):
    """An engine that knows the parts of the time that `load` took."""

    def load_times(self) -> LoadTimes:
        """The parts, which add up to all of it."""


@dataclass(frozen=True, slots=True)
class Compilation:
    """The outcome of `measure.compile`: the way of decode steps (none, inductor, cudagraph), the seconds that it took
    to make them, which are in no measure and not in `load_s`, and what is to be known of it."""

    way: str
    seconds: float
    note: str | None = None


@runtime_checkable
class CompilingBackend(Protocol):
    """An engine that can make its decode steps ahead."""

    def compile(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Compilation | None:
        """Make them as configured, and compare what comes of a batch; None where there is nothing to be made."""


@runtime_checkable
class StreamingBackend(Protocol):
    """An engine that knows the tokens of an answer before it is whole."""

    def stream_to(self, on_tokens: Callable[[int, Sequence[int]], None]) -> None:
        """Call `on_tokens` with new tokens by the index of their prompt, before `on_step` of their step."""


LIKELIEST = 8
"""Tokens in each place of a scored text whose likelihoods an engine tells."""


@dataclass(frozen=True, slots=True)
class Score:
    """The score of a text by an engine: the log-likelihood (natural logarithm) of all its tokens but the first, and in
    the place of each the most likely token, and the log-likelihoods of the LIKELIEST tokens."""

    log_likelihood: float
    best_tokens: tuple[int, ...]
    likeliest: tuple[dict[int, float], ...] = ()


@runtime_checkable
class ScoringBackend(Protocol):
    """An engine that can be shown a text."""

    def score(self, token_ids: Sequence[int]) -> Score:
        """The score of a text of two tokens or more; all ranks are asked for the same text, and all have its score."""


class Trace(Protocol):
    """A trace that has begun."""

    def stop(self) -> None:
        """No more is traced."""

    def write(self, path: Path) -> None:
        """Write the trace as JSON, whole or not at all."""


@runtime_checkable
class TracingBackend(Protocol):
    """An engine whose steps can be traced in its rank."""

    def trace(self) -> Trace:
        """Begin to trace what this rank does."""
