"""Requests one by one: their times by vLLM's definitions, which of them met the limits, and what their client cost."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import TYPE_CHECKING

from launcher.results.measured import Serving
from launcher.results.summaries import quantiles, spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from launcher.config.serving import SloConfig
    from launcher.results.measured import Repeat, ServerRepeat
    from shards.untrusted_files import JsonObject

MOST_CPU_SHARE = 0.9
MOST_LAG_SHARE = 0.05


def request_metrics(repeats: Sequence[Sequence[Repeat]], slo: SloConfig | None) -> JsonObject:
    """The metrics of requests one by one, from each repeat's measurements by rank."""
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
    """The time per output token of each prompt of which there are more than one."""
    for repeat in repeats:
        for (_, new), ttft, e2el in zip(repeat.lengths, repeat.ttft_s, repeat.e2el_s, strict=False):
            if new > 1:
                yield (e2el - ttft) / (new - 1)


def good_requests(repeat: Repeat, slo: SloConfig) -> int:
    """The requests of one rank that met every limit that is set. The tpot of a single token counts as 0, as in vLLM."""
    good = 0
    for (_, new), ttft, e2el in zip(repeat.lengths, repeat.ttft_s, repeat.e2el_s, strict=False):
        tpot = (e2el - ttft) / (new - 1) if new > 1 else 0.0
        limits = ((ttft, slo.ttft), (tpot, slo.tpot), (e2el, slo.e2el))
        good += all(limit is None or value <= limit for value, limit in limits)
    return good


def serving(repeats: Sequence[Repeat]) -> Serving | None:
    """The figures of the server that answered; None where no server did."""
    seen = [repeat.server for repeat in repeats if repeat.server is not None]
    if not seen:
        return None
    failures = [failure for repeat in repeats for failure in repeat.failures]
    by_kind = {failure.kind: failure for failure in reversed(failures)}
    counted = [one.read_otherwise for one in seen if one.read_otherwise is not None]
    events = [one.tokens_per_event for one in seen if one.tokens_per_event is not None]
    bunched = [one.bunched for one in seen if one.bunched is not None]
    names = sorted(set.intersection(*(set(one.own_metrics) for one in seen)))
    sends = [one.send_lag_s for one in seen if one.send_lag_s is not None]
    return Serving(
        software=seen[-1].software,
        dialect=seen[-1].dialect,
        tokens_checked=seen[-1].tokens_checked,
        requests=sum(repeat.completions + len(repeat.failures) for repeat in repeats),
        failures=dict(Counter(failure.kind for failure in failures)),
        examples=tuple(by_kind[kind] for kind in sorted(by_kind)),
        retries=sum(one.retries for one in seen),
        read_otherwise=max(counted) if counted else None,
        tokens_per_event=statistics.median(events) if events else None,
        cpu_share=max(one.cpu_share for one in seen),
        loop_lag_s=_worst(one.loop_lag_s for one in seen),
        send_lag_s=_worst(sends) if sends else None,
        client_bound=_client_bound(seen, [time for repeat in repeats for time in repeat.e2el_s]),
        own_metrics={name: statistics.median(one.own_metrics[name] for one in seen) for name in names},
        bunched=statistics.median(bunched) if bunched else None,
    )


def _worst(lags: Iterable[tuple[float, float]]) -> tuple[float, float]:
    p50, p99 = zip(*lags, strict=True)
    return max(p50), max(p99)


def _client_bound(seen: Sequence[ServerRepeat], e2el_s: Sequence[float]) -> str | None:
    """The reason to suspect that the figures are those of the client, None without one."""
    share, (lag, _) = max(one.cpu_share for one in seen), _worst(one.loop_lag_s for one in seen)
    if share > MOST_CPU_SHARE:
        return f"the client took {share:.0%} of a core"
    if e2el_s and lag > MOST_LAG_SHARE * (answer := statistics.median(e2el_s)):
        return f"the client was late by {lag * 1000:.1f} ms in the median, and an answer took {answer * 1000:.1f} ms"
    return None
