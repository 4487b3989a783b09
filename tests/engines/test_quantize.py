"""Weights quantized while they are loaded, on every engine: the library's logits, and the planned bytes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from running import ROOT, WITH_PROGRAMS, command_line, launcher, ranks_of, run
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.config.engines import engines
from launcher.models import EMBEDDED
from launcher.prepare.shapes import built_of
from shards.checkpoint.checkpoint import Checkpoint
from shards.errors import PlanError
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.load.quantized.quantizers import make_quantizer
from shards.model.quantization import QUANTIZATIONS, Storage
from shards.parallel.products import quantize_layers
from shards.plan.cuts import cut_up

if TYPE_CHECKING:
    from collections.abc import Sequence

MODELS = ("tiny_falcon", "tiny_llama")
OURS = ("fsdp", "tensor_parallel", "transformers")
IDS = torch.tensor([[5, 77, 301, 12, 9, 44, 130, 8]])


def loaded(model: str, quantization: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    folder = EMBEDDED / model
    module = build_meta(folder, dtype)
    quantize_layers(module, make_quantizer(quantization, dtype))
    load_weights(module, Checkpoint.open(folder), "cpu")
    return module


@torch.inference_mode()
def test_llm_int8_is_that_of_from_pretrained() -> None:
    """Only for a Llama: transformers does not quantize the layers of a Falcon, which have their own class."""
    folder, config = EMBEDDED / "tiny_llama", BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    torch.testing.assert_close(loaded("tiny_llama", "int8")(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq", "fp4"])
def test_four_bits_are_those_of_from_pretrained(
    quantization: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-exact. On CPUs with avx512_bf16 bitsandbytes' layers would convert themselves to maxima and products in bf16,
    for models of any dtype (_convert_weight_packed_for_cpu in bitsandbytes/functional.py); the test disables this."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    kind, _, nested = quantization.partition("_")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=bool(nested),
        bnb_4bit_compute_dtype=dtype,
    )
    theirs = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny_llama", dtype=dtype, quantization_config=config)
    assert torch.equal(loaded("tiny_llama", quantization, dtype)(IDS).logits, theirs(IDS).logits)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq", "fp4"])
def test_four_bits_are_those_that_bitsandbytes_makes(quantization: str, model: str) -> None:
    """Compared with a plain model that has the dequantized values, since on some CPUs bitsandbytes multiplies only in
    bf16."""
    module = loaded(model, quantization)
    rounded = AutoModelForCausalLM.from_pretrained(EMBEDDED / model, dtype=torch.float32)
    for name, layer in module.named_modules():
        if getattr(layer, "quantizer", None) is not None:
            weight = rounded.get_submodule(name).weight
            kind, _, nested = quantization.partition("_")
            packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=bool(nested), quant_type=kind)
            assert torch.equal(packed.view(-1), layer.weight.view(-1))
            weight.copy_(dequantize_4bit(packed, state))
    torch.testing.assert_close(module(IDS).logits, rounded(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("model", MODELS)
def test_int8_of_rows_is_the_model_with_its_rows_rounded(model: str) -> None:
    module = loaded(model, "int8_wo")
    rounded = AutoModelForCausalLM.from_pretrained(EMBEDDED / model, dtype=torch.float32)
    for name, layer in module.named_modules():
        if getattr(layer, "quantizer", None) is not None:
            weight = rounded.get_submodule(name).weight
            values = layer.weight.float() * layer.weight_scale[:, None]
            assert (values - weight).abs().max() <= layer.weight_scale.max()
            weight.copy_(values)
    torch.testing.assert_close(module(IDS).logits, rounded(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("model", MODELS)
def test_int4_of_groups_is_the_model_with_its_groups_rounded(model: str) -> None:
    module = loaded(model, "int4_wo")
    rounded = AutoModelForCausalLM.from_pretrained(EMBEDDED / model, dtype=torch.float32)
    for name, layer in module.named_modules():
        if getattr(layer, "quantizer", None) is not None:
            weight = rounded.get_submodule(name).weight
            values = layer.quantizer.multiply(layer, torch.eye(weight.shape[1]), None).t()
            steps = layer.weight_scale[..., 0].t().repeat_interleave(64, dim=1)
            assert ((values - weight).abs() <= 0.5001 * steps + 1e-5).all()
            weight.copy_(values)
    torch.testing.assert_close(module(IDS).logits, rounded(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_int8_of_both_factors_is_the_product_of_rounded_rows() -> None:
    layer = loaded("tiny_falcon", "int8_dyn").transformer.h[0].mlp.dense_h_to_4h
    rows = torch.randn(2, 3, layer.packed_shape[1], generator=torch.Generator().manual_seed(0))
    step = rows.abs().amax(-1, keepdim=True) / 127.5
    weight = layer.weight.double() * layer.weight_scale.double()[:, None]
    expected = ((rows / step).round().clamp(-128, 127) * step).double() @ weight.t()
    torch.testing.assert_close(layer(rows).double(), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["int8_dyn", "int4_wo"])
def test_integers_are_those_of_torchao(quantization: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-exact, compared with a model quantized by torchao, which scripts/setup.sh installs into .venv/beside."""
    monkeypatch.syspath_prepend(Path(sys.prefix) / "beside")
    monkeypatch.setenv("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")  # they are compiled for GPUs
    api = pytest.importorskip("torchao.quantization")
    prototype = pytest.importorskip("torchao.prototype.quantization.int4.inference_workflow")
    kinds = {
        "int8_dyn": api.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        "int4_wo": prototype.PrototypeInt4WeightOnlyConfig(group_size=64, set_inductor_config=False),
    }
    folder = EMBEDDED / "tiny_llama"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    api.quantize_(theirs.model.layers, kinds[quantization])
    assert torch.equal(loaded("tiny_llama", quantization, dtype)(IDS).logits, theirs(IDS).logits)


