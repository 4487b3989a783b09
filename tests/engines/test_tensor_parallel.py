"""Two tensor-parallel ranks give the answers of the whole model, and hold half of it each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ranks_of
from tensor_parallel_program import MODELS

from shards.engines.tensor_parallel import CUT_FAMILIES
from shards.errors import PlanError
from shards.load.meta import build_meta
from shards.parallel.collectives import Collectives
from shards.parallel.tensor_parallel import ELSEWHERE, LAYER_PLANS, tensor_parallel_model

pytestmark = pytest.mark.slow  # the shared fixtures take seconds

LLAMA = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 96, "intermediate_size": 252, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
NONE = Collectives("none", print, print)
FALCON = {"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each of two ranks."""
    out = tmp_path_factory.mktemp("ranks")
    ended = ranks_of("tensor_parallel_program.py", 2, str(out))
    assert ended.code == 0, ended.err[-3000:]
    return [json.loads(Path(out / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("model", MODELS)
def test_the_cut_model_gives_the_tokens_of_the_whole(ranks: list[dict[str, Any]], model: str) -> None:
    whole = ranks[0][model]["whole"]
    assert len({tuple(row) for row in whole["tokens"]}) > 1, "prompts must be answered differently to be compared"
    for rank in ranks:
        assert rank[model]["cut"]["tokens"] == whole["tokens"]
        assert rank[model]["cut"]["gaps"] == pytest.approx(whole["gaps"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("model", ["tiny_falcon", "tiny_llama"])
def test_each_rank_holds_half_of_every_matrix_and_of_the_cache(ranks: list[dict[str, Any]], model: str) -> None:
    for rank in ranks:
        whole, cut = rank[model]["whole"], rank[model]["cut"]
        matrices = whole["parameter_bytes"] - whole["vector_bytes"]
        assert cut["parameter_bytes"] == matrices // 2 + whole["vector_bytes"]
        assert cut["cache_bytes"] == whole["cache_bytes"] // 2
        assert cut["tied"] == whole["tied"] == (model == "tiny_falcon")


@pytest.mark.parametrize(
    ("config", "size", "fact"),
    [
        (LLAMA, 4, "6 attention heads cannot be divided by 4 devices, as tensor_parallel needs."),
        (LLAMA, 6, "2 key and value heads cannot be divided by 6 devices, as tensor_parallel needs."),
        (
            {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 8}, 8,
            "252 inner MLP columns cannot be divided by 8 devices, as tensor_parallel needs.",
        ),
        (
            {**LLAMA, "vocab_size": 9, "num_attention_heads": 4, "num_key_value_heads": 4}, 4,
            "9 rows of the vocabulary leave one of 4 devices without any.",
        ),
        ({"model_type": "gpt2"}, 2, "There is no tensor-parallel cut for model_type 'gpt2'."),
        (FALCON, 2, "tensor_parallel cuts no older Falcon (multi-query, or with ALiBi)."),
        (
            {**FALCON, "new_decoder_architecture": True, "alibi": True}, 2,
            "tensor_parallel cuts no older Falcon (multi-query, or with ALiBi).",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(config: dict[str, Any], size: int, fact: str) -> None:
    with pytest.raises(PlanError) as caught:
        tensor_parallel_model(build_meta(config, torch.float32), 0, size, NONE)
    assert (caught.value.fact, caught.value.hint) == (fact, ELSEWHERE)


def test_one_rank_has_the_plain_model() -> None:
    model = build_meta(LLAMA, torch.float32)
    kinds = [type(module) for module in model.modules()]
    assert tensor_parallel_model(model, 0, 1, NONE) is model
    assert [type(module) for module in model.modules()] == kinds


def test_the_plan_knows_the_families_that_are_cut() -> None:
    assert tuple(LAYER_PLANS) == CUT_FAMILIES
