"""`python -m launcher.compress`: its checkpoints, its refusals, and that engines load the checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, launcher
from transformers import AutoModelForCausalLM

from launcher.compress.__main__ import main
from launcher.models import EMBEDDED
from launcher.prompts.prompts import encode
from shards.checkpoint.checkpoint import Checkpoint
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.load.quantized.stored import make_stored
from shards.model.quantization import as_kept
from shards.model.quantized_checkpoint import from_config
from shards.parallel.products import quantize_layers

IDS = torch.tensor([[5, 77, 301, 12, 9, 44, 130, 8]])


def read(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def matrices(model: Any) -> dict[str, torch.Tensor]:
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    return {name: tensor.detach() for name, tensor in layers.named_parameters() if tensor.dim() == 2}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_smallest_values_are_zeros_and_the_others_as_they_were(
    pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    assert main(["model=tiny_llama", "method=magnitude", f"pattern={pattern}", f"out={out}"]) == 0
    before, after = matrices(read(EMBEDDED / "tiny_llama")), matrices(read(out))
    for name, weight in after.items():
        left, old = weight != 0, before[name]
        assert torch.equal(weight[left], old[left])
        if pattern == "2:4":
            assert (left.view(-1, 4).sum(1) <= 2).all()
        else:
            assert old[~left].abs().max() <= old[left].abs().min()
            assert round(float((~left).float().mean()), 2) == 0.5
    said = capsys.readouterr().out
    assert "no engine here is faster" in said.splitlines()[4]
    assert "50.0% of the values of the layers are zeros" in said
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_falcon"])
def test_what_is_cut_out_is_what_could_have_been_zeros(name: str, tmp_path: Path) -> None:
    """The smaller model has the logits of the whole one with zeros in the removed columns and heads."""
    out = tmp_path / "made"
    assert main([f"model={name}", "method=structured", "ratio=0.5", f"out={out}"]) == 0
    whole, smaller = read(EMBEDDED / name), read(out)
    count = sum(parameter.numel() for parameter in smaller.parameters())
    assert count < 0.8 * sum(parameter.numel() for parameter in whole.parameters())
    outward = ("o_proj", "down_proj") if name == "tiny_llama" else ("dense_4h_to_h",)
    for layer, weight in matrices(whole).items():
        if layer.split(".")[-2] in outward:
            columns = {tuple(column) for column in matrices(smaller)[layer].t().tolist()}
            gone = [place for place, column in enumerate(weight.t().tolist()) if tuple(column) not in columns]
            assert len(gone) == weight.shape[1] - matrices(smaller)[layer].shape[1] > 0
            weight[:, gone] = 0
    torch.testing.assert_close(smaller(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def perplexity(folder: Path, lines: list[str]) -> float:
    model, total, tokens = read(folder), 0.0, 0
    for prompt in encode(lines, EMBEDDED / "tiny_llama"):
        ids = torch.tensor([prompt.token_ids])
        if ids.shape[1] > 1:
            likely = model(ids).logits[0, :-1].log_softmax(-1)
            total += likely.gather(1, ids[0, 1:, None]).sum().item()
            tokens += ids.shape[1] - 1
    return math.exp(-total / tokens)


@pytest.mark.slow
def test_gradients_know_better_than_magnitudes_what_can_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the perplexity of held-out lines of the training text: every other line is used for calibration, the rest is
    scored. At a ratio of 0.25 three of four heads would not divide the hidden size."""
    corpus = (ROOT / "scripts" / "tiny_models" / "corpus.txt").read_text().splitlines()
    lines = [line for line in corpus if line and not line.startswith("#") and "{" not in line]
    (tmp_path / "seen.txt").write_text("\n".join(lines[1::2]))
    for ratio in ("0.25", "0.5"):
        asked = ["model=tiny_llama", f"ratio={ratio}"]
        prompts = f"prompts={tmp_path / 'seen.txt'}"
        assert main([*asked, "method=structured", f"out={tmp_path / ratio}"]) == 0
        assert main([*asked, "method=llm_pruner", prompts, f"out={tmp_path / f'{ratio}_gradients'}"]) == 0
        by_magnitude, by_gradients = tmp_path / ratio, tmp_path / f"{ratio}_gradients"
        sizes = [
            sum(parameter.numel() for parameter in read(folder).parameters()) for folder in (by_magnitude, by_gradients)
        ]
        assert sizes[0] == sizes[1]
        assert perplexity(by_gradients, lines[::2]) < 0.9 * perplexity(by_magnitude, lines[::2])
    assert "holds the model and gradients of its layers in fp32" in capsys.readouterr().out


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_rounded_values_are_within_half_a_step(scheme: str, tmp_path: Path) -> None:
    out = tmp_path / "made"
    assert main(["model=tiny_falcon", "method=rtn", f"scheme={scheme}", f"out={out}"]) == 0
    stored = from_config(json.loads((out / "config.json").read_text()))
    assert stored is not None
    form = as_kept(stored)
    assert form is not None
    model = build_meta(out, torch.float32)
    quantize_layers(model, make_stored(form, torch.float32, zeros_from=1), form.chooses)
    load_weights(model, Checkpoint.open(out), "cpu")
    weights = matrices(read(EMBEDDED / "tiny_falcon"))
    for name, layer in model.transformer.h.named_modules():
        if getattr(layer, "quantizer", None) is not None:
            weight = weights[f"{name}.weight"]
            if scheme == "w8a8":
                step = layer.weight_scale[:, None]
                values = layer.weight * step
            else:
                step = layer.weight_scale[..., 0].t().repeat_interleave(layer.quantizer.group, dim=1)
                values = layer.quantizer.multiply(layer, torch.eye(weight.shape[1]), None).t()
            most = 0.51 if scheme == "w4a16" else 1.01  # the largest value is outside the integers' range
            assert ((values - weight).abs() <= most * step + 1e-6).float().mean() > 0.995


