"""Two ranks with a tensor-parallel cut answer as the whole model does, and hold half of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from running import ROOT, torchrun
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from shards.errors import PlanError
from shards.load import build_meta
from shards.tensor_parallel import tensor_parallel_model

LLAMA = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 96, "intermediate_size": 252, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ELSEWHERE = "backend=fsdp, which shards every model"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    out = tmp_path_factory.mktemp("ranks")
    ended = torchrun(2, str(ROOT / "tests" / "tensor_parallel_program.py"), str(out))
    assert ended.code == 0, ended.err[-3000:]
    return [json.loads(Path(out / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("model", ["tiny_falcon", "tiny_llama"])
def test_the_cut_model_gives_the_tokens_of_the_whole(ranks: list[dict[str, Any]], model: str) -> None:
    for rank in ranks:
        assert rank[model]["cut"]["tokens"] == ranks[0][model]["whole"]["tokens"]


@pytest.mark.parametrize("model", ["tiny_falcon", "tiny_llama"])
def test_each_rank_holds_half_of_every_matrix_and_of_the_cache(ranks: list[dict[str, Any]], model: str) -> None:
    for rank in ranks:
        whole, cut = rank[model]["whole"], rank[model]["cut"]
        matrices = whole["parameter_bytes"] - whole["vector_bytes"]
        assert cut["parameter_bytes"] == matrices // 2 + whole["vector_bytes"]
        assert cut["cache_bytes"] == whole["cache_bytes"] // 2
        assert cut["tied"] == whole["tied"] == (model == "tiny_falcon")


@pytest.mark.parametrize(
    ("config", "size", "fact", "hint"),
    [
        (LLAMA, 4, "6 attention heads cannot be divided by 4 ranks.", "fewer devices, or backend=fsdp"),
        (LLAMA, 6, "2 key and value heads cannot be divided by 6 ranks.", "fewer devices, or backend=fsdp"),
        (
            {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 8}, 8,
            "252 columns of mlp.gate_proj cannot be divided by 8 ranks.", "fewer devices",
        ),
        ({"model_type": "gpt2"}, 2, "There is no tensor-parallel plan for model_type 'gpt2'.", ELSEWHERE),
        (
            {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}, 2,
            "There is no tensor-parallel plan for an older Falcon (multi-query, or with ALiBi).", ELSEWHERE,
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(config: dict[str, Any], size: int, fact: str, hint: str) -> None:
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        with pytest.raises(PlanError) as caught:
            tensor_parallel_model(build_meta(config, torch.float32), init_device_mesh("cpu", (size,)))
    finally:
        dist.destroy_process_group()
    assert (caught.value.fact, caught.value.hint) == (fact, hint)


def test_one_rank_has_the_plain_model() -> None:
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        model = build_meta(LLAMA, torch.float32)
        assert tensor_parallel_model(model, init_device_mesh("cpu", (1,))) is model
        assert {type(parameter) for parameter in model.parameters()} == {torch.nn.Parameter}
    finally:
        dist.destroy_process_group()
