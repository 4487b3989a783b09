"""Quantized weights in a plan: the bytes of real layers, what fits in memory, and which engines support them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from planners import PLANNERS
from running import ROOT, environment
from test_plan import FALCON_7B, FALCON_40B, LLAMA2_70B, changed, preset, request

from launcher.plan import main
from shards.errors import PlanError
from shards.model.quantization import QUANTIZATIONS, Quantization, Storage
from shards.model.quantized_checkpoint import from_config
from shards.model.shape import ModelShape, Parameter
from shards.plan.ceilings import ceilings
from shards.plan.cuts import cut_up, whole_bytes
from shards.plan.memory import load_peaks, make_layout
from shards.plan.plan import Plan, make_plan


def compressed(weights: dict[str, Any], activations: dict[str, Any] | None = None, **other: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {"0": group}, **other}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "modules_to_not_convert": ["lm_head"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
TOKENS = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "symmetric": True, "strategy": "tensor", "dynamic": False}
W4A16 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
W8A8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
W8_TENSOR = {**W8A8, "strategy": "tensor"}
FP8_CHANNEL = {**W8A8, "type": "float"}
FP8_TENSOR = {**W8_TENSOR, "type": "float"}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "gptq_int4_g128": {**GPTQ, "modules_in_block_to_quantize": [["self_attn.qkv_proj"], ["mlp"]]},
    "awq_int4_g64": AWQ,
    "fp8": FP8,
    "fp8 static": {**FP8, "activation_scheme": "static"},
    "int4_g128": compressed(W4A16, format="pack-quantized"),
    "int4_g128 asymmetric": compressed({**W4A16, "symmetric": False}, format="pack-quantized"),
    "int4": compressed({**W4A16, "strategy": "channel", "group_size": None}, format="pack-quantized"),
    "int8_channel": compressed(W8A8, {**TOKENS, "type": "int"}, format="int-quantized"),
    "int8_tensor static": compressed(W8_TENSOR, {**STATIC, "type": "int"}, format="int-quantized"),
    "float8_channel": compressed(FP8_CHANNEL, {**TOKENS, "type": "float"}, format="float-quantized"),
    "float8_tensor static": compressed(FP8_TENSOR, {**STATIC, "type": "float"}, format="float-quantized"),
}


def quantization(fields: dict[str, Any]) -> Quantization:
    found = from_config({"quantization_config": fields})
    assert found is not None
    return found


AT = "model.layers.0."
WHOLE = Parameter(AT + "self_attn.qkv_proj.weight", (1024, 512), "query_key_value")
ROW = Parameter(AT + "mlp.down_proj.weight", (512, 1024), "row")
QUERIES, KEYS, VALUES = (
    Parameter(f"{AT}self_attn.{part}_proj.weight", (rows, 512), "column" if part == "q" else "key_value")
    for part, rows in (("q", 512), ("k", 256), ("v", 256))
)
GATE, UP = (Parameter(f"{AT}mlp.{part}_proj.weight", (768, 512), "column") for part in ("gate", "up"))
LAYERS: list[tuple[list[Any], list[tuple[Parameter, tuple[int, ...]]]]] = [
    (["query_key_value", 1024, 512, [512, 256, 256], 512], [(WHOLE, (1024, 512))]),
    (["query_key_value", 1024, 512, [256, 128, 128], 512], [(WHOLE, (512, 512))]),
    (["query_key_value", 1024, 512, [512, 256, 256], 512], [(p, p.shape) for p in (QUERIES, KEYS, VALUES)]),
    (["column", 1536, 512, [384, 384], 512], [(GATE, (384, 512)), (UP, (384, 512))]),
    (["row", 512, 1024, [512], 1024], [(ROW, (512, 1024))]),
    (["row", 512, 1024, [512], 256], [(ROW, (512, 256))]),
]
"""Linear layers of vLLM, on one of 1, 2 or 4 ranks, and the parameters of transformers that they replace."""


@pytest.mark.slow
def test_bytes_are_those_of_the_layers_that_vllm_makes() -> None:
    pytest.importorskip("vllm", exc_type=ImportError)
    asked = [(fields, [layer for layer, _ in LAYERS]) for fields in CHECKPOINTS.values()]
    command = ["timeout", "-k", "5", "120", sys.executable, str(ROOT / "tests/programs/quantized_layers.py")]
    environ = environment(OMP_NUM_THREADS="1", VLLM_LOGGING_LEVEL="ERROR")
    done = subprocess.run(
        command, input=json.dumps(asked), text=True, capture_output=True, env=environ, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(zip(CHECKPOINTS, json.loads(done.stdout.splitlines()[-1]), strict=True))
    planned = {
        name: [
            sum(quantization(fields).while_loading().nbytes(parameter, held, 2) for parameter, held in pieces)
            for _, pieces in LAYERS
        ]
        for name, fields in CHECKPOINTS.items()
    }
    assert planned == found


BITSANDBYTES = [
    ("nf4", (96, 96), 4608 + 576 + 64),
    ("nf4", (8, 4), 16 + 4 + 64),
    ("nf4", (300, 70), 10_500 + 1316 + 64),
    ("nf4_dq", (96, 96), 4608 + 144 + 4 + 64 + 4 + 1024),
    ("nf4_dq", (8, 4), 16 + 1 + 4 + 64 + 4 + 1024),
    ("nf4_dq", (300, 70), 10_500 + 329 + 8 + 64 + 4 + 1024),
    ("int8", (40, 96), 3840 + 160),
]
"""Bytes that bitsandbytes 0.50.2 held for these matrices."""


@pytest.mark.parametrize(("name", "shape", "expected"), BITSANDBYTES)
def test_bytes_are_those_of_bitsandbytes(name: str, shape: tuple[int, int], expected: int) -> None:
    assert QUANTIZATIONS[name].nbytes(Parameter("h.0.dense.weight", shape), shape, 2) == expected


def test_bitsandbytes_still_holds_these() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert [_held(bitsandbytes, name, *shape) for name, shape, _ in BITSANDBYTES] == [it[2] for it in BITSANDBYTES]


def _held(bitsandbytes: Any, name: str, outputs: int, inputs: int) -> int:
    if name == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
        weight = layer.to("cpu").weight
        return int(weight.nbytes + weight.SCB.nbytes)
    nested = name == "nf4_dq"
    layer = bitsandbytes.nn.Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compress_statistics=nested)
    weight = layer.to("cpu").weight
    state = weight.quant_state
    held = [weight, state.absmax, state.code]
    held += [state.offset, state.state2.absmax, state.state2.code] if nested else []
    return sum(tensor.nbytes for tensor in held)


MATRICES_OF_A_LAYER = ((9216, 8192), (8192, 8192), (32_768, 8192), (8192, 32_768))


@pytest.mark.parametrize(
    ("name", "values", "each_matrix", "each_output"),
    [("nf4", 0.5 + 4 / 64, 64, 0), ("int8", 1, 0, 4), ("fp8", 1, 4, 0), ("int4_g128", 0.5 + 2 / 128 + 0.5 / 128, 0, 0)],
)
def test_falcon_40b_in_closed_form(name: str, values: float, each_matrix: int, each_output: int) -> None:
    """The whole model: only linear layers of decoder layers are quantized, the rest is bf16. fp8 has two additional
    scales for fused qkv."""
    numbers = sum(rows * columns for rows, columns in MATRICES_OF_A_LAYER)
    outputs = sum(rows for rows, _ in MATRICES_OF_A_LAYER)
    layer = numbers * values + (6 if name == "fp8" else 4) * each_matrix + outputs * each_output
    rest = 2 * (41_303_293_952 - 60 * numbers)
    assert whole_bytes(FALCON_40B, Storage(2, QUANTIZATIONS[name])) == 60 * layer + rest


def test_tensor_parallel_ranks_hold_their_part_of_values_and_scales() -> None:
    storage = Storage(2, QUANTIZATIONS["int4_g128"])
    table, norms = 65_024 * 8192 * 2, 2 * (60 * 4 * 8192 + 2 * 8192)
    whole = whole_bytes(FALCON_40B, storage)
    cut = PLANNERS["vllm"].pieces
    assert cut_up(FALCON_40B, cut, 1, storage) == (whole,)
    assert cut_up(FALCON_40B, cut, 4, storage) == ((whole - table - norms) // 4 + table // 4 + norms,) * 4
    row_scales = 4 * (8192 + 8192) * 60  # if inputs are split, every rank has the scales of all outputs
    ranks = cut_up(FALCON_40B, cut, 2, Storage(2, QUANTIZATIONS["fp8_channel"]))
    assert 2 * ranks[0] - whole_bytes(FALCON_40B, Storage(2, QUANTIZATIONS["fp8_channel"])) == norms + row_scales


@pytest.mark.parametrize(
    ("shape", "name", "published"),
    [
        (FALCON_40B, "nf4", 26.55),  # litgpt tutorials/quantize.md, peak on one A100 of 40 GB
        (FALCON_40B, "nf4_dq", 24.63),
        (FALCON_7B, "nf4", 5.72),
        (FALCON_7B, "int8", 8.71),
        (FALCON_40B, "int8", 45),  # Hugging Face's announcement of Falcon
        (FALCON_40B, "nf4", 27),
    ],
)
def test_published_peaks_are_a_little_more_than_the_weights(shape: ModelShape, name: str, published: float) -> None:
    weights = whole_bytes(shape, Storage(2, QUANTIZATIONS[name])) / 1e9
    assert 0.75 * published < weights < published


def plan_of(shape: ModelShape, engine: str, devices: int, device: str, name: str) -> Plan:
    return make_plan(request(shape, engine, devices, device, quantization=QUANTIZATIONS.get(name)))


@pytest.mark.parametrize(
    ("shape", "engine", "name", "smallest"),
    [
        (FALCON_40B, "transformers", "none", {"a5000": 4, "a6000": 2, "a100_80g": 1}),
        (FALCON_40B, "transformers", "int8", {"a5000": 2, "a6000": 1, "a100_80g": 1}),
        (FALCON_40B, "transformers", "nf4", {"a5000": 1, "a6000": 1, "a100_80g": 1}),
        (FALCON_40B, "vllm", "none", {"a5000": 4, "a6000": 2, "a100_80g": 2}),
        (FALCON_40B, "vllm", "fp8", {"a5000": 4, "a6000": 1, "a100_80g": 1}),
        (FALCON_40B, "vllm", "int4_g128", {"a5000": 2, "a6000": 1, "a100_80g": 1}),
        (LLAMA2_70B, "vllm", "int4_g128", {"a5000": 2, "a6000": 1, "a100_80g": 1}),
    ],
)
def test_how_many_cards_are_needed(shape: ModelShape, engine: str, name: str, smallest: dict[str, int]) -> None:
    assert {card: plan_of(shape, engine, 8, card, name).smallest_devices for card in smallest} == smallest


def test_a_step_reads_the_quantized_bytes() -> None:
    plain, packed = (plan_of(FALCON_40B, "vllm", 1, "h200", name) for name in ("none", "int4_g128"))
    assert packed.step_bytes == packed.devices[0].parameter_bytes
    assert plain.limit is not None
    assert packed.limit is not None
    assert packed.limit.seconds / plain.limit.seconds == pytest.approx(packed.step_bytes / plain.step_bytes, rel=0.01)
    whole = whole_bytes(LLAMA2_70B, Storage(2, QUANTIZATIONS["nf4"]))
    assert plan_of(LLAMA2_70B, "transformers", 1, "a100_80g", "nf4").step_bytes == whole - 2 * 32_000 * 8192


def test_products_in_eight_bits_are_allowed_twice_the_rate() -> None:
    asked = request(FALCON_40B, "vllm", 1, "h200")
    plain, packed, eight = (
        ceilings(it, make_layout(it))[1]
        for it in (replace(asked, quantization=QUANTIZATIONS.get(name)) for name in ("none", "int4_g128", "fp8"))
    )
    assert plain is not None
    assert packed is not None
    assert eight is not None
    assert (packed.seconds, eight.seconds) == (plain.seconds, plain.seconds / 2)


def test_what_is_there_for_a_while() -> None:
    """Temporary memory: bitsandbytes dequantizes the largest matrix for a prompt; a symmetric GPTQ has zero points
    until it is loaded."""
    card = plan_of(FALCON_40B, "transformers", 1, "a6000", "nf4").devices[0]
    assert card.buffer_bytes == 2 * 32_768 * 8192
    asked = request(FALCON_40B, "vllm", 1, quantization=quantization({**GPTQ, "group_size": 128}))
    layout = make_layout(asked)
    zeros = 60 * sum(rows * columns for rows, columns in MATRICES_OF_A_LAYER) // 128 // 2
    overhead = load_peaks(replace(asked, quantization=None), layout)[1] - layout.parameter_bytes[0]
    assert load_peaks(asked, layout)[1] == layout.parameter_bytes[0] + zeros + overhead


LLAMA2_7B = preset("llama2_7b")


@pytest.mark.parametrize(
    ("shape", "engine", "devices", "name", "message"),
    [
        (
            *(FALCON_40B, "fsdp", 2, "fp8"),
            "fsdp cannot run fp8 weights: FSDP2 cuts by rows, and their scales have to go with them. "
            "HINT: backend=vllm",
        ),
        (
            *(FALCON_40B, "deepspeed", 1, "nf4"),
            "deepspeed cannot run nf4 weights: AutoTP cuts plain weights only. HINT: "
            "backend=fsdp, or backend=tensor_parallel, or backend=transformers",
        ),
        (
            *(FALCON_40B, "vllm", 1, "int8"),
            "vllm cannot run int8 weights: vLLM no longer has bitsandbytes, nor GPTQ that is asymmetric or has "
            "desc_act over groups. "
            "HINT: backend=fsdp, or backend=tensor_parallel, or backend=transformers",
        ),
        (
            *(LLAMA2_70B, "transformers", 1, "fp8"),
            "transformers cannot run fp8 weights: a transformers model is planned with the quantizations of "
            "its layers only. HINT: backend=vllm devices=2",
        ),
        (
            *(LLAMA2_7B, "vllm", 4, "int4_g128"),
            "2752 inputs on each device cannot be divided by the 128 that int4_g128 keeps together, as vllm needs. "
            "HINT: devices=2",
        ),
        (
            *(LLAMA2_7B, "vllm", 4, "fp8_block"),
            "2752 outputs on each device cannot be divided by the 128 that fp8_block keeps together, as vllm needs. "
            "HINT: devices=2",
        ),
        (
            *(FALCON_7B, "vllm", 1, "int4_g128"),
            "4544 inputs on each device cannot be divided by the 128 that int4_g128 keeps together, as vllm needs. "
            "HINT: plain weights, or weights in fp8",
        ),
        (
            *(FALCON_40B, "vllm", 1, "fp8_channel"),
            "41.3 billion parameters in fp8_channel with vllm need 41.8 GiB on one device (weights 39.0, batch 1 of "
            "640 tokens), A100 40 GB has 39.4 GiB, of which vllm may use 36.2. HINT: devices=2",
        ),
    ],
)
def test_what_cannot_be_is_one_line_with_hints_that_hold(
    shape: ModelShape, engine: str, devices: int, name: str, message: str
) -> None:
    asked = request(shape, engine, devices, "a100_40g" if name == "fp8_channel" else "a6000")
    asked = replace(asked, quantization=QUANTIZATIONS[name])
    with pytest.raises(PlanError) as caught:
        make_plan(asked)
    assert str(caught.value) == message
    hint = re.sub(r"weights in (\w+)", r"quantization=\1", caught.value.hint)
    hints = re.findall(r"([\w.]+)=(\w+)", hint)
    for key, value in hints:
        is_scheme = key == "quantization"
        asked = replace(asked, quantization=QUANTIZATIONS[value]) if is_scheme else changed(asked, key, value)
    if hints:
        make_plan(asked)


def test_the_command_shows_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["model=falcon_40b", "device=a6000", "backend=transformers", "quantization=none,nf4", "--markdown"]) == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert out[2].startswith("| machine | backend | quantization | weights |")
    assert [line.split(" | ")[:4] for line in out[4:6]] == [
        ["| 1xa6000", "transformers", "none", "-"],
        ["| 1xa6000", "**transformers**", "nf4", "22.35 GiB"],
    ]
    assert out[9].startswith("- 1xa6000 transformers none: 41.3 billion parameters with transformers need 77.6 GiB")


def test_the_command_names_the_quantizations_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=falcon_7b", "quantization=int3"]) == 2
    known = ", ".join(QUANTIZATIONS)
    assert capsys.readouterr().err == f"error: quantization=int3 is not one of none, {known}. HINT: quantization=int8\n"
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    assert set(QUANTIZATIONS) <= set(re.findall(r"\w+", capsys.readouterr().out))
