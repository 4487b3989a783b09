"""Metrics of single requests: their times by vLLM's definitions, the requests within the latency limits, and the
client's cost."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import TYPE_CHECKING

from launcher.results.figures.summaries import quantiles, spread
from launcher.results.measured import Serving

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from launcher.config.parts.serving import SloConfig
    from launcher.results.measured import Repeat, ServerRepeat
    from shards.untrusted_files import JsonObject

MOST_CPU_SHARE = 0.9
MOST_LAG_SHARE = 0.05


def request_metrics(repeats: Sequence[Sequence[Repeat]], slo: SloConfig | None) -> JsonObject:
    """The metrics of single requests, from the measurements of each rank in each repeat."""
    ranks = [rank for repeat in repeats for rank in repeat]
    wall_s = [max(rank.wall_s for rank in repeat) for repeat in repeats]
    answered = [sum(rank.completions for rank in repeat) for repeat in repeats]
    values: JsonObject = {
        "tpot_s": quantiles(tpot_s(ranks)),
        "e2el_s": quantiles(value for rank in ranks for value in rank.e2el_s),
        "request_throughput": spread(many / time for many, time in zip(answered, wall_s, strict=True)),
        "serving": serving(ranks),
    }
    if slo is None or not slo.is_set:
        return values
    good = [sum(good_requests(rank, slo) for rank in repeat) for repeat in repeats]
    asked = [sum(rank.completions + len(rank.failures) for rank in repeat) for repeat in repeats]
    return values | {
        "request_goodput": spread(many / time for many, time in zip(good, wall_s, strict=True)),
        "slo_attainment": spread(many / one for many, one in zip(good, asked, strict=True)),
    }


def tpot_s(repeats: Iterable[Repeat]) -> Iterator[float]:
    """The time per output token of each prompt with more than one new token."""
    for repeat in repeats:
        for (_, new), ttft, e2el in zip(repeat.lengths, repeat.ttft_s, repeat.e2el_s, strict=False):
            if new > 1:
                yield (e2el - ttft) / (new - 1)


def good_requests(repeat: Repeat, slo: SloConfig) -> int:
    """The number of requests of one rank that met every limit that is set. As in vLLM, the tpot of an answer of one
    token counts as 0."""
    good = 0
    for (_, new), ttft, e2el in zip(repeat.lengths, repeat.ttft_s, repeat.e2el_s, strict=False):
        tpot = 0.0
        if new > 1:
            tpot = (e2el - ttft) / (new - 1)
        limits = ((ttft, slo.ttft), (tpot, slo.tpot), (e2el, slo.e2el))
        good += all(limit is None or value <= limit for value, limit in limits)
    return good


def serving(repeats: Sequence[Repeat]) -> Serving | None:
    """The figures of the server that answered the requests; None for an engine without a server."""
    servers = [repeat.server for repeat in repeats if repeat.server is not None]
    if not servers:
        return None
    failures = [failure for repeat in repeats for failure in repeat.failures]
    by_kind = {failure.kind: failure for failure in reversed(failures)}
    names = sorted(set.intersection(*(set(server.own_metrics) for server in servers)))
    lags = [server.loop_lag_s for server in servers]
    send_lags = [server.send_lag_s for server in servers if server.send_lag_s is not None]
    send_lag = None
    if send_lags:
        send_lag = _worst(send_lags)
    return Serving(
        software=servers[-1].software,
        dialect=servers[-1].dialect,
        tokens_checked=servers[-1].tokens_checked,
        requests=sum(repeat.completions + len(repeat.failures) for repeat in repeats),
        failures=dict(Counter(failure.kind for failure in failures)),
        examples=tuple(by_kind[kind] for kind in sorted(by_kind)),
        retries=sum(server.retries for server in servers),
        read_otherwise=max(
            (server.read_otherwise for server in servers if server.read_otherwise is not None), default=None
        ),
        tokens_per_event=_median(server.tokens_per_event for server in servers),
        cpu_share=max(server.cpu_share for server in servers),
        loop_lag_s=_worst(lags),
        send_lag_s=send_lag,
        client_bound=_client_bound(servers, [time for repeat in repeats for time in repeat.e2el_s]),
        own_metrics={name: statistics.median(server.own_metrics[name] for server in servers) for name in names},
        bunched=_median(server.bunched for server in servers),
    )


def _median(values: Iterable[float | None]) -> float | None:
    """The median of the values that are not None."""
    known = [value for value in values if value is not None]
    if known:
        return statistics.median(known)
    return None


def _worst(lags: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The largest p50 and the largest p99."""
    return max(p50 for p50, _ in lags), max(p99 for _, p99 in lags)


def _client_bound(servers: Sequence[ServerRepeat], e2el_s: Sequence[float]) -> str | None:
    """The reason to believe that the client was the bottleneck; None if there is none."""
    share, lag = max(server.cpu_share for server in servers), max(server.loop_lag_s[0] for server in servers)
    if share > MOST_CPU_SHARE:
        return f"the client took {share:.0%} of a core"
    if e2el_s and lag > MOST_LAG_SHARE * (answer := statistics.median(e2el_s)):
        return f"the client was late by {lag * 1000:.1f} ms in the median, and an answer took {answer * 1000:.1f} ms"
    return None
