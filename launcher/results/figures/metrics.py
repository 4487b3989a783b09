"""Compute the figures of a record from the repeats: medians over the repeats, quantiles over the tokens.

To add a counter of an engine, return it in `Generation.counters` and give it an entry in `COUNTERS`; sums, record and
report follow.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.results.figures.serving import request_metrics
from launcher.results.figures.speculation import COUNTED, GUESSED, rows_of, speculates, speculation_of
from launcher.results.figures.summaries import quantiles, spread
from launcher.results.measured import Decoding, Metrics, Partial, Spread, Totals

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from launcher.config.parts.serving import SloConfig
    from launcher.results.measured import Repeat

SLOTS, ROWS = "slots_in_decode_steps", "rows_in_decode_steps"
COUNTERS: dict[str, str] = {SLOTS: "slots, of all decode steps", ROWS: "rows computed in decode steps", **COUNTED}
"""The labels in the report of all counters that engines may return; values of calls and ranks are summed."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a run: the headline figures of its record, and the measurements behind them."""

    new_tokens_per_s: float | None
    ttft_s: float | None
    itl_s: float | None
    totals: Totals
    partial: Partial | None
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class RepeatTotal:
    """One repeat over all ranks: the sums of their tokens, and the times of the slowest rank."""

    completions: int
    prompt_tokens: int
    new_tokens: int
    same_tokens: bool
    wall_s: float
    prefill_s: float | None
    decode_s: float | None
    counters: dict[str, float]

    @property
    def new_tokens_per_s(self) -> float:
        return self.new_tokens / self.wall_s

    @property
    def prefill_tokens_per_s(self) -> float | None:
        if self.prefill_s:
            return self.prompt_tokens / self.prefill_s
        return None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens per second of decoding, without the first token of each prompt, which counts as prefill."""
        if self.decode_s:
            return (self.new_tokens - self.completions) / self.decode_s
        return None


def figures(
    repeats: Sequence[Sequence[Repeat]],
    prompts: int,
    num_devices: int,
    windows: Sequence[int | None] = (),
    slo: SloConfig | None = None,
) -> Figures | None:
    """The figures of a run from the measurements of each rank in each repeat; None if nothing was measured.

    Only repeats of all `prompts` count; a prompt whose request failed also belongs to its repeat. If there is no
    complete repeat, because the only one was split between attempts, its last part counts, and `partial` has the number
    of its prompts. `windows` are the sliding windows of the model's layers, in tokens.
    """
    answered = [ranks for ranks in repeats if any(rank.completions for rank in ranks)]
    whole = [ranks for ranks in answered if sum(rank.completions + len(rank.failures) for rank in ranks) == prompts]
    counted = whole or answered[-1:]
    if not counted:
        return None
    totals = [total(ranks) for ranks in counted]
    ranks = [rank for repeat in counted for rank in repeat]
    partial = None
    if not whole:
        partial = Partial(totals[0].completions, prompts)
    metrics = Metrics(
        new_tokens_per_s=spread(repeat.new_tokens_per_s for repeat in totals),
        new_tokens_per_s_per_device=spread(repeat.new_tokens_per_s / num_devices for repeat in totals),
        prefill_tokens_per_s=spread(repeat.prefill_tokens_per_s for repeat in totals),
        decode_tokens_per_s=spread(repeat.decode_tokens_per_s for repeat in totals),
        wall_s=spread(repeat.wall_s for repeat in totals),
        ttft_s=quantiles(value for rank in ranks for value in rank.ttft_s),
        itl_s=quantiles(value for rank in ranks for value in rank.itl_s),
        decode=decoding(counted, windows),
        slots_in_use=in_use(totals, SLOTS),
        rows_in_use=in_use(totals, ROWS),
        speculation=speculation_of(counted),
        counters={name: spread(repeat.counters.get(name) for repeat in totals) for name in totals[0].counters},
        **request_metrics(counted, slo),
    )
    return Figures(
        new_tokens_per_s=metrics.new_tokens_per_s.median,
        ttft_s=metrics.ttft_s.p50,
        itl_s=metrics.itl_s.p50,
        totals=Totals(
            repeats=len(totals),
            prompts=totals[0].completions,
            prompt_tokens=totals[0].prompt_tokens,
            new_tokens=totals[0].new_tokens,
            same_tokens_every_repeat=all(rank.same_tokens for ranks in repeats for rank in ranks),
        ),
        partial=partial,
        metrics=metrics,
    )


def total(ranks: Sequence[Repeat]) -> RepeatTotal:
    """One repeat over all ranks."""
    return RepeatTotal(
        completions=sum(rank.completions for rank in ranks),
        prompt_tokens=sum(rank.prompt_tokens for rank in ranks),
        new_tokens=sum(rank.new_tokens for rank in ranks),
        same_tokens=all(rank.same_tokens for rank in ranks),
        wall_s=max(rank.wall_s for rank in ranks),
        prefill_s=_slowest(rank.prefill_s for rank in ranks),
        decode_s=_slowest(rank.decode_s for rank in ranks),
        counters=summed(rank.counters for rank in ranks),
    )


def _slowest(seconds: Iterable[float | None]) -> float | None:
    known: list[float] = []
    for value in seconds:
        if value is None:
            return None
        known.append(value)
    return max(known)


def summed(counters: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum of the counters of several calls or ranks; ValueError for a name that is not in `COUNTERS`."""
    sums: dict[str, float] = {}
    for values in counters:
        for name, value in values.items():
            if name not in COUNTERS:
                raise ValueError(f"{name} is not a counter of launcher.results.figures.metrics.COUNTERS")
            sums[name] = sums.get(name, 0) + value
    return sums


