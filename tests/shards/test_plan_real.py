"""Compares the plan with real models: as built by transformers, and as sharded by FSDP2, AutoTP and this project."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import yaml
from running import ROOT

from shards.engines.deepspeed import DeepSpeedPlanner
from shards.engines.fsdp import FsdpPlanner
from shards.engines.tensor_parallel import TensorParallelPlanner
from shards.model.known_shape import known_shape
from shards.plan.cuts import cut_up
from shards.plan.memory import make_layout
from shards.plan.request import PlanRequest

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
TINY = {"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 6, "vocab_size": 130}
FALCON = {"model_type": "falcon", **TINY}
LLAMA = {"model_type": "llama", "intermediate_size": 200, **TINY}
CONFIGS: list[dict[str, Any]] = [
    FALCON,
    {**FALCON, "bias": True, "alibi": True, "tie_word_embeddings": False},
    {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "ffn_hidden_size": 100},
    {**FALCON, "parallel_attn": False, "num_ln_in_parallel_attn": 2},
    {**FALCON, "num_ln_in_parallel_attn": 2},
    {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1, "bias": True},
    {**FALCON, "new_decoder_architecture": True, "num_kv_heads": None},
    LLAMA,
    {**LLAMA, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {**LLAMA, "head_dim": 32},
    {"model_type": "llama", "num_hidden_layers": 1},
    {**LLAMA, "model_type": "mistral", "num_key_value_heads": 3},
    {"model_type": "mistral", "num_hidden_layers": 1},
    {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2},
    {**LLAMA, "model_type": "qwen2", "num_key_value_heads": None},
    {"model_type": "qwen2", "num_hidden_layers": 1},
    {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 24, "attention_bias": True},
    {"model_type": "qwen3", "num_hidden_layers": 1, "tie_word_embeddings": True},
]


def real(asked: object) -> Any:
    """The output of `real_models.py` for `asked`; a separate process, since its process groups end with it."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = ["timeout", "-k", "5", "240", sys.executable, str(ROOT / "tests/programs/real_models.py")]
    done = subprocess.run(command, input=json.dumps(asked), text=True, capture_output=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def preset(name: str, **changes: int) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())["config"]
    return config | changes


FEW_LAYERS = {"num_hidden_layers": 2}  # for all but one size of each model: all layers are alike
SIZES = (2, 4, 8, 64, 512)
SHARDED: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "falcon_40b": (preset("falcon_40b"), (2,)),
    "llama_30b": (preset("llama_30b"), (512,)),
    "falcon_40b of few layers": (preset("falcon_40b", **FEW_LAYERS), SIZES),
    "llama_30b of few layers": (preset("llama_30b", **FEW_LAYERS), SIZES),
    "small_falcon": (CONFIGS[5], SIZES),
    "small_llama": (CONFIGS[9], SIZES),
}


CUT = [(preset("falcon_40b"), 2), (preset("llama_30b"), 2), (preset("llama_30b", **FEW_LAYERS), 4)]
CUT += [(preset("falcon_40b", **FEW_LAYERS), size) for size in (4, 8)]
CUT += [
    ({**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "vocab_size": 131}, 2),
    ({**LLAMA, "num_key_value_heads": 3, "attention_bias": True, "intermediate_size": 201, "vocab_size": 130}, 3),
    ({**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True}, 2),
    ({**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 24}, 2),
]

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 256, "vocab_size": 1001}
KEYS = {"num_key_value_heads": 4, "mlp_bias": True, **HEADS}
QWEN = {"model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True, "intermediate_size": 704, **KEYS}
CUT_BY_DEEPSPEED = [
    ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 4, "bias": True, **HEADS}, 2),
    ({"model_type": "llama", "intermediate_size": 720, **KEYS}, 4),
    (QWEN, 2),
    (preset("falcon_40b"), 2),
    (preset("llama_30b", **FEW_LAYERS), 4),
]
CUT_BY_DEEPSPEED += [(preset("falcon_40b", **FEW_LAYERS), size) for size in (4, 8)]


@pytest.fixture(scope="module")
def found() -> Any:
    """The results of transformers, FSDP2, our own tensor parallelism and AutoTP, all from one process."""
    split = CUT_BY_DEEPSPEED if importlib.util.find_spec("deepspeed") else []
    return real({"parameters": CONFIGS, "fsdp": SHARDED, "tensor_parallel": CUT, "deepspeed": split})


def test_parameters_are_those_of_transformers_by_name_shape_and_order(found: Any) -> None:
    planned = [
        [(parameter.name, list(parameter.shape)) for parameter in known_shape(config).parameters] for config in CONFIGS
    ]
    assert planned == [list(named.items()) for named in found["parameters"]]


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp_bytes_are_those_that_fsdp2_leaves_on_a_rank(found: Any, name: str) -> None:
    planned = {}
    for size, by_rank in found["fsdp"][name].items():
        shape = known_shape(SHARDED[name][0])
        layout = make_layout(PlanRequest(shape=shape, engine=FsdpPlanner(), devices=int(size)))
        planned[size] = {rank: layout.parameter_bytes[int(rank)] for rank in by_rank}
    assert planned == found["fsdp"][name]


def test_rows_that_do_not_divide_leave_the_last_ranks_with_less_or_nothing(found: Any) -> None:
    assert found["fsdp"]["llama_30b"]["512"]["511"] < found["fsdp"]["llama_30b"]["512"]["0"]
    assert found["fsdp"]["small_falcon"]["512"]["511"] == 0


def test_tensor_parallel_numbers_are_those_that_the_cut_leaves_on_a_rank(found: Any) -> None:
    planned = [list(cut_up(known_shape(config), TensorParallelPlanner().pieces, size)) for config, size in CUT]
    assert planned == found["tensor_parallel"]


def test_deepspeed_numbers_are_those_that_autotp_leaves_on_a_rank(found: Any) -> None:
    if "deepspeed" not in found:
        pytest.skip("deepspeed is not installed")
    cases = CUT_BY_DEEPSPEED
    planned = [list(cut_up(known_shape(config), DeepSpeedPlanner().pieces, size)) for config, size in cases]
    assert planned == found["deepspeed"]
