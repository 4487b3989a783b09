"""Which rank answers which prompt, in which batch."""

from __future__ import annotations

import pytest

from launcher.backends.base import Prompt
from launcher.composition.compose import compose_run
from launcher.prompts.batches import batches, call_count, split, warm_up_batch
from shards.machine.world import World

EQUAL, RAGGED = (1, 1, 1, 1, 1), (3, 9, 1, 8, 2)


@pytest.mark.parametrize(
    ("backend", "world_size", "lengths", "expected"),
    [
        ("fsdp", 1, EQUAL, [[[0, 1], [2, 3], [4]]]),
        ("fsdp", 2, EQUAL, [[[0, 2], [4]], [[1, 3], []]]),
        ("fsdp", 3, EQUAL, [[[0, 3]], [[1, 4]], [[2]]]),
        ("fsdp", 7, EQUAL, [[[0]], [[1]], [[2]], [[3]], [[4]], [[]], [[]]]),
        ("deepspeed", 2, EQUAL, [[[0, 1], [2, 3], [4]]] * 2),
        ("vllm", 1, EQUAL, [[[0, 1, 2, 3, 4]]]),
        ("fsdp", 2, RAGGED, [[[1, 0], [2]], [[3, 4], []]]),
        ("deepspeed", 2, RAGGED, [[[1, 3], [0, 4], [2]]] * 2),
    ],
)
def test_every_prompt_is_answered_once_in_as_many_calls_on_every_rank(
    backend: str, world_size: int, lengths: tuple[int, ...], expected: list[list[list[int]]]
) -> None:
    prompts = [Prompt(index, "", (1,) * length) for index, length in enumerate(lengths)]
    scheduling = "continuous" if backend == "vllm" else "static"
    config = compose_run([f"backend={backend}", f"measure.scheduling={scheduling}"])
    config.measure.batch_size = 2
    found = []
    for rank in range(world_size):
        world = World(rank=rank, world_size=world_size)
        size, calls = call_count(len(prompts), world, config)
        own = split(prompts, world, config)
        found.append([[prompt.index for prompt in batch] for batch in batches(own, size, calls)])
    assert found == expected


@pytest.mark.parametrize(("backend", "warm_up"), [("fsdp", 6), ("tensor_parallel", 2), ("vllm", 7)])
def test_with_slots_each_rank_is_given_the_whole_set(backend: str, warm_up: int) -> None:
    prompts = [Prompt(index, "", (1,) * (index + 1)) for index in range(7)]
    config = compose_run([f"backend={backend}"])
    config.measure.batch_size = 2
    for rank in range(3):
        world = World(rank=rank, world_size=3)
        assert split(prompts, world, config) == prompts[::-1]
        assert call_count(len(prompts), world, config) == (7, 1)
        assert warm_up_batch(prompts, world, config) == prompts[::-1][:warm_up]
