"""A server's own measurements: its Prometheus metrics before and after a run."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

SAMPLE = re.compile(rb"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{[^}\n]*\})? ([^\s]+)", re.MULTILINE)

MEANS = {
    "ttft_s": ("vllm:time_to_first_token_seconds", "sglang:time_to_first_token_seconds"),
    "itl_s": ("vllm:inter_token_latency_seconds", "sglang:inter_token_latency_seconds"),
    "e2el_s": ("vllm:e2e_request_latency_seconds", "sglang:e2e_request_latency_seconds", "tgi_request_duration"),
    "queue_s": ("vllm:request_queue_time_seconds", "sglang:queue_time_seconds", "tgi_request_queue_duration"),
}
"""Means over requests, from histograms by the names that servers use."""

COUNTS = {
    "prompt_tokens": ("vllm:prompt_tokens_total", "sglang:prompt_tokens_total"),
    "cached_prompt_tokens": ("vllm:prompt_tokens_cached_total", "sglang:cached_tokens_total"),
    "new_tokens": ("vllm:generation_tokens_total", "sglang:generation_tokens_total"),
    "preemptions": ("vllm:num_preemptions_total", "sglang:num_retracted_reqs_total"),
}


def samples(text: bytes) -> dict[str, float]:
    """The values in Prometheus' text format by name, summed over their labels."""
    values: dict[str, float] = {}
    for name, value in SAMPLE.findall(text):
        try:
            number = float(value)
        except ValueError:
            continue
        if math.isfinite(number):
            values[name.decode()] = values.get(name.decode(), 0.0) + number
    return values


def between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Counts of a server between two samples, and the means of its timings, as far as it publishes them."""
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    measured: dict[str, float] = {}
    for name, histograms in MEANS.items():
        for histogram in histograms:
            if (count := grown.get(f"{histogram}_count", 0.0)) > 0:
                measured[name] = grown[f"{histogram}_sum"] / count
    for name, counters in COUNTS.items():
        for counter in counters:
            if counter in grown:
                measured[name] = grown[counter]
    return measured
