"""FSDP with resident layers: a rank holds the planned bytes, and gathers into no more than the planned buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shards.engines.fsdp import FsdpPlanner
from shards.errors import PlanError
from shards.load.blocks import local_tensor
from shards.load.meta import build_meta
from shards.load.random_weights import fill_random
from shards.machine.hardware import Device
from shards.model.known_shape import known_shape
from shards.parallel.collectives import Collectives
from shards.parallel.fully_shard import fully_shard_model, reshard
from shards.plan.memory import device_plans, make_layout
from shards.plan.plan import make_plan
from shards.plan.request import PlanRequest

LAYERS = 5
LEAST_BYTES = 30_000  # larger than the activations of a token, smaller than a gathered buffer
LLAMA = {
    "model_type": "llama", "vocab_size": 1001, "hidden_size": 256, "intermediate_size": 700,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FALCON = {
    "model_type": "falcon", "vocab_size": 1001, "hidden_size": 256, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8, "num_kv_heads": 2, "new_decoder_architecture": True,
}  # fmt: skip


class Gathered(TorchDispatchMode):
    """Records the peak bytes in large tensors, without the model's own parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = {local_tensor(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
        self.most, self.seen = 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves((args, out))):
            self.seen[id(tensor)] = ref(tensor)
        storages = [tensor.untyped_storage() for one in self.seen.values() if (tensor := one()) is not None]
        sizes = {one.data_ptr(): one.nbytes() for one in storages if one.nbytes() > LEAST_BYTES}
        self.most = max(self.most, sum(size for place, size in sizes.items() if place not in self.held))
        return out


@pytest.fixture
def two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def copied(out: torch.Tensor, part: torch.Tensor) -> None:
    out.view(2, -1)[1].copy_(part)


IMMEDIATE = Collectives("copies", print, copied, is_immediate=True)
IN_PLACE = replace(IMMEDIATE, meet=lambda: None, room=lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8))
AHEAD = Collectives("gloo", print, copied)


def asked(config: dict[str, Any], **options: Any) -> PlanRequest:
    shape = known_shape(config)
    return PlanRequest(shape=shape, engine=FsdpPlanner(**options), devices=2, dtype_bytes=4, prompt_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("ways", [IMMEDIATE, IN_PLACE, AHEAD], ids=["immediate", "in place", "ahead"])
@pytest.mark.parametrize("resident", [0, 1, 3, 4, LAYERS])
@pytest.mark.parametrize("config", [LLAMA, FALCON], ids=["llama", "falcon"])
@pytest.mark.usefixtures("two_ranks")
def test_a_rank_holds_and_gathers_as_planned(config: dict[str, Any], resident: int, ways: Collectives) -> None:
    model = build_meta(config, torch.float32)
    fully_shard_model(model, init_device_mesh("cpu", (2,)), resident, ways)
    fill_random(model, 0, "cpu")
    request = asked(config, resident_layers=resident)
    layout = make_layout(request)
    assert layout.parameter_bytes[0] == sum(local_tensor(parameter).nbytes for parameter in model.parameters())
    with torch.inference_mode(), Gathered(model) as gathered:
        for _ in range(3):
            model(input_ids=torch.ones(1, 1, dtype=torch.long))
    assert gathered.most == pytest.approx(layout.buffer_bytes, rel=0.1)
    reshard(model)


def used_bytes(request: PlanRequest) -> int:
    """The planned bytes in use on a GPU, without its capacity limit."""
    card = replace(request, device=Device("card"))
    return device_plans(card, make_layout(card))[0].used_bytes


@pytest.mark.parametrize("within_node", [False, True])
def test_auto_keeps_as_many_layers_as_fit_and_no_more(within_node: bool) -> None:
    request = replace(asked(LLAMA, within_node=within_node), num_nodes=2)
    planners = [replace(request.engine, resident_layers=count) for count in range(LAYERS + 1)]
    needed = [used_bytes(replace(request, engine=planner)) for planner in planners]
    assert needed[1] < needed[2] < needed[3] < needed[4] > needed[5], "the last layer takes the buffers away"
    auto = replace(request, engine=replace(request.engine, resident_layers=None))
    for capacity in (one - missing for one in needed for missing in (0, 1)):
        room = [count for count, nbytes in enumerate(needed) if nbytes <= capacity]
        if not room:
            continue
        plan = make_plan(replace(auto, device=Device("card", capacity_bytes=capacity)))
        assert plan.settings == {"resident_layers": max(room), "within_node": within_node}
        assert plan.devices[0].used_bytes == needed[max(room)]


def test_layers_are_gathered_in_place_by_the_devices_of_one_node() -> None:
    request = asked(LLAMA, in_place=True)
    assert request.engine.traffic(request).gathered_in_place
    assert not request.engine.traffic(replace(request, num_nodes=2)).gathered_in_place
    within = replace(request, num_nodes=2, engine=replace(request.engine, within_node=True))
    assert within.engine.traffic(within).gathered_in_place


def test_auto_shards_within_a_node_where_that_fits() -> None:
    request = replace(asked(LLAMA, within_node=True), num_nodes=3)
    needed, whole = used_bytes(request), known_shape(LLAMA).num_parameters * 4
    for capacity, within_node, parts in ((needed, 1, 2), (needed - 1, 0, 6)):
        card = Device("card", capacity_bytes=capacity)
        plan = make_plan(replace(request, engine=FsdpPlanner(within_node=None), device=card))
        assert (plan.settings["within_node"], len(plan.devices)) == (within_node, 6)
        assert plan.devices[0].parameter_bytes == pytest.approx(whole / parts, rel=0.01)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"resident_layers": LAYERS + 1}, "The model has 5 layers, of which not 6 can stay whole."),
        ({"resident_layers": None}, "What fits a device cannot be known here"),
        ({"within_node": None}, "What fits a device cannot be known here"),
    ],
)
def test_what_cannot_be_decided_is_refused(options: dict[str, Any], fact: str) -> None:
    with pytest.raises(PlanError, match=fact):
        make_plan(asked(LLAMA, **options))


def test_a_plan_says_how_many_layers_would_fit() -> None:
    request = replace(asked(LLAMA), device=Device("card", capacity_bytes=10**9))
    assert make_plan(request).advice == "backend.resident_layers=auto: 5 of 5 layers fit whole on each device"
    assert make_plan(replace(request, devices=1)).advice is None
