"""Measurements of one rank, and the figures that follow from those of all ranks: the types, without any arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """A request without an answer: the index of its prompt, the kind of the failure and one line about it."""

    index: int
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class ServerRepeat:
    """One repeat as the client of a server saw it.

    `tokens_checked` says what of an answer can be compared: ids, or text. `read_otherwise` counts the prompts of which
    the server read another number of tokens than we count, None where it does not tell. `cpu_share` is of one core;
    the lags are quantiles (p50, p99) of how late the client came to its connections, and of how late it sent requests
    that were due. `own_metrics` are the server's. `bunched` is the share of the gaps between the parts of an answer
    that are under 0.1 ms: those came together.
    """

    software: str | None
    dialect: str
    tokens_checked: str
    retries: int
    read_otherwise: int | None
    tokens_per_event: float | None
    cpu_share: float
    loop_lag_s: tuple[float, float]
    send_lag_s: tuple[float, float] | None
    own_metrics: dict[str, float] = field(default_factory=dict)
    bunched: float | None = None


@dataclass(frozen=True, slots=True)
class Repeat:
    """Measurements of this rank in one repeat, numbered from 0, of its prompts, or of what was left of them.

    `wall_s` runs from a barrier of all ranks to this rank's last token.

    `prefill_s` and `decode_s` are sums over the calls, None for an engine that does not tell them apart. `decode_steps`
    are those that gave a token, but for the first of each batch; `lengths` the tokens of each prompt and its answer.
    `counters` are the engine's own, summed over the calls. `e2el_s` is the time of each prompt to its last token, in
    the order of `lengths`, and so is `ttft_s`. Prompts of `failures` are in none of these.
    """

    number: int
    wall_s: float
    prefill_s: float | None
    decode_s: float | None
    completions: int
    prompt_tokens: int
    new_tokens: int
    decode_steps: int
    lengths: tuple[tuple[int, int], ...]
    ttft_s: tuple[float, ...]
    itl_s: tuple[float, ...]
    same_tokens: bool  # as the first repeat gave
    counters: dict[str, float] = field(default_factory=dict)
    e2el_s: tuple[float, ...] = ()
    failures: tuple[RequestFailure, ...] = ()
    server: ServerRepeat | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, extremes and raw values of a figure over the repeats; None with the reason where it was not measured."""

    median: float | None
    min: float | None
    max: float | None
    values: tuple[float | None, ...]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Quantiles of a time over prompts or tokens, and the number of values."""

    p50: float | None
    p90: float | None
    p99: float | None
    count: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Decoding:
    """The decode steps of some repeats, the first token of each prompt left out.

    `sequences_at_once` that a rank had in a step, and `cached_tokens` that each of them had in the cache of a layer,
    are means: of true lengths, without padding and without what came after an end. With guesses a sequence may gain
    several tokens in a step, `tokens_per_row` in the mean; else one that gave several is several steps. With continuous
    batching `seconds` are all from the first token to the last.
    """

    steps: int
    seconds: float
    tokens: int
    sequences_at_once: float
    cached_tokens: float
    several_tokens_a_step: bool
    tokens_per_row: float = 1.0


@dataclass(frozen=True, slots=True)
class Speculation:
    """Guesses over the repeats: the share of them that was `acceptance`, the tokens that a step gave each row in the
    mean, and the share of decoding that `guessing` took, None where the engine does not tell."""

    acceptance: Spread
    tokens_per_step: Spread
    guessing: Spread


@dataclass(frozen=True, slots=True)
class Serving:
    """The figures of a run that asked a server, over its whole repeats.

    `failures` counts requests without an answer by their kind, of `requests` in all repeats; `examples` has one of
    each. `client_bound` says that, and why, the client was what was measured; None where it was not. `own_metrics` are
    the server's, in the median, as is `bunched`, the share of the gaps between the parts of an answer under 0.1 ms.
    """

    software: str | None
    dialect: str
    tokens_checked: str
    requests: int
    failures: dict[str, int]
    examples: tuple[RequestFailure, ...]
    retries: int
    read_otherwise: int | None
    tokens_per_event: float | None
    cpu_share: float
    loop_lag_s: tuple[float, float]
    send_lag_s: tuple[float, float] | None
    client_bound: str | None
    own_metrics: dict[str, float]
    bunched: float | None = None


@dataclass(frozen=True, slots=True)
class Metrics:
    """The figures of a run over its whole repeats; rates are of all ranks together, in tokens/s.

    `slots_in_use` is the part of the slots of a decode step that gave a token of an answer, `rows_in_use` that of the
    rows which were computed; None where the engine counts neither.

    Times of requests are by vLLM's definitions: `tpot_s` is the time after a prompt's first token over the number of
    tokens after it, `e2el_s` the time to its last. `request_goodput` are the requests a second that met every limit of
    `slo`, `slo_attainment` their share of all; one that failed has met none.
    """

    new_tokens_per_s: Spread
    new_tokens_per_s_per_device: Spread
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    wall_s: Spread
    ttft_s: Quantiles
    itl_s: Quantiles
    decode: Decoding | None
    slots_in_use: Spread | None = None
    rows_in_use: Spread | None = None
    counters: dict[str, Spread] = field(default_factory=dict)
    tpot_s: Quantiles | None = None
    e2el_s: Quantiles | None = None
    request_throughput: Spread | None = None
    request_goodput: Spread | None = None
    slo_attainment: Spread | None = None
    speculation: Speculation | None = None
    serving: Serving | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """The work that the metrics are of: repeats, and the prompts and tokens of each of them."""

    repeats: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    same_tokens_every_repeat: bool


@dataclass(frozen=True, slots=True)
class Partial:
    """The share of the prompt set that was measured, where no attempt made a whole repeat."""

    prompts: int
    of: int


@dataclass(frozen=True, slots=True)
class CeilingShare:
    """Decode speed as a share of what the machine allows for the steps that were really made.

    `tokens_per_s` is that ceiling, of all ranks together; over 1 a figure or a rate is wrong.
    """

    share: float | None = None
    impossible: bool = False
    reason: str | None = None
    tokens_per_s: float | None = None
    bound: str | None = None


@dataclass(frozen=True, slots=True)
class BandwidthUse:
    """Memory bandwidth utilisation (MBU) of a device in the mean decode step; `bandwidth` in bytes/s."""

    share: float | None = None
    impossible: bool = False
    reason: str | None = None
    step_s: float | None = None
    weight_bytes: int | None = None
    kv_cache_bytes: int | None = None
    bandwidth: float | None = None