def in_use(totals: Sequence[RepeatTotal], name: str) -> Spread | None:
    """The share of the slots or rows of decode steps that produced a token of an answer; with speculative decoding, the
    share of slots that were occupied, and None for rows."""
    if not all(repeat.counters.get(name) for repeat in totals):
        return None
    if not any(GUESSED in repeat.counters for repeat in totals):
        return spread((repeat.new_tokens - repeat.completions) / repeat.counters[name] for repeat in totals)
    if name == SLOTS:
        return spread(repeat.counters[ROWS] / repeat.counters[SLOTS] for repeat in totals)
    return None


def decoding(repeats: Sequence[Sequence[Repeat]], windows: Sequence[int | None]) -> Decoding | None:
    """The decode steps of some repeats; None if there were none. `windows` are the sliding windows of the model's
    layers, in tokens."""
    ranks = [rank for repeat in repeats for rank in repeat]
    steps = sum(max(rank.decode_steps for rank in repeat) for repeat in repeats)
    tokens = sum(new - 1 for rank in ranks for _, new in rank.lengths)
    seconds = 0.0
    for repeat in repeats:
        times = []
        for rank in repeat:
            decode_s = rank.decode_s
            if decode_s is None:  # the engine mixes prefill and decode steps
                decode_s = rank.wall_s - min(rank.ttft_s, default=rank.wall_s)
            times.append(decode_s)
        seconds += max(times)
    if not steps or not tokens or not seconds:
        return None
    is_guessing, rows = speculates(ranks), tokens
    if is_guessing:
        contexts = [context for rank in ranks for context in rows_of(rank)]
        rows, cached = len(contexts), 0.0
        for window in windows or (None,):  # a layer caches at most the tokens of its window
            kept = contexts if window is None else [min(context, window - 1) for context in contexts]
            cached += sum(kept) / max(len(windows), 1)
    else:
        cached = sum(_cached_tokens(prompt, new, windows) for rank in ranks for prompt, new in rank.lengths)
    return Decoding(
        steps=steps,
        seconds=seconds,
        tokens=tokens,
        sequences_at_once=rows / steps / len(repeats[0]),
        cached_tokens=cached / rows,
        several_tokens_a_step=not is_guessing and any(gap == 0 for rank in ranks for gap in rank.itl_s),
        tokens_per_row=tokens / rows,
    )


def _cached_tokens(prompt: int, new: int, windows: Sequence[int | None]) -> float:
    """The tokens in the cache of a layer, summed over the decode steps of one sequence, averaged over the layers.

    In step t there are prompt + t tokens, but no more than the layer's window keeps.
    """
    total, steps = 0, new - 1
    for window, layers in Counter(windows or (None,)).items():
        growing, kept = steps, 0
        if window is not None:
            growing = min(max(window - 1 - prompt, 0), steps)
            kept = (steps - growing) * (window - 1)
        total += layers * (growing * prompt + growing * (growing + 1) // 2 + kept)
    return total / max(len(windows), 1)
