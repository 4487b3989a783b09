"""The interface of an engine inside its rank: prompts in, completions and memory figures out."""

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
    """One prompt of the set. `index` is its position in the set; every engine is given the same `token_ids`.

    `arrival_s` is its arrival time in seconds after the first prompt, if the set has arrival times. `adapter` is the
    entry of `adapter.paths` that answers it.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    arrival_s: float | None = None
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer of an engine to one prompt.

    `token_ids` are the new tokens only, up to and including the EOS token. `ttft_s` is the time from the start of the
    call to the first token, `itl_s` are the gaps between the tokens after it. `top2_gaps` is the difference of the two
    largest logits at each token, empty if the engine does not expose logits. An engine that returns text without token
    ids gives the number of tokens in `num_tokens`.
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
        """The value by which runs are compared: the tokens, or the text if there are no token ids."""
        if self.text is not None:
            return self.text
        return self.token_ids

    @property
    def e2el_s(self) -> float | None:
        """The end-to-end latency: the time to the last token."""
        if self.ttft_s is None:
            return None
        return self.ttft_s + sum(self.itl_s)


def as_token_ids(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """The EOS ids of a model as a tuple; its files may name none, one or several."""
    if eos is None:
        return ()
    if isinstance(eos, int):
        return (eos,)
    return tuple(eos)


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of one call of `Backend.generate`: completions in the order of the prompts, and the time spent in
    prefill and decode.

    The times are None for an engine that does not separate prefill from decode (vLLM), `decode_steps` for one that does
    not count its steps. `counters` are the engine's own, named as in `launcher.results.figures.metrics.COUNTERS`.
    `failures` are the prompts that a server did not answer, `server` has the client's measurements.
    `wall_s` is the time from the first prompt to the last answer, for an engine whose call does more than that.
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
    """Peaks of CUDA's allocator on a device in one phase of a run."""

    phase: Phase
    peak_allocated_bytes: int
    peak_reserved_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of one device (one rank), in bytes. A value that could not be read is None, with the reason by field in
    `reasons`.

    `phases` is empty if the allocator was not sampled by phase. `fragmented_bytes` is the peak of free bytes in blocks
    that are partly in use, `step_growth_bytes` the largest growth of reserved memory in one decode step.
    `draft_parameter_bytes` and `draft_cache_bytes` belong to a draft model, 0 without one. `offloaded_bytes` are
    parameters in main memory or on disk; no other field counts them.
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
    """A callback after each step of an engine."""

    def __call__(self, new_tokens: int, finished: Sequence[Completion] = ()) -> None:
        """Report `new_tokens` new tokens and, if the engine knows them before its call returns, the finished answers.

        It may raise an exception to end the call.
        """


class Backend(Protocol):
    """An engine, created in the process that uses it. Its subclass of `launcher.config.schema.BackendConfig` describes
    how it runs: one process for each device, data parallel, batching."""

    def __init__(self, config: RunConfig) -> None: ...

    def load(self, plan: Plan | None, world: World, progress: Callable[[int, int], None]) -> None:
        """Load this rank's part of the model onto its device, and report `progress(done_bytes, total_bytes)`.

        `plan` is None for an engine without a planner.
        """

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Generation:
        """Answer `prompts` as one batch, or the whole set with continuous batching.

        Data-parallel ranks make the same number of calls: each with its own prompts, with none if it has none left.
        With continuous batching all ranks are given the whole set, and each answers a part of it.
        """

    def barrier(self) -> None:
        """Return when every rank has called it; the clocks of a repeat start after it."""

    def memory(self) -> list[DeviceMemory]:
        """The current memory of each device that this process reports."""

    def close(self) -> None:
        """Release everything outside this process: workers, shared memory, process groups."""


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """The load time of one process in parts, in seconds: joining the other ranks, reading the checkpoint (or making
    random values), quantizing, and everything else (building, cutting and allocating the model, laying out its
    weights)."""

    join_s: float
    read_s: float
    quantize_s: float
    place_s: float


@runtime_checkable
class TimedBackend(Protocol):
    """An engine that measures the parts of its load time."""

    def load_times(self) -> LoadTimes:
        """The parts; they add up to the whole load time."""


@dataclass(frozen=True, slots=True)
class Compilation:
    """The outcome of `measure.compile`: how decode steps run (none, inductor, cudagraph), the seconds that their
    preparation took (no figure includes them, nor does `load_s`), and a note for the user."""

    way: str
    seconds: float
    note: str | None = None


@runtime_checkable
class CompilingBackend(Protocol):
    """An engine that can compile or capture its decode steps before the measurement."""

    def compile(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Compilation | None:
        """Prepare the decode steps as configured and check them on a batch; None if there is nothing to prepare."""


@runtime_checkable
class StreamingBackend(Protocol):
    """An engine that can report the tokens of an answer before it is complete."""

    def stream_to(self, on_tokens: Callable[[int, Sequence[int]], None]) -> None:
        """Call `on_tokens(index of the prompt, new tokens)` for every step, before `on_step`."""


LIKELIEST = 8
"""The number of most likely tokens whose log-likelihoods an engine reports at each position of a scored text."""


@dataclass(frozen=True, slots=True)
class Score:
    """The score of a text: the log-likelihood (natural logarithm) of all its tokens but the first, and at each of their
    positions the most likely token and the log-likelihoods of the LIKELIEST tokens."""

    log_likelihood: float
    best_tokens: tuple[int, ...]
    likeliest: tuple[dict[int, float], ...] = ()


@runtime_checkable
class ScoringBackend(Protocol):
    """An engine that can score a text."""

    def score(self, token_ids: Sequence[int]) -> Score:
        """The score of a text of two tokens or more. All ranks are given the same text, and all return its score."""


class Trace(Protocol):
    """A running trace."""

    def stop(self) -> None:
        """End the trace."""

    def write(self, path: Path) -> None:
        """Write the trace as JSON, atomically."""


@runtime_checkable
class TracingBackend(Protocol):
    """An engine whose steps can be traced inside its rank."""

    def trace(self) -> Trace:
        """Start to trace this rank."""
