"""Summaries of values: over the repeats, and over prompts or tokens."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from launcher.results.measured import Quantiles, Spread

if TYPE_CHECKING:
    from collections.abc import Iterable

INTERLEAVED = "continuous batching interleaves prefill and decode, or nothing was decoded"


def spread(values: Iterable[float | None]) -> Spread:
    """Median, extremes and raw values over the repeats; only the raw values if one of them is None."""
    raw = tuple(values)
    known = [value for value in raw if value is not None]
    if not known or len(known) < len(raw):
        return Spread(None, None, None, raw, INTERLEAVED)
    return Spread(statistics.median(known), min(known), max(known), raw)


def quantiles(values: Iterable[float]) -> Quantiles:
    """p50, p90 and p99 by linear interpolation, with the count; all None and the reason if there are no values."""
    known = list(values)
    if not known:
        return Quantiles(None, None, None, 0, "no such value was measured")
    if len(known) == 1:
        return Quantiles(known[0], known[0], known[0], 1)
    cuts = statistics.quantiles(known, n=100, method="inclusive")
    return Quantiles(cuts[49], cuts[89], cuts[98], len(known))