@pytest.mark.slow
def test_engines_load_what_was_made(tmp_path: Path) -> None:
    out = tmp_path / "made"
    assert main(["model=tiny_llama", "method=structured", "ratio=0.5", f"out={out}"]) == 0
    answers = []
    for backend, devices in (("transformers", 1), ("fsdp", 2), ("tensor_parallel", 2)):
        ended = launcher(
            f"backend={backend}", f"devices={devices}", f"model.path={out}", "measure.repeats=1", "measure.warmup=0",
            f"output_dir={tmp_path / 'runs'}", "sampling.max_new_tokens=8",
        )  # fmt: skip
        assert ended.code == 0, ended.err
        run_dir = Path(ended.last_json["run_dir"])
        record = json.loads((run_dir / "record.json").read_text())
        held = [device["parameter_bytes"] for device in record["devices"]]
        assert held == [device["parameter_bytes"] for device in record["plan"]["devices"]]
        answers.append([json.loads(line)["token_ids"] for line in (run_dir / "completions.jsonl").open()])
    assert answers[0] == answers[1] == answers[2]


LLAMA = "model=tiny_llama"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([LLAMA, "method=magnitude"], "out= is missing. HINT: python -m launcher.compress model=tiny_llama"),
        ([LLAMA, "method=prune", "out=OUT"], "method=prune is not one of magnitude, structured, llm_pruner"),
        ([LLAMA, "method=magnitude", "out=."], ". exists already, and is not overwritten. HINT: out=._2"),
        ([LLAMA, "method=magnitude", "ratio=2", "out=OUT"], "ratio=2 is not a ratio between 0 and 1. HINT: ratio=0.5"),
        ([LLAMA, "method=magnitude", "ratio=0.3", "pattern=2:4", "out=OUT"], "leaves two of four values. HINT: ratio"),
        ([LLAMA, "method=rtn", "ratio=0.3", "out=OUT"], "method=rtn does not use ratio=. HINT: leave ratio= out"),
        ([LLAMA, "method=rtn", "scheme=w2a16", "out=OUT"], "scheme=w2a16 is not one of w4a16, w8a8. HINT: scheme="),
        ([LLAMA, "method=gptq", "out=OUT"], "method=gptq is llm-compressor's, whose packages do not fit"),
        ([LLAMA, "method=gptq", "python=no", "out=OUT"], "method=gptq needs prompts to calibrate with. HINT: prompts="),
        ([LLAMA, "method=gptq", "python=no", "prompts=FILE", "out=OUT"], "python=no cannot be run: No such file"),
        ([LLAMA, "method=llm_pruner", "out=OUT"], "method=llm_pruner needs prompts to calibrate with. HINT: prompts="),
        ([LLAMA, "method=rtn", "speed=5", "out=OUT"], "speed=5 is not an argument of launcher.compress (model, "),
        (["model=nothing", "method=rtn", "out=OUT"], "HINT: "),
        (["model=FOLDER", "method=rtn", "out=OUT"], "HINT: "),
    ],
)
def test_what_cannot_be_made_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("What is your return policy?\n")
    Path("FOLDER").mkdir()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "FOLDER"]
