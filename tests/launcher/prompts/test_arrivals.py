"""The arrival times of prompts."""

from __future__ import annotations

import pytest

from launcher.backends.base import Prompt
from launcher.composition.compose import compose_run
from launcher.config.schema import ConfigError
from launcher.prompts.arrivals import Pacing, arrivals_of, poisson_arrivals


def test_all_at_once() -> None:
    pacing = Pacing(3)
    assert list(pacing.due(0.0, 0)) == [0, 1, 2]
    assert list(pacing.due(9.0, 0)) == []
    assert pacing.wait_s(9.0) == 0.0


def test_a_closed_loop_fills_what_is_free() -> None:
    pacing = Pacing(5, concurrency=2)
    assert list(pacing.due(0.0, 0)) == [0, 1]
    assert list(pacing.due(1.0, 2)) == []
    assert list(pacing.due(2.0, 1)) == [2]
    assert list(pacing.due(3.0, 0)) == [3, 4]
    assert list(pacing.due(4.0, 0)) == []


def test_an_open_loop_begins_each_at_its_moment() -> None:
    pacing = Pacing(3, arrivals=(0.5, 1.5, 1.5))
    assert (list(pacing.due(0.2, 0)), pacing.wait_s(0.2)) == ([], pytest.approx(0.3))
    assert list(pacing.due(0.5, 7)) == [0]
    assert (list(pacing.due(9.0, 7)), pacing.wait_s(9.0)) == ([1, 2], 0.0)


def test_where_the_moments_come_from() -> None:
    base = ["backend=vllm", "accelerator=cpu"]
    prompts = [Prompt(0, "a", (1,), arrival_s=0.0), Prompt(1, "b", (2,), arrival_s=2.5)]
    assert arrivals_of(compose_run(base), prompts) is None
    assert arrivals_of(compose_run([*base, "load.request_rate=3", "seed=5"]), prompts) == poisson_arrivals(2, 3.0, 5)
    recorded = compose_run([*base, "load.arrivals=true", "prompts=file", "prompts.path=a.jsonl"])
    assert arrivals_of(recorded, prompts) == (0.0, 2.5)
    with pytest.raises(ConfigError, match=r"load\.arrivals=true, and prompt 2 has no arrival_s\. HINT: "):
        arrivals_of(recorded, [*prompts, Prompt(2, "c", (3,))])
