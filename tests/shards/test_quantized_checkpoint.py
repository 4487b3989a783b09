"""The configs of quantized checkpoints, and plans of runs with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, launcher
from test_quantization import AT, AWQ, CHECKPOINTS, FP8, GPTQ, TOKENS, W4A16, W8A8, compressed, quantization

from launcher.__main__ import main as launch
from launcher.composition.compose import compose_run
from launcher.plan import main
from launcher.prepare.planning import quantization_of
from launcher.prepare.shapes import shape_of_files
from shards.checkpoint.tensor_files import TensorEntry
from shards.errors import PlanError
from shards.model.quantization import QUANTIZATIONS, Quantization, Storage
from shards.model.quantized_checkpoint import from_config, unpacked
from shards.model.shape import Parameter


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_called_by_how_it_is_stored(name: str) -> None:
    found = quantization(CHECKPOINTS[name])
    assert (found.name, found.fused) == (name.removesuffix(" static").removesuffix(" asymmetric"), True)


def chosen(fields: dict[str, Any], *names: str) -> list[str]:
    """The names of those matrices that are quantized."""
    found = quantization(fields)
    return [name for name in names if found.applies(Parameter(f"{name}.weight", (64, 64), _cut(name)))]


def _cut(name: str) -> Any:
    return "head" if name == "lm_head" else "column"


NAMES = (AT + "self_attn.o_proj", AT + "mlp.up_proj", "model.layers.10.mlp.up_proj", "model.embed_tokens", "lm_head")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (GPTQ, NAMES[:3]),
        ({**GPTQ, "lm_head": True}, (*NAMES[:3], "lm_head")),
        ({**GPTQ, "modules_in_block_to_quantize": [["self_attn.o_proj"], ["x"]]}, NAMES[:1]),
        ({**GPTQ, "dynamic": {r"-:.*\.mlp\..*": {}}}, NAMES[:1]),
        ({**AWQ, "modules_to_not_convert": ["up_proj"]}, NAMES[:1]),
        ({**FP8, "ignored_layers": ["model.layers.0.mlp.up_proj", "layers.10"]}, (NAMES[0], NAMES[2])),
        ({**FP8, "modules_to_not_convert": [NAMES[0]]}, NAMES[1:3]),
        (compressed(W4A16, ignore=["re:.*up_proj", "lm_head"]), NAMES[:1]),
        (compressed(W4A16, ignore=["up_proj"]), NAMES[:3]),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, NAMES[:3]),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["o_proj", "model.layers.1"]}, NAMES[1:2]),
    ],
)
def test_modules_that_are_left_out(fields: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert chosen(fields, *NAMES) == list(expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, QUANTIZATIONS["nf4"]),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            QUANTIZATIONS["nf4_dq"],
        ),
        ({"_load_in_4bit": True, "quant_method": "bitsandbytes"}, replace(QUANTIZATIONS["nf4"], name="fp4")),
        ({"load_in_8bit": True}, QUANTIZATIONS["int8"]),
        (FP8, QUANTIZATIONS["fp8"]),
        ({**FP8, "weight_block_size": [128, 128]}, replace(QUANTIZATIONS["fp8_block"], name="fp8_128x128")),
        (None, None),
    ],
)
def test_what_a_config_says(fields: dict[str, Any] | None, expected: Quantization | None) -> None:
    given = dict(fields or {})
    if "quant_method" not in given and given:
        given["quant_method"] = "bitsandbytes"
    assert from_config({"quantization_config": given or None}) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"quant_method": "aqlm"},
            "The bytes of a checkpoint quantized by aqlm are not known. HINT: a checkpoint of gptq, awq, fp8, "
            "bitsandbytes, compressed-tensors, or an unquantized one",
        ),
        ({"bits": 4}, "The bytes of a checkpoint quantized by an unnamed method are not known. HINT: "),
        ({**GPTQ, "bits": 3}, "GPTQ of 4 and of 8 bits is read here, and this has 3. HINT: "),
        (
            {**GPTQ, "dynamic": {"+:.*mlp": {"bits": 8}}},
            "The GPTQ rule '+:.*mlp' for single modules cannot be planned.",
        ),
        ({**AWQ, "bits": 8}, "vLLM reads AWQ of 4 bits, not of 8. HINT: "),
        (
            {**AWQ, "bits": "four"},
            "The model's config.quantization_config gives bits='four', not a whole ",
        ),
        ({**compressed(W4A16), "config_groups": {}}, "Only compressed-tensors with one group, of all linear layers, "),
        (compressed({**W4A16, "type": "float"}), "Compressed-tensors of group-wise float4 cannot be planned. HINT: "),
        (
            compressed(W4A16, {**TOKENS, "type": "int"}),
            "Compressed-tensors of group-wise int4 with quantized activations cannot be planned. HINT: ",
        ),
        (
            compressed(W8A8, TOKENS, sparsity_config={"format": "sparse-24-bitmask"}),
            "Compressed-tensors of channel-wise int8 with quantized activations, sparse, cannot be planned. HINT: ",
        ),
    ],
)
def test_methods_that_are_not_known_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        quantization(fields)
    assert str(caught.value).startswith(message)


def group(**changes: Any) -> dict[str, Any]:
    return compressed({**W4A16, **changes})


MALFORMED: list[Any] = [
    5, [1], "x", {"quant_method": []}, {**GPTQ, "dynamic": [1]}, {**GPTQ, "dynamic": {"-:(": {}}},
    {**GPTQ, "bits": True}, {**GPTQ, "group_size": -7}, {**GPTQ, "modules_in_block_to_quantize": 5},
    {**GPTQ, "dynamic": {"-:(a+)+$": {}}},
    {**GPTQ, "modules_in_block_to_quantize": [[["x"]]]}, {**AWQ, "modules_to_not_convert": 5},
    {**AWQ, "group_size": {}}, {**FP8, "weight_block_size": 5}, {**FP8, "weight_block_size": [0, 0]},
    {**FP8, "weight_block_size": ["a", None]},
    {**FP8, "weight_block_size": [128]}, {**FP8, "ignored_layers": 5}, {**FP8, "ignored_layers": [1, None]},
    {"load_in_8bit": True, "llm_int8_skip_modules": ["["]}, {"load_in_8bit": True, "llm_int8_skip_modules": "x"},
    {**compressed(W4A16), "config_groups": [1]}, {**compressed(W4A16), "config_groups": {"group_0": None}},
    {**compressed(W4A16), "config_groups": {"group_0": 5}}, group(num_bits=0), group(num_bits=None), group(num_bits=3),
    group(strategy=[]), group(strategy="block", block_structure="128x128"), group(group_size=0), group(type={}),
    compressed(5), compressed(W4A16, 5), compressed(W4A16, sparsity_config=5), compressed(W4A16, ignore=["re:*"]),
    compressed(W4A16, ignore=5), compressed(W4A16, ignore=["re:.*.*.*.*.*.*x"]),
]  # fmt: skip


@pytest.mark.parametrize("given", MALFORMED, ids=str)
def test_a_malformed_quantization_is_one_line(given: Any) -> None:
    with pytest.raises(PlanError) as caught:
        from_config({"quantization_config": given})
    assert " HINT: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shapes_of_a_family_that_only_a_checkpoint_tells() -> None:
    """Packed tensors count as the matrices that they encode; their scales and zero points do not count."""
    plain = {"model.layers.0.mlp.fc1.weight": (256, 128), "model.layers.0.mlp.fc1.bias": (256,), "norm.weight": (128,)}
    rest = {name: shape for name, shape in plain.items() if "fc1.weight" not in name}
    at = "model.layers.0.mlp.fc1"
    gptq = {f"{at}.qweight": (16, 256), f"{at}.qzeros": (1, 32), f"{at}.scales": (1, 256), f"{at}.g_idx": (128,)}
    awq = {f"{at}.qweight": (128, 32), f"{at}.qzeros": (2, 32), f"{at}.scales": (2, 256)}
    words = {f"{at}.weight_packed": (256, 16), f"{at}.weight_scale": (256, 1), f"{at}.weight_shape": (2,)}
    assert unpacked({**gptq, **rest}, quantization(GPTQ)) == plain
    assert unpacked({**awq, **rest}, quantization(AWQ)) == plain
    assert unpacked({**words, **rest}, quantization(compressed(W4A16))) == plain
    bytes_4 = {f"{at}.weight": (256 * 128 // 2, 1), f"{at}.weight.absmax": (512,), f"{at}.weight.quant_map": (16,)}
    bnb = unpacked({**bytes_4, **rest}, QUANTIZATIONS["nf4"])
    storage = Storage(2, QUANTIZATIONS["nf4"])
    sizes = (storage.nbytes(Parameter(f"{at}.weight", shape)) for shape in (bnb.pop(f"{at}.weight"), (256, 128)))
    assert (bnb, len(set(sizes))) == (rest, 1)
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 8}
    entries = {name: TensorEntry(name, Path("model.safetensors"), "I32", shape, 0, 0) for name, shape in gptq.items()}
    shape = shape_of_files({"model_type": "phi", "quantization_config": GPTQ, **sizes}, entries)
    assert shape.parameters == (Parameter(f"{at}.weight", (256, 128), "column"),)


@pytest.mark.parametrize(
    ("overrides", "fields", "expected"),
    [
        ("backend=vllm precision=bf16", GPTQ, "gptq_int4_g128"),
        ("backend=vllm precision=fp32", compressed(W4A16), "int4_g128"),
        ("backend=vllm precision=bf16 +backend.extra.quantization=fp8_per_block", None, "fp8_block"),
        ("backend=fsdp model.weights=random", GPTQ, None),
        ("backend=dummy", {"quant_method": "aqlm"}, None),
        ("backend=fsdp", None, None),
    ],
)
def test_a_run_is_planned_with_the_quantization_of_its_model(
    overrides: str, fields: dict[str, Any] | None, expected: str | None
) -> None:
    config = compose_run(["model=tiny_llama", *overrides.split()])
    found = quantization_of(config, {"quantization_config": fields}, on_cuda=True)
    assert (found and found.name) == expected


@pytest.mark.parametrize(
    ("overrides", "fields", "message"),
    [
        (
            "backend=deepspeed",
            GPTQ,
            "The checkpoint is quantized (gptq_int4_g128), and backend=deepspeed loads plain weights only. "
            "HINT: use the unquantized checkpoint, or backend=fsdp, or backend=tensor_parallel, or backend=vllm",
        ),
        (
            "backend=vllm precision=bf16",
            {**GPTQ, "desc_act": True},
            "The checkpoint is quantized (gptq_int4_g128_desc_act), and backend=vllm no longer has bitsandbytes, nor "
            "GPTQ that is asymmetric or has desc_act over groups. HINT: use the unquantized checkpoint, or backend=",
        ),
        (
            "backend=vllm precision=bf16",
            {**GPTQ, "sym": False},
            "The checkpoint is quantized (gptq_int4_g128_asym), and backend=vllm no longer has bitsandbytes, nor "
            "GPTQ that is asymmetric or has desc_act over groups. HINT: use the unquantized checkpoint, or backend=",
        ),
        (
            "backend=vllm precision=bf16",
            {"load_in_8bit": True},
            "The checkpoint is quantized (int8), and backend=vllm no longer has bitsandbytes, nor "
            "GPTQ that is asymmetric or has desc_act over groups. HINT: use the unquantized checkpoint",
        ),
        (
            "backend=vllm precision=fp32",
            AWQ,
            "vLLM multiplies awq_int4_g64 weights in 16 bits, not in precision=fp32. HINT: precision=bf16",
        ),
        (
            "backend=transformers",
            {"quant_method": "aqlm"},
            "The bytes of a checkpoint quantized by aqlm are not known.",
        ),
    ],
)
def test_a_quantized_checkpoint_that_an_engine_cannot_read_is_refused(
    overrides: str, fields: dict[str, Any] | None, message: str
) -> None:
    config = compose_run(["model=tiny_llama", *overrides.split()])
    with pytest.raises(PlanError) as caught:
        quantization_of(config, {"quantization_config": fields}, on_cuda=False)
    assert str(caught.value).startswith(message)


def test_the_command_reads_the_config_of_a_quantized_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantized_copy(tmp_path / "model")
    assert main([f"model={tmp_path / 'model'}", "device=a6000", "backend=vllm,fsdp,deepspeed", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| 1xa6000 | **vllm** | gptq_int4_g32 |" in out
    assert "| 1xa6000 | fsdp | gptq_int4_g32 |" in out
    assert "deepspeed gptq_int4_g32: deepspeed cannot run gptq_int4_g32 weights" in out


def quantized_copy(folder: Path, fields: dict[str, Any] | None = None) -> None:
    """A copy of tiny_llama whose config says that it is quantized; the weights are unchanged."""
    shutil.copytree(ROOT / "launcher/models/tiny_llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = fields or {**GPTQ, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))


BLOCKS = {**FP8, "weight_block_size": [128, 128]}
BLOCKS_TOGETHER = "fp8_128x128 keeps 128 outputs and 128 inputs together, and a device would have 64 x 128 of a matrix."
TORN: list[tuple[str, int, dict[str, Any], str]] = [
    ("tensor_parallel", 2, GPTQ, "gptq_int4_g128 keeps 16 outputs and 128 inputs together, and a device would have"),
    ("tensor_parallel", 2, {**GPTQ, "desc_act": True}, "gptq_int4_g128_desc_act has groups of inputs from anywhere"),
    ("tensor_parallel", 4, AWQ, "awq_int4_g64 keeps 16 outputs and 64 inputs together, and a device would have"),
    ("tensor_parallel", 2, BLOCKS, BLOCKS_TOGETHER),
    ("fsdp", 2, BLOCKS, BLOCKS_TOGETHER),
    ("fsdp", 3, GPTQ, "gptq_int4_g128 keeps 8 outputs and 128 inputs together, and a device would have 43 x 128"),
    ("fsdp", 3, AWQ, "awq_int4_g64 keeps 8 outputs and 64 inputs together, and a device would have 43 x 128"),
]


@pytest.mark.parametrize(("backend", "devices", "fields", "fact"), TORN)
def test_what_a_cut_would_tear_apart_is_refused_and_each_hint_works(
    backend: str, devices: int, fields: dict[str, Any], fact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized_copy(tmp_path / "model", fields)
    asked = [f"backend={backend}", f"devices={devices}", f"model.path={tmp_path / 'model'}", "dry_run=true"]
    assert launch(asked) == 2
    error = capsys.readouterr().err
    assert error.startswith(fact)
    assert error.count("\n") == 1
    changes = error.strip().partition(" HINT: ")[2].split(", or ")
    assert changes[0].startswith("devices=")
    for change in changes:
        assert launch([*asked, *change.split()]) == 0, change


@pytest.mark.slow
def test_a_run_of_vllm_holds_what_was_planned(tmp_path: Path) -> None:
    """With random weights in the shapes of a GPTQ checkpoint, a real engine has exactly the planned parameter bytes."""
    pytest.importorskip("vllm", exc_type=ImportError)
    quantized_copy(tmp_path / "model")
    overrides = ["backend=vllm", "model=tiny_llama", f"model.path={tmp_path / 'model'}", "model.weights=random"]
    overrides += ["precision=bf16", "devices=1", "accelerator=cpu", "sampling.max_new_tokens=2", "measure.repeats=1"]
    ended = launcher(*overrides, f"output_dir={tmp_path}", OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.err[-3000:]
    run_dir = Path(ended.last_json["run_dir"])
    plan, record = (json.loads((run_dir / name).read_text()) for name in ("plan.json", "record.json"))
    assert plan["quantization"] == "gptq_int4_g32"
    assert [device["parameter_bytes"] for device in record["devices"]] == [
        device["parameter_bytes"] for device in plan["devices"]
    ]
