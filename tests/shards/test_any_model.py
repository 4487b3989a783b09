"""Any causal LM of transformers: planned from its config alone, and loaded by the tensor names of its checkpoints."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from running import launcher, run
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.core_model_loading import Transpose, WeightConverter

from launcher.prepare import shapes
from launcher.prepare.shapes import built_of
from shards.checkpoint.checkpoint import Checkpoint
from shards.engines.transformers import TransformersPlanner
from shards.errors import CheckpointError, PlanError
from shards.load.blocks import Block, mark_block
from shards.load.conversion import converted
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.load.meta_shapes import describe, problem
from shards.model.any_shape import Built, ask_transformers, shape_from_tensors
from shards.model.known_shape import known_shape
from shards.plan.plan import make_plan
from shards.plan.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
USUAL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 256, **IDS,
}  # fmt: skip
GPT = {"vocab_size": 300, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, **IDS}
NEO_LAYERS = {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4, "window_size": 16}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK = {**MLA, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_neox": USUAL,
    "gpt_neo": {"vocab_size": 300, "hidden_size": 64, "max_position_embeddings": 256, **NEO_LAYERS, **IDS},
    "opt": {**USUAL, "ffn_dim": 96, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 300, "hidden_size": 64, "n_layer": 3, "n_head": 4, **IDS},
    "phi": USUAL,
    "gemma2": {**USUAL, "head_dim": 24, "sliding_window": 16},
    "mixtral": {**USUAL, "num_local_experts": 4},
    "olmo2": USUAL,
    "stablelm": USUAL,
    "starcoder2": USUAL,
    "gpt_bigcode": GPT,
    "qwen3_moe": {**USUAL, **MOE, "head_dim": 16},
    "deepseek_v3": {**USUAL, **DEEPSEEK, **MOE},
}


def fields(family: str) -> dict[str, Any]:
    return {"model_type": family, **CONFIGS[family]}


def plain(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields(family))).eval()


def described(family: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(describe(build_meta(fields(family), torch.bfloat16))))
    return found


@pytest.mark.parametrize("family", CONFIGS)
def test_a_plan_has_the_parameters_and_the_cache_of_the_real_model(family: str) -> None:
    answer, model = described(family), plain(family)
    shape = shape_from_tensors(answer["sizes"], answer["tensors"])
    assert answer["notes"] == []
    assert shape.num_parameters == model.num_parameters()
    named = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {parameter.name: parameter.shape for parameter in shape.parameters} == named
    assert len(shape.groups()) == shape.num_layers + 1
    cache, tokens = DynamicCache(config=model.config), 7
    with torch.no_grad():
        model(input_ids=torch.arange(1, tokens + 1)[None], past_key_values=cache, use_cache=True)
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert tokens * shape.kv_values_per_token() == numbers
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shape.tied == tied


def test_idle_experts_are_not_read() -> None:
    answer = described("mixtral")
    shape = shape_from_tensors(answer["sizes"], answer["tensors"])
    one_expert = 3 * 64 * 96
    assert shape.experts == (4, 2)
    assert shape.step_parameters == shape.num_parameters - 300 * 64 - 3 * 2 * one_expert


@pytest.mark.slow
def test_another_process_is_asked() -> None:
    built = ask_transformers({**fields("gemma2"), "quantization_config": {"quant_method": "fp8"}}, sys.executable)
    answer = described("gemma2")
    assert built == Built(shape_from_tensors(answer["sizes"], answer["tensors"]))
    assert built.shape.windows == (16, None, 16)
    assert built.all_notes() == ()


SLIDING: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "mistral, nothing said": {},
    "mistral, none": {"sliding_window": None},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen2, all": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    "qwen2, off": {"sliding_window": 16, "max_window_layers": 0},
    "qwen3": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "head_dim": 16},
    "gemma2": CONFIGS["gemma2"],
}


@pytest.mark.parametrize("name", SLIDING)
def test_the_cache_with_sliding_windows_is_as_planned(name: str) -> None:
    """After the prompts, when views keep the whole prompts in memory, and at the end."""
    family, rows, prompt, new = name.partition(",")[0], 2, 40, 4
    config = {"model_type": family, **USUAL, **SLIDING[name]}
    model = build_meta(config, torch.float32)
    answer = describe(model)
    shape = shape_from_tensors(answer["sizes"], answer["tensors"])
    if family != "gemma2":
        assert known_shape(config).windows == shape.windows
    assert list(shape.windows) == answer["sizes"].get("windows", [])
    asked = PlanRequest(
        shape=shape,
        engine=TransformersPlanner(),
        dtype_bytes=4,
        batch_size=rows,
        prompt_tokens=prompt,
        max_new_tokens=new,
    )
    (planned,) = make_plan(asked).devices
    whole = make_plan(replace(asked, shape=replace(shape, windows=()))).devices[0]
    cache = DynamicCache(config=model.config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        for width in (prompt, *[1] * new):
            model(input_ids=torch.ones((rows, width), dtype=torch.long), past_key_values=cache, use_cache=True)
            tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
            if width == prompt:
                held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
                assert held <= planned.kv_cache_bytes + planned.activation_bytes - whole.activation_bytes
                assert held == whole.kv_cache_bytes * prompt // (prompt + new)
    assert planned.kv_cache_bytes == sum(tensor.nbytes for tensor in tensors)
    assert (planned.kv_cache_bytes < whole.kv_cache_bytes) == any(window == 16 for window in shape.windows)


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        ({"model_type": "gpt2"}, None),
        ({"model_type": "t5"}, r"model_type 't5' is not a causal language model of transformers 5\.\d+\.\d+"),
        ({"model_type": "mine"}, r"model_type 'mine' is not one of transformers 5\.\d+\.\d+"),
        ({"model_type": "mine", "auto_map": {}}, r".*, and the model's own code is not run for a plan"),
        ({}, r"model_type None is not one of .*"),
    ],
)
def test_what_transformers_cannot_build_is_said(config: dict[str, Any], fact: str | None) -> None:
    found = problem(config)
    assert found is None if fact is None else re.fullmatch(fact, found or "")


@pytest.mark.parametrize(
    ("program", "timeout_s", "fact"),
    [
        ("echo boo >&2; echo 'ModuleNotFoundError: no torch' >&2; exit 1", 60, "cannot find the shapes of model_type "),
        ("exit 3", 60, "cannot find the shapes of model_type 'mine': exit code 3. HINT"),
        ("""echo '{"problem": "no luck", "known": true}'""", 60, "no luck. HINT: a causal language model"),
        ("exec sleep 60", 0.1, "did not find the shapes of model_type 'mine' in 0 s. HINT"),
        (None, 60, "python does not run, to find the shapes of model_type 'mine': No such file or directory. HINT"),
    ],
    ids=["no torch", "died", "refused", "too slow", "no interpreter"],
)
def test_an_interpreter_that_does_not_answer_is_one_line(
    tmp_path: Path, program: str | None, timeout_s: float, fact: str
) -> None:
    python = tmp_path / "python"
    if program is not None:
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o755)
    with pytest.raises(PlanError) as caught:
        ask_transformers({"model_type": "mine"}, str(python), timeout_s)
    assert fact in str(caught.value)
    assert "\n" not in str(caught.value)


def folder_of(family: str, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields(family)))
    return folder


@pytest.mark.slow
def test_the_plan_command_asks_once_and_imports_no_torch(tmp_path: Path) -> None:
    arguments = [f"model={folder_of('gemma2', tmp_path / 'm')}", "devices=1,2", "device=h200", "--markdown"]
    program = f"import sys; from launcher.plan import main; code = main({arguments}); assert 'torch' not in sys.modules"
    ended = run([sys.executable, "-c", f"{program}; raise SystemExit(code)"])
    assert ended.code == 0, ended.err
    assert f"{plain('gemma2').num_parameters():,} parameters" in ended.out
    assert ended.err.splitlines() == ["model_type gemma2: asking transformers for its shapes, which takes seconds"]


def test_a_model_with_code_of_its_own_is_planned_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks transformers in this process; the answers of the separate process have their own tests."""

    def answer(config: dict[str, Any], python: str) -> Built:
        raise PlanError(f"{problem(config)}.", "a causal language model.")

    monkeypatch.setattr(shapes, "ask_transformers", answer)
    save_file({"wte.weight": torch.ones(10, 8), "h.0.mlp.weight": torch.ones(8, 32)}, tmp_path / "model.safetensors")
    sizes = {"vocab_size": 10, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "own.Config"}, **sizes}
    built = built_of(config, Checkpoint.open(tmp_path).tensors)
    assert built.shape.num_parameters == 10 * 8 + 8 * 32
    (note,) = built.all_notes()
    assert note.startswith("mine: its shapes are those of its files: model_type 'mine' is not one of transformers 5")


