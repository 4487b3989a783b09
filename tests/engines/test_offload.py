"""Offloaded weights: the same tokens, no files left behind, and refusals before a run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rank_program import GREEDY, configured
from running import command_line

from launcher.backends.base import Generation, Prompt
from launcher.config.engines import resolve
from launcher.config.parts.formats import AdapterConfig
from launcher.config.parts.storage import Offload, Precision
from launcher.config.schema import RunConfig, Scheduling
from launcher.models import EMBEDDED
from launcher.prepare.planning import plan_of
from shards.checkpoint.checkpoint import Checkpoint
from shards.load.disk import StoredWeights
from shards.load.meta import build_meta
from shards.machine.world import World

MODELS = ("tiny_falcon", "tiny_llama")
PROMPTS = [Prompt(index, "", tuple(range(5, 9 + 3 * index))) for index in range(4)]


def answered(config: RunConfig) -> tuple[Generation, torch.nn.Module, tuple[int, int], tuple[int, int]]:
    """The answers of a run, its model, and the bytes (on the device, offloaded) as planned and as measured."""
    folder = EMBEDDED / config.model.name
    fields = json.loads((folder / "config.json").read_text())
    plan = plan_of(config, fields, Checkpoint.open(folder).tensors, PROMPTS, on_cuda=False)
    assert plan is not None
    backend = resolve(config.backend.implementation)(config)
    backend.load(plan, World(), lambda done, total: None)
    generation = backend.generate(PROMPTS, GREEDY, lambda tokens, finished=(): None)
    [memory], [device] = backend.memory(), plan.devices
    planned = device.parameter_bytes, device.offloaded_bytes
    return generation, backend.model, planned, (memory.parameter_bytes, memory.offloaded_bytes)


def tokens(generation: Generation) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in generation.completions]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kind"), [*((model, kind) for model in MODELS for kind in ("bf16", "static")), ("tiny_llama", "adapter")]
)
def test_a_model_on_disk_gives_the_same_tokens_and_holds_none_of_its_weights(model: str, kind: str) -> None:
    config = configured("transformers", model, 1)
    if kind == "static":
        config.measure.scheduling = Scheduling.static
    elif kind == "adapter":
        config.adapter = AdapterConfig(str(EMBEDDED / "tiny_llama_adapter"))
    else:
        config.precision = Precision[kind]
    expected, _, held, measured = answered(config)
    assert (held, measured) == ((held[0], 0), held)
    found, module, planned, measured = answered(replace(config, offload=Offload.disk))
    assert tokens(found) == tokens(expected)
    assert planned == measured == (0, held[0])
    assert all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_stored_weights_are_those_of_the_checkpoint_under_all_names(model: str) -> None:
    checkpoint = Checkpoint.open(EMBEDDED / model)
    module = build_meta(EMBEDDED / model, torch.float32)
    weights = StoredWeights(module, checkpoint)
    assert weights.files == {entry.file for entry in checkpoint.tensors.values()}
    assert set(weights) == {name for name, _ in module.named_parameters(remove_duplicate=False)}
    assert len(weights) == len(list(weights))
    head = next(name for name in weights if name.startswith("lm_head"))
    embedding = next(name for name in weights if "embed" in name)
    is_tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert torch.equal(weights[head], weights[embedding]) is is_tied


REFUSALS = {
    "the device is the CPU already. HINT: offload=disk": ["backend=transformers", "offload=cpu"],
    "the device is the CPU already. HINT: offload=none": ["backend=vllm", "offload=cpu"],
    "fsdp offloads no weights to disk, but to cpu. HINT: offload=none": ["backend=fsdp", "offload=disk"],
    "fsdp on one device has no shards that it could offload. HINT: devices=2": [
        "backend=fsdp", "offload=cpu", "machine=1xa6000",
    ],
    "and these are in nf4. HINT: offload=none": ["backend=transformers", "offload=disk", "quantization=nf4"],
    "model.weights=random has none. HINT: offload=none": [
        "backend=transformers", "offload=disk", "model.weights=random",
    ],
    "offload=cpu keeps no layer whole. HINT: backend.resident_layers=0": [
        "backend=fsdp", "offload=cpu", "backend.resident_layers=auto",
    ],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSALS)
def test_what_cannot_be_offloaded_is_one_line(message: str) -> None:
    ended = command_line(*REFUSALS[message], "dry_run=true")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert message in ended.err


def test_a_plan_says_what_lies_where_and_how_fast_it_comes() -> None:
    asked = ("backend=transformers", "model=falcon_40b", "offload=cpu", "machine=1xa6000", "precision=bf16")
    ended = command_line(*asked, "dry_run=true", COLUMNS="200")
    assert ended.code == 0, ended.err
    assert "offloaded: 76.9 GiB of each device in main memory, read in each step" in ended.out.replace("76.93", "76.9")
    assert "bound by host" in ended.out
