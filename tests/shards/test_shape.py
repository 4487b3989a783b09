"""Model shapes from the presets and from invalid configs. For the models of transformers see test_plan_real.py."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from running import ROOT

from shards.errors import PlanError
from shards.model.any_shape import shape_from_tensors
from shards.model.config_fields import check_config
from shards.model.known_shape import known_shape
from shards.model.shape import ModelShape, Parameter, layer_of

PRESETS = ROOT / "conf" / "model"


def preset(name: str) -> ModelShape:
    return known_shape(yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["config"])


@pytest.mark.parametrize(
    ("name", "parameters", "kv_heads_bytes", "expanded_bytes"),
    [
        ("falcon_7b", 6_921_720_704, 8_192, 8_192),
        ("falcon_40b", 41_303_293_952, 122_880, 1_966_080),
        ("falcon_180b", 178_557_088_768, 163_840, 4_751_360),
        ("llama_7b", 6_738_415_616, 524_288, 524_288),
        ("llama_13b", 13_015_864_320, 819_200, 819_200),
        ("llama_30b", 32_528_943_616, 1_597_440, 1_597_440),
        ("llama_65b", 65_285_660_672, 2_621_440, 2_621_440),
        ("llama2_7b", 6_738_415_616, 524_288, 524_288),
        ("llama2_13b", 13_015_864_320, 819_200, 819_200),
        ("llama2_70b", 68_976_648_192, 327_680, 327_680),
    ],
)
def test_presets(name: str, parameters: int, kv_heads_bytes: int, expanded_bytes: int) -> None:
    shape = preset(name)
    cache = (2 * shape.kv_values_per_token(), 2 * shape.kv_values_per_token(kv_heads_only=False))
    assert (shape.num_parameters, *cache) == (parameters, kv_heads_bytes, expanded_bytes)


def test_every_preset_spells_out_every_field() -> None:
    fields = ["name", "path", "revision", "weights", "trust_remote_code", "config"]
    found = {path.stem: yaml.safe_load(path.read_text()) for path in PRESETS.glob("*.yaml")}
    assert {name: (values["name"], list(values)) for name, values in found.items()} == {
        name: (name, fields) for name in found
    }


def test_a_step_reads_the_head_but_not_a_table_of_its_own() -> None:
    falcon, llama = preset("falcon_40b"), preset("llama_30b")
    assert falcon.step_parameters == falcon.num_parameters
    assert llama.step_parameters == llama.num_parameters - 32_000 * 6_656


def test_groups_are_the_layers_and_the_rest() -> None:
    groups = preset("falcon_40b").groups()
    assert set(groups) == {None, *range(60)}
    assert [parameter.name for parameter in groups[None]] == [
        "transformer.word_embeddings.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    ]
    assert groups[59] == (
        Parameter("transformer.h.59.self_attention.query_key_value.weight", (9216, 8192), "query_key_value"),
        Parameter("transformer.h.59.self_attention.dense.weight", (8192, 8192), "row"),
        Parameter("transformer.h.59.mlp.dense_h_to_4h.weight", (32768, 8192), "column"),
        Parameter("transformer.h.59.mlp.dense_4h_to_h.weight", (8192, 32768), "row"),
        Parameter("transformer.h.59.ln_attn.weight", (8192,)),
        Parameter("transformer.h.59.ln_attn.bias", (8192,)),
        Parameter("transformer.h.59.ln_mlp.weight", (8192,)),
        Parameter("transformer.h.59.ln_mlp.bias", (8192,)),
    )


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.h.7.mlp.dense_h_to_4h.weight", 7),
        ("model.layers.12.self_attn.q_proj.weight", 12),
        ("h.3.ln_1.weight", 3),
        ("transformer.word_embeddings.weight", None),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_layer_of(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_a_shape_from_tensors_takes_names_and_shapes_as_they_are_and_drops_a_tied_head() -> None:
    config = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 64, "vocab_size": 10}
    tensors = {"wte.weight": [10, 8], "h.0.mlp.c_fc.weight": [8, 32], "h.0.ln_1.weight": [8], "lm_head.weight": [10, 8]}
    shape = shape_from_tensors(config, tensors)
    assert shape.parameters == (
        Parameter("wte.weight", (10, 8), "embedding"),
        Parameter("h.0.mlp.c_fc.weight", (8, 32), "column"),
        Parameter("h.0.ln_1.weight", (8,)),
    )
    assert (shape.num_layers, shape.head_dim, shape.intermediate_size, shape.max_position_embeddings) == (1, 4, 32, 64)


GIVES = "The model's config gives "
SLIDING = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "mamba"},
            "The shapes of model_type 'mamba' are not known from its config alone. HINT: have its ",
        ),
        ({}, "The shapes of model_type 'None' are not known from its config alone. HINT: have its "),
        (
            {"model_type": "llama", "hidden_size": 0},
            GIVES + "hidden_size=0, not a whole number",
        ),
        ({"model_type": "llama", "vocab_size": "x"}, GIVES + "vocab_size='x', not a whole number"),
        (
            {"model_type": "llama", "vocab_size": True},
            GIVES + "vocab_size=True, not a whole number",
        ),
        ({"model_type": "llama", "vocab_size": 10**40}, GIVES + f"vocab_size={10**40}, not a"),
        (
            {"model_type": "llama", "num_hidden_layers": 1001},
            GIVES + "num_hidden_layers=1001, not a",
        ),
        (
            {"model_type": "llama", "max_position_embeddings": -1},
            GIVES + "max_position_embeddings=-1, ",
        ),
        ({"model_type": "mistral", "sliding_window": "abc"}, GIVES + "sliding_window='abc', not a whole number"),
        (
            {**SLIDING, "max_window_layers": None},
            GIVES + "max_window_layers=None, not a whole number",
        ),
        (
            {**SLIDING, "max_window_layers": "x"},
            GIVES + "max_window_layers='x', not a whole number",
        ),
        ({**SLIDING, "layer_types": 5}, GIVES + "layer_types=5, not a list of texts"),
        ({**SLIDING, "layer_types": [[]]}, GIVES + "layer_types=[[]], not a list of texts"),
        ({**SLIDING, "layer_types": ["x"]}, GIVES + "layer_types=['x'], not a type for each of 32"),
        ({"model_type": "falcon", "hidden_size": 100}, "hidden_size 100 cannot be divided into 71 attention heads."),
    ],
)
def test_wrong_configs_are_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        known_shape(config)
    assert str(caught.value).startswith(message)
    assert " HINT: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": []}, GIVES + "model_type=[], not a text. HINT: "),
        ({"n_layer": 10**9}, GIVES + "n_layer=1000000000, not a whole number from 1 to "),
        (
            {"text_config": {"num_hidden_layers": 1001}},
            "The model's config.text_config gives num_hidden_layers=1001, not a whole",
        ),
        ({"num_local_experts": 10**6}, GIVES + "num_local_experts=1000000, not a whole number from 1 to "),
    ],
)
def test_what_would_take_transformers_for_ever_is_refused_for_every_family(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        check_config(config)
    assert str(caught.value).startswith(message)
