"""Figures of requests by vLLM's definitions, compared with numbers calculated by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.config.parts.serving import SloConfig
from launcher.report.run.request_rows import serving_rows
from launcher.results.figures.metrics import figures
from launcher.results.measured import Metrics, Repeat, RequestFailure, ServerRepeat

SERVER = ServerRepeat(
    software="vllm 0.32.0",
    dialect="vllm",
    tokens_checked="ids",
    retries=0,
    read_otherwise=0,
    tokens_per_event=1.0,
    cpu_share=0.1,
    loop_lag_s=(0.001, 0.01),
    send_lag_s=None,
    own_metrics={"ttft_s": 0.3},
    bunched=0.25,
)

REQUESTS = ((0.5, 2.5, 5), (1.0, 1.0, 1), (0.2, 4.2, 41))
"""ttft, e2el and new tokens of each request: tpots of 0.5 s, none, and 0.1 s."""


def repeat(*failures: RequestFailure, server: ServerRepeat | None = SERVER) -> Repeat:
    """A repeat of 10 s with the three REQUESTS and the given failures."""
    return Repeat(
        number=0,
        wall_s=10.0,
        prefill_s=None,
        decode_s=None,
        completions=len(REQUESTS),
        prompt_tokens=30,
        new_tokens=sum(new for _, _, new in REQUESTS),
        decode_steps=0,
        lengths=tuple((10, new) for _, _, new in REQUESTS),
        ttft_s=tuple(ttft for ttft, _, _ in REQUESTS),
        itl_s=(),
        same_tokens=True,
        e2el_s=tuple(e2el for _, e2el, _ in REQUESTS),
        failures=failures,
        server=server,
    )


def metrics_of(*repeats: Repeat, slo: SloConfig | None = None) -> Metrics:
    measured = figures([[one] for one in repeats], len(REQUESTS) + len(repeats[0].failures), 1, slo=slo)
    assert measured is not None
    assert measured.partial is None
    return measured.metrics


def test_times_and_throughput() -> None:
    metrics = metrics_of(repeat())
    assert metrics.tpot_s is not None
    assert (metrics.tpot_s.count, metrics.tpot_s.p50) == (2, pytest.approx(0.3))
    assert metrics.e2el_s is not None
    assert (metrics.e2el_s.count, metrics.e2el_s.p50) == (3, 2.5)
    assert metrics.request_throughput is not None
    assert metrics.request_throughput.median == pytest.approx(0.3)
    assert metrics.new_tokens_per_s.median == pytest.approx(4.7)
    assert (metrics.request_goodput, metrics.slo_attainment) == (None, None)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (SloConfig(ttft=0.5), 2),
        (SloConfig(ttft=0.1), 0),
        (SloConfig(tpot=0.1), 2),
        (SloConfig(e2el=2.5), 2),
        (SloConfig(ttft=0.5, tpot=0.1), 1),
        (SloConfig(ttft=2, tpot=2, e2el=5), 3),
    ],
)
def test_goodput_counts_requests_that_meet_all_limits(slo: SloConfig, good: int) -> None:
    metrics = metrics_of(repeat(RequestFailure(3, "http_429", "busy")), slo=slo)
    assert metrics.request_goodput is not None
    assert metrics.request_goodput.median == pytest.approx(good / 10)
    assert metrics.slo_attainment is not None
    assert metrics.slo_attainment.median == pytest.approx(good / 4), "the one that failed is a bad one"


def test_failures_are_counted_by_kind() -> None:
    busy, stalled = RequestFailure(3, "http_429", "busy"), RequestFailure(4, "stalled", "no byte for 120 s")
    metrics = metrics_of(repeat(busy, stalled), repeat(replace(busy, index=5), replace(busy, index=6)))
    assert metrics.serving is not None
    assert metrics.serving.failures == {"http_429": 3, "stalled": 1}
    assert metrics.serving.examples == (busy, stalled)
    assert metrics.serving.requests == 10


def test_parts_that_came_together_are_told() -> None:
    serving = metrics_of(repeat(), repeat(server=replace(SERVER, bunched=0.75))).serving
    assert serving is not None
    assert serving.bunched == 0.5
    assert serving_rows(serving)[0] == [
        "server",
        "vllm 0.32.0",
        "",
        "",
        "checked: ids, 50% of the parts arrived together",
    ]
    alone = serving_rows(replace(serving, bunched=0.05))[0]
    assert alone is not None
    assert alone[-1] == "checked: ids"


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (SERVER, None),
        (replace(SERVER, cpu_share=0.95), "the client took 95% of a core"),
        (
            replace(SERVER, loop_lag_s=(0.2, 0.3)),
            "the client was late by 200.0 ms in the median, and an answer took 25",
        ),
    ],
)
def test_a_run_that_its_client_bound_says_so(server: ServerRepeat, words: str | None) -> None:
    metrics = metrics_of(repeat(), repeat(server=server))
    assert metrics.serving is not None
    bound = metrics.serving.client_bound
    assert bound is None if words is None else bound is not None and bound.startswith(words)


def test_no_server_no_figures_of_one() -> None:
    assert metrics_of(repeat(server=None)).serving is None
