"""The answers of a server in the form that a run records."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from launcher.backends.base import Completion
from launcher.results.measured import RequestFailure, ServerRepeat

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.backends.base import Prompt
    from launcher.backends.endpoint.answers import Answer
    from launcher.backends.endpoint.load import ClientCost
    from launcher.backends.endpoint.recognise import Server

    Answered = Sequence[tuple[Prompt, Answer]]


TOGETHER_S = 1e-4  # parts of an answer with a smaller gap, in seconds, arrived together


def completions_of(answered: Answered, gives_ids: bool) -> tuple[Completion, ...]:
    """The complete answers, by the index of their prompts."""
    completions = []
    for prompt, answer in answered:
        if answer.failure is not None:
            continue
        assert answer.finish_reason is not None, "an answer without the reason of its end has a failure"
        text = None
        if not gives_ids:
            text = answer.text
        completions.append(
            Completion(
                index=prompt.index,
                token_ids=answer.token_ids or (),
                finish_reason=answer.finish_reason,
                ttft_s=answer.ttft_s,
                itl_s=answer.itl_s,
                text=text,
                num_tokens=answer.new_tokens,
            )
        )
    return tuple(sorted(completions, key=lambda item: item.index))


def failures_of(answered: Answered) -> tuple[RequestFailure, ...]:
    """The requests without an answer, by the index of their prompts."""
    failed = [(prompt.index, answer.failure) for prompt, answer in answered if answer.failure is not None]
    return tuple(RequestFailure(index, failure.kind, failure.message) for index, failure in sorted(failed))


def server_repeat(
    answered: Answered, server: Server, gives_ids: bool, cost: ClientCost, own_metrics: Mapping[str, float]
) -> ServerRepeat:
    """One repeat as measured by the client."""
    whole = [(prompt, answer) for prompt, answer in answered if answer.failure is None]
    counted = [(len(prompt.token_ids), answer.prompt_tokens) for prompt, answer in whole if answer.prompt_tokens]
    events = sum(len(answer.pieces_s) for _, answer in whole)
    gaps = [gap for _, answer in whole for gap in answer.itl_s]
    read_otherwise = tokens_per_event = bunched = None
    if counted:
        read_otherwise = sum(ours != theirs for ours, theirs in counted)
    if events:
        tokens_per_event = sum(answer.new_tokens for _, answer in whole) / events
    if gaps:
        bunched = sum(gap < TOGETHER_S for gap in gaps) / len(gaps)
    if gives_ids:
        tokens_checked = "ids"
    elif read_otherwise:
        tokens_checked = "none"
    else:
        tokens_checked = "text"
    return ServerRepeat(
        software=server.software,
        dialect=server.dialect,
        tokens_checked=tokens_checked,
        retries=sum(answer.attempts - 1 for _, answer in answered),
        read_otherwise=read_otherwise,
        tokens_per_event=tokens_per_event,
        cpu_share=cost.cpu_s / cost.wall_s,
        loop_lag_s=_p50_and_p99(cost.loop_lag_s) or (0.0, 0.0),
        send_lag_s=_p50_and_p99(cost.send_lag_s),
        own_metrics=dict(own_metrics),
        bunched=bunched,
    )


def _p50_and_p99(values: Sequence[float]) -> tuple[float, float] | None:
    if not values:
        return None
    if len(values) == 1:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]
