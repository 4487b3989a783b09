"""Measurements of one rank, and the figures computed from those of all ranks: types only."""

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
    """One repeat as measured by the client of a server.

    `tokens_checked` says what of an answer can be compared: ids, or text. `read_otherwise` counts the prompts for which
    the server counts another number of tokens than the client, None if it does not report that. `cpu_share` is the
    share of one core; the lags are quantiles (p50, p99) of the delay of the client's event loop, and of the delay with
    which requests were sent. `own_metrics` are the server's. `bunched` is the share of the gaps between parts of an
    answer under 0.1 ms: those parts arrived together.
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
    """Measurements of this rank in one repeat, numbered from 0, over its prompts, or over those that were left.

    `wall_s` runs from a barrier of all ranks to this rank's last token. `prefill_s` and `decode_s` are sums over the
    calls, None for an engine that does not separate them. `decode_steps` counts the steps that made a token, without
    the first of each batch; `lengths` are the tokens of each prompt and its answer. `counters` are the engine's own,
    summed over the calls. `e2el_s` (time to the last token) and `ttft_s` are in the order of `lengths`. Prompts in
    `failures` are in none of the others.
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
    same_tokens: bool  # True: the same answers as in the first repeat
    counters: dict[str, float] = field(default_factory=dict)
    e2el_s: tuple[float, ...] = ()
    failures: tuple[RequestFailure, ...] = ()
    server: ServerRepeat | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum, maximum and raw values of a figure over the repeats; None with the reason if it was not
    measured."""

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
    """The decode steps of some repeats, without the first token of each prompt.

    `sequences_at_once` (in a step of a rank) and `cached_tokens` (of each sequence in the cache of a layer) are means
    over true lengths, without padding and without tokens after the end of an answer. In speculative decoding a sequence
    gains `tokens_per_row` tokens in a step on average; elsewhere several tokens of one step count as several steps.
    With continuous batching `seconds` runs from the first token to the last.
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
    """Speculative decoding over the repeats: the share of draft tokens accepted (`acceptance`), the mean number of
    tokens per row and step, and the share of decode time spent on drafting (`guessing`), None if the engine does not
    report it."""

    acceptance: Spread
    tokens_per_step: Spread
    guessing: Spread


@dataclass(frozen=True, slots=True)
class Serving:
    """The figures of a run that called a server, over its complete repeats.

    `failures` counts requests without an answer by their kind, out of `requests` in all repeats; `examples` has one of
    each. `client_bound` is the reason to believe that the client was the bottleneck, None if it was not. `own_metrics`
    are the server's, as medians; so is `bunched`, the share of the gaps between parts of an answer under 0.1 ms.
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
    """The figures of a run over its complete repeats; rates are over all ranks, in tokens/s.

    `slots_in_use` is the share of slots in decode steps that made a token of an answer, `rows_in_use` that of the
    computed rows; None if the engine counts neither.

    Times of requests follow vLLM's definitions: `tpot_s` is the time after a prompt's first token divided by the number
    of tokens after it, `e2el_s` the time to its last token. `request_goodput` is the rate of requests that met every
    limit of `slo`, `slo_attainment` their share; a failed request meets none.
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
    """The work behind the metrics: the number of repeats, and the prompts and tokens of each."""

    repeats: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    same_tokens_every_repeat: bool


@dataclass(frozen=True, slots=True)
class Partial:
    """The part of the prompt set that was measured, if no attempt made a complete repeat."""

    prompts: int
    of: int


@dataclass(frozen=True, slots=True)
class CeilingShare:
    """Decode speed as a share of what the hardware allows for the steps that were made.

    `tokens_per_s` is that ceiling, over all ranks. A share over 1 means that a figure or a rate is wrong.
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