def saved(family: str, folder: Path) -> Path:
    plain(family).save_pretrained(folder, max_shard_size="100KB")
    return folder


def by_module(family: str, folder: Path) -> Path:
    """A checkpoint with the tensors under the names of the modules."""
    save_file(plain(family).state_dict(), folder_of(family, folder) / "model.safetensors")
    return folder


def old_neox(family: str, folder: Path) -> Path:
    """A checkpoint like EleutherAI's: the head is called embed_out, and there are buffers that are now computed."""
    state = {name.replace("lm_head.", "embed_out."): value for name, value in plain(family).state_dict().items()}
    for layer in range(3):
        at = f"gpt_neox.layers.{layer}.attention"
        state[f"{at}.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.bool)
        state[f"{at}.masked_bias"] = torch.tensor(-1e9)
        state[f"{at}.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(state, folder_of(family, folder) / "model.safetensors")
    return folder


def old_mixtral(family: str, folder: Path) -> Path:
    """A checkpoint like Mistral's: w1, w3 (gate, up) and w2 (down) of each expert in block_sparse_moe."""
    state = {}
    for name, value in plain(family).state_dict().items():
        at = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                for part, rows in zip(("w1", "w3"), both.chunk(2), strict=True):
                    state[f"{at}.{expert}.{part}.weight"] = rows.clone()
        elif name.endswith("experts.down_proj"):
            state |= {f"{at}.{expert}.w2.weight": matrix.clone() for expert, matrix in enumerate(value)}
        else:
            state[name.replace(".mlp.", ".block_sparse_moe.")] = value
    save_file(state, folder_of(family, folder) / "model.safetensors")
    return folder


FORMS: list[tuple[str, Callable[[str, Path], Path], str]] = [
    ("gpt_neox", saved, "embed_out.weight"),
    ("gpt_neox", by_module, "gpt_neox.embed_in.weight"),
    ("gpt_neox", old_neox, "gpt_neox.layers.0.attention.masked_bias"),
    ("gpt_neo", saved, "transformer.h.0.attn.attention.k_proj.weight"),
    ("mixtral", saved, "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
    ("mixtral", by_module, "model.layers.0.mlp.experts.gate_up_proj"),
    ("mixtral", old_mixtral, "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
    ("qwen3_moe", saved, "model.layers.0.mlp.experts.0.gate_proj.weight"),
    ("deepseek_v3", saved, "model.layers.1.mlp.experts.0.gate_proj.weight"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "form", "has"), FORMS)
def test_stored_names_and_layouts_give_what_transformers_loads(
    tmp_path: Path, family: str, form: Callable[[str, Path], Path], has: str
) -> None:
    folder = form(family, tmp_path / "model")
    checkpoint, tokens = Checkpoint.open(folder), torch.arange(1, 31)[None]
    assert has in checkpoint.tensors
    model = build_meta(folder, torch.float32)
    load_weights(model, checkpoint, "cpu")
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        assert torch.equal(logits, AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=tokens).logits)
        assert torch.equal(logits, plain(family)(input_ids=tokens).logits)


def blocks(shape: tuple[int, ...], dim: int, edges: list[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The start and shape of each block between consecutive `edges` along `dim`."""
    return [
        (tuple(low if axis == dim else 0 for axis in range(len(shape))), (*shape[:dim], high - low, *shape[dim + 1 :]))
        for low, high in pairwise(edges)
    ]


@pytest.mark.parametrize(("dim", "edges"), [(0, [0, 3, 3, 4]), (1, [0, 5, 64, 96, 100, 192]), (2, [0, 1, 40, 64])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_of_merged_tensors_is_read_alone(
    tmp_path: Path, dim: int, edges: list[int], dtype: torch.dtype
) -> None:
    folder, name = saved("mixtral", tmp_path / "model"), "model.layers.1.mlp.experts.gate_up_proj"
    whole = plain("mixtral").state_dict()[name]
    checkpoint = Checkpoint.open(folder)
    everything = load_weights(build_meta(folder, dtype), checkpoint, "cpu").bytes_read
    for start, size in blocks(tuple(whole.shape), dim, edges):
        model = build_meta(folder, dtype)
        cut = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        mark_block(cut, Block(name, tuple(whole.shape), start))
        model.model.layers[1].mlp.experts.gate_up_proj = cut
        stats = load_weights(model, checkpoint, "cpu")
        index = tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))
        assert torch.equal(cut, whole[index].to(dtype)), (start, size)
        if dim < 2:  # a block of short rows is read with the whole rows
            assert everything - stats.bytes_read == 4 * (whole.numel() - cut.numel())


def test_an_expert_that_is_missing_is_one_line(tmp_path: Path) -> None:
    folder = old_mixtral("mixtral", tmp_path / "model")
    checkpoint = Checkpoint.open(folder)
    lost = "model.layers.2.block_sparse_moe.experts.3.w3.weight"
    fewer = Checkpoint(
        folder, False, {name: entry for name, entry in checkpoint.tensors.items() if name != lost}, checkpoint.stamps
    )
    with pytest.raises(
        CheckpointError, match=r"7 stored tensors of model.layers.2.mlp.experts.gate_up_proj do not fit"
    ):
        load_weights(build_meta(folder, torch.float32), fewer, "cpu")


def test_a_layout_that_cannot_be_read_in_parts_is_one_line(tmp_path: Path) -> None:
    save_file({"a.old": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    model = nn.Module()
    model.conversions = [WeightConverter("a.old", "a.new", [Transpose(0, 1)])]  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"^a.new is stored in a layout .* by Transpose. HINT: an engine with"):
        converted(model, Checkpoint.open(tmp_path), ["a.new"])


def ended_run(tmp_path: Path, folder: Path, *overrides: str) -> Path:
    """The directory of a real run of a model in a folder."""
    ended = launcher(
        "model=tiny_llama", "model.name=any", f"model.path={folder}", "accelerator=cpu", "prompts=synthetic",
        "prompts.count=3", "measure.repeats=1", f"output_dir={tmp_path / 'runs'}", *overrides,
    )  # fmt: skip
    assert ended.code == 0, ended.err + ended.out
    return Path(ended.last_json["run_dir"])


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize(("family", "engine"), [("gpt_neo", ["fsdp", 2]), ("gemma2", ["transformers", 1])])
def test_a_run_with_random_weights_holds_what_was_planned(tmp_path: Path, family: str, engine: list[Any]) -> None:
    folder = folder_of(family, tmp_path / "model")
    run_dir = ended_run(tmp_path, folder, f"backend={engine[0]}", f"devices={engine[1]}", "model.weights=random")
    record = json.loads((run_dir / "record.json").read_text())
    planned = json.loads((run_dir / "plan.json").read_text())
    assert planned["num_parameters"] == plain(family).num_parameters()
    shares = [device["parameter_bytes"] for device in planned["devices"]]
    assert [device["parameter_bytes"] for device in record["devices"]] == shares
    assert sum(shares) == 4 * planned["num_parameters"]
    about = [note.partition(":")[0] for note in record["notes"]]
    assert set(about) <= {"measure.scheduling=static", "backend.resident_layers=auto"}


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_run_of_shards_of_merged_experts_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path / "model")
    run_dir = ended_run(tmp_path, folder, "backend=fsdp", "devices=2")
    rows = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["token_ids"] for line in (run_dir / "prompts.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert len(rows) == 3
    for row in rows:
        ids = torch.tensor([prompts[row["index"]]])
        length = row["new_tokens"]
        told = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        assert row["token_ids"] == told[0, ids.shape[1] :].tolist()
