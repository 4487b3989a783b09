"""When the difference between two runs' speeds is the cost of serving, and when it is something else."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from running import ROOT

from launcher.results.measured import Serving
from launcher.results.record import read_record
from launcher.results.serving_cost import serving_cost

if TYPE_CHECKING:
    from launcher.results.record import Record

FSDP = read_record(json.loads((ROOT / "tests" / "records" / "version_1.json").read_text()))
EIGHT = {"concurrency": 8}


def endpoint(software: str | None, load: dict[str, Any] | None = None, server: str = "none") -> Record:
    """The record of the same run by a server."""
    serving = Serving(
        software=software, dialect="vllm", tokens_checked="ids", requests=4, failures={}, examples=(), retries=0,
        read_otherwise=0, tokens_per_event=1.0, cpu_share=0.1, loop_lag_s=(0.0, 0.0), send_lag_s=None,
        client_bound=None, own_metrics={},
    )  # fmt: skip
    assert FSDP.metrics is not None
    config = FSDP.config | {"server": {"name": server}} | ({"load": load} if load else {})
    return replace(FSDP, backend="endpoint", metrics=replace(FSDP.metrics, serving=serving), config=config)


def test_the_same_engine_in_process_and_behind_http() -> None:
    behind = endpoint("fsdp, launcher.serve 0.1.0")
    assert serving_cost(FSDP, behind, 0.75) == (0.25, None)
    assert serving_cost(behind, FSDP, 1.25) == (pytest.approx(0.2), None), "the other way round"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (endpoint("vllm 0.32.0"), "the server has vllm 0.32.0"),
        (endpoint(None), "the server has an engine that it does not name (dialect=vllm)"),
        (endpoint("fsdp, launcher.serve 0.1.0", EIGHT), "the load or the number of devices is another"),
        (
            replace(endpoint("fsdp, launcher.serve 0.1.0", server="litserve"), num_devices=7),
            "the load or the number of devices is another",
        ),
    ],
)
def test_what_differs_in_more_than_the_server(other: Record, reason: str) -> None:
    assert serving_cost(FSDP, other, 0.5) == (None, f"the cost of serving is not known: {reason}")


def test_two_engines_and_two_servers_ask_no_such_question() -> None:
    assert serving_cost(FSDP, FSDP, 0.5) == (None, None)
    assert serving_cost(endpoint("vllm"), endpoint("vllm"), 0.5) == (None, None)
