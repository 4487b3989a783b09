"""The numbers of devices, batches and lengths that fit: each the largest or smallest with everything else unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from shards.plan.layout import Layout
from shards.plan.memory import cache_bytes, device_plans, fits, largest
from shards.plan.refusals import illegal
from shards.plan.request import MOST_DEVICES, PlanRequest

_LARGEST = 2**20


def is_possible(request: PlanRequest) -> bool:
    """True if the engine supports the request, and every device has room."""
    return illegal(request) is None and fits(request)


def possible_devices(request: PlanRequest) -> Iterator[int]:
    """Numbers of devices per node on which the request is possible, smallest first; for a monotone engine one device
    and the smallest number of several at most."""
    most = MOST_DEVICES // request.num_nodes
    counts: Iterable[int] = range(1, min(request.engine.most_devices(request), most) + 1)
    if request.engine.is_monotone:
        too_few = largest(lambda count: count < 2 or not is_possible(replace(request, devices=count)), most - 1)
        counts = (1, too_few + 1)
    for count in counts:
        if is_possible(replace(request, devices=count)):
            yield count


def smallest_devices(request: PlanRequest) -> int | None:
    """The smallest number of devices per node on which the request is possible; None without a known capacity."""
    if request.capacity_bytes is None:
        return None
    return next(possible_devices(request), None)


def largest_batch(request: PlanRequest, layout: Layout) -> int | None:
    """The largest batch that fits, into the pool if there is one; None if it is not bounded by anything known."""
    pool, capacity = request.engine.pool(request), request.capacity_bytes
    if pool is not None:
        if capacity is None and pool.nbytes is None:
            return None
        reserved = min(device.kv_cache_reserved_bytes for device in device_plans(request, layout))
        return largest(lambda batch: cache_bytes(request, batch) <= reserved, pool.sequences)
    if capacity is None or request.engine.scheme(request) is None:
        return None
    return largest(lambda batch: fits(replace(request, batch_size=batch), layout), _LARGEST)


def longest_context(request: PlanRequest, layout: Layout) -> int | None:
    """The most tokens of prompt and answer together, with the requested length of the answer; at most the model's
    positions."""
    most = request.shape.max_position_embeddings
    if request.capacity_bytes is None:
        return most
    new = request.max_new_tokens
    prompt = largest(lambda tokens: fits(replace(request, prompt_tokens=tokens), layout), (most or _LARGEST) - new)
    if prompt:
        return prompt + new
    return None