@pytest.mark.slow
def test_each_engine_cuts_the_model_that_it_quantizes_and_holds_the_planned_bytes(tmp_path: Path) -> None:
    ended = ranks_of("quantized_program.py", 2, str(tmp_path), timeout=300, OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.err[-2000:]
    for rank in range(2):
        results = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert len(results) == sum(2 * len(kind.quantizations) for name, kind in engines().items() if name in OURS)
        for key, result in results.items():
            model, quantization, engine = key.split()
            shape = built_of(json.loads((EMBEDDED / model / "config.json").read_text())).shape
            planner, ranks = engines()[engine].planner_class(), 1 if engine == "transformers" else 2
            planned = cut_up(shape, planner.pieces, ranks, Storage(4, QUANTIZATIONS[quantization]))
            assert result["parameter_bytes"] == planned[rank % ranks], key
            assert result["tokens"] == results[f"{model} {quantization} transformers"]["tokens"], key


RUNS = {
    "tiny_falcon": (("fsdp", 2, "nf4"), ("tensor_parallel", 2, "nf4")),
    "tiny_llama": (("transformers", 1, "int4_wo"), ("tensor_parallel", 2, "int4_wo"), ("fsdp", 1, "int8_wo")),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_engine_answers_alike_and_holds_the_planned_bytes(model: str, tmp_path: Path) -> None:
    texts: dict[str, list[str]] = {}
    for backend, devices, quantization in RUNS[model]:
        ended = launcher(
            f"backend={backend}", f"devices={devices}", f"model={model}", f"quantization={quantization}",
            "measure.repeats=1", "measure.warmup=0", "sampling.max_new_tokens=12", f"output_dir={tmp_path}",
        )  # fmt: skip
        assert ended.code == 0, ended.err
        run_dir = Path(ended.last_json["run_dir"])
        record = json.loads((run_dir / "record.json").read_text())
        held = [device["parameter_bytes"] for device in record["devices"]]
        assert held == [device["parameter_bytes"] for device in record["plan"]["devices"]]
        answers = [json.loads(line)["token_ids"] for line in (run_dir / "completions.jsonl").read_text().splitlines()]
        assert answers == texts.setdefault(quantization, answers), (backend, quantization)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            ["backend=fsdp", "quantization=nf4_dq"],
            "=fsdp makes no nf4_dq weights, but int8_wo, int8_dyn, int8, nf4, fp4. HINT: backend=tensor_parallel",
        ),
        (
            ["backend=deepspeed", "quantization=int8"],
            "backend=deepspeed makes no int8 weights. HINT: backend=",
        ),
        (["backend=dummy", "quantization=int8"], "backend=dummy makes no int8 weights. HINT: backend=fsdp"),
        (
            ["backend=transformers", "quantization=fp8"],
            "makes no fp8 weights, but int8_wo, int8_dyn, int4_wo, int8, nf4, nf4_dq, fp4.",
        ),
    ],
)
def test_an_engine_that_does_not_make_it_names_one_that_does(asked: list[str], message: str, tmp_path: Path) -> None:
    ended = command_line(*asked, f"output_dir={tmp_path}", "dry_run=true")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert message in ended.err


def test_other_layers_than_linear_ones_are_refused() -> None:
    config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}
    with pytest.raises(PlanError, match="Conv1D, which is not quantized here"):
        quantize_layers(build_meta(config, torch.float32), make_quantizer("int8_wo", torch.float32))


def benchmark_ranks(command: Sequence[str], ranks: int, threads: int, limit_s: float) -> list[dict[str, Any]]:
    """Replaces `run_ranks` of the benchmarks: the ranks are forks with one thread each, for busy machines."""
    started = [sys.executable, "-m", "launcher.launch.forks", str(ranks), "forked", json.dumps(command[1:])]
    ended = run(started, limit_s, PYTHONPATH=WITH_PROGRAMS)
    assert ended.code == 0, ended.err[-2000:]
    return [row for line in ended.out.splitlines() for row in json.loads(line)]


@pytest.mark.slow
def test_weights_take_their_share_and_loading_little_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a model of 0.4 GB: the limit of 300 MB above the shard is less than a copy of the whole model in any form."""
    techniques = {"int8": (0.47, 0.53), "int4_wo": (0.2, 0.3)}
    monkeypatch.syspath_prepend(ROOT / "scripts" / "benchmarks")
    benchmark = importlib.import_module("quantized")
    monkeypatch.setattr(benchmark, "run_ranks", benchmark_ranks)
    words = ["--size-gb", "0.4", "--tokens", "0", "--techniques", ",".join(techniques), "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [benchmark.__file__, *words])
    benchmark.main()
    rows = [row for row in json.loads(capsys.readouterr().out.splitlines()[-1]) if row["technique"] != "none"]
    assert len(rows) == (1 + 2) * 2 + 2  # int4_wo cannot be sharded by rows
    for row in rows:
        least, most = techniques[row["technique"]]
        assert least <= row["bytes_over_bf16"] <= most, row
        assert row["anonymous_over_held_bytes"] <= row["planned_over_bytes"] + 8e6 < 300e6, row
        assert row["quantize_s"] > 0, row


def test_the_ranks_of_a_benchmark_are_processes_of_one_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts" / "benchmarks")
    names = ["RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS"]
    program = f"import json, os; print(); print(json.dumps([[os.environ[name] for name in {names}]]))"
    rows: Any = importlib.import_module("ranks").run_ranks([sys.executable, "-c", program], 2, 3, 30)
    assert [(row[0], row[1], row[3]) for row in rows] == [("0", "2", "3"), ("1", "2", "3")]
    assert rows[0][2] == rows[1][2]
