"""Tests that need CUDA GPUs: the branches of the code that run only there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from running import ROOT, launcher
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from launcher.backends.base import Prompt
from launcher.backends.memory import PhasePeaks
from launcher.backends.sampling import Sampler
from launcher.backends.slots.decoder import SlotDecoder
from launcher.backends.slots.static import Graphs
from launcher.config.engines import engines
from launcher.config.parts.formats import OWN_QUANTIZATIONS
from launcher.config.schema import SamplingConfig
from launcher.models import EMBEDDED
from launcher.rank.failures import explain
from shards.checkpoint.checkpoint import Checkpoint
from shards.checkpoint.open_files import OpenFiles
from shards.errors import PlanError
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.load.quantized.quantizers import make_quantizer
from shards.load.random_weights import fill_random
from shards.load.slices import Target, read_targets
from shards.machine.cards import cuda_devices
from shards.machine.hardware import MIB, Device
from shards.machine.world import World
from shards.parallel.families import attend, keep_kv_heads_only
from shards.parallel.products import quantize_layers


def cards() -> tuple[Device, ...]:
    """The GPUs that a run would use; none if torch is a CPU build, or if the GPUs are partitioned by MIG."""
    try:
        return cuda_devices(os.environ) if torch.version.cuda else ()
    except PlanError:
        return ()


CARDS = cards()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CARDS, reason="no CUDA device")]
several = pytest.mark.skipif(len(CARDS) < 2, reason="fewer than two CUDA devices")
ENGINES = [name for name, kind in engines().items() if kind.needs_weights]
SHORT = ("measure.repeats=1", "measure.warmup=0", "sampling.max_new_tokens=24", "precision=fp32")
PROMPTS = ("prompts=file", f"prompts.path={ROOT}/tests/ragged_prompts.txt")
NEAR = 0.02  # closer logits may change order: kernels sum in different orders, some in TF32


@cache
def ran(engine: str, model: str, devices: int, accelerator: str, *more: str) -> tuple[dict[str, Any], list[Any]]:
    """The record and completions of a separate run."""
    asked = [f"backend={engine}", f"model={model}", f"devices={devices}", f"accelerator={accelerator}"]
    visible = ",".join(card.uuid or str(place) for place, card in enumerate(CARDS))
    with TemporaryDirectory() as out:
        ended = launcher(
            *asked, *SHORT, *PROMPTS, *more, f"output_dir={out}", timeout=280, CUDA_VISIBLE_DEVICES=visible
        )
        assert ended.code == 0, ended.err
        [run_dir] = Path(out).iterdir()
        lines = (run_dir / "completions.jsonl").read_text().splitlines()
        return json.loads((run_dir / "record.json").read_text()), [json.loads(line) for line in lines]


def has(engine: str) -> bool:
    """True if the engine is installed; for vLLM, not its build for CPUs, which has another name."""
    if any(importlib.util.find_spec(module) is None for module in engines()[engine].modules()):
        return False
    return engine != "vllm" or any(item.name == "vllm" for item in importlib.metadata.distributions())


def same_tokens(found: list[Any], expected: list[Any]) -> None:
    """Check that each completion is that of the reference, up to the first token whose top two logits are closer than
    NEAR in the reference."""
    assert len(found) == len(expected) == 20
    for ours, theirs in zip(found, expected, strict=True):
        sure = next((place for place, gap in enumerate(theirs["top2_gaps"]) if gap < NEAR), len(theirs["token_ids"]))
        assert ours["token_ids"][:sure] == theirs["token_ids"][:sure], theirs["index"]
    assert sum(len(item["token_ids"]) for item in found) > 100


def check_phases(engine: str, device: dict[str, Any]) -> None:
    phases = {phase["phase"]: phase for phase in device["phases"]}
    if engine == "vllm":
        assert (phases, device["reasons"]["phases"]) == ({}, "the engine mixes the phases in its steps")
        return
    assert list(phases) == ["load", "prefill", "decode"]
    assert phases["load"]["peak_allocated_bytes"] >= device["parameter_bytes"]
    assert device["peak_allocated_bytes"] == max(phase["peak_allocated_bytes"] for phase in phases.values())
    assert 0 <= device["step_growth_bytes"] <= device["peak_reserved_bytes"]
    assert 0 <= device["fragmented_bytes"] <= device["peak_reserved_bytes"]


def check(engine: str, model: str, devices: int) -> None:
    if not has(engine):
        pytest.skip(f"backend={engine} is not installed for CUDA")
    record, completions = ran(engine, model, devices, "cuda")
    same_tokens(completions, ran("transformers", model, 1, "cpu")[1])
    assert record["config"]["accelerator"] == "cuda"
    planned = [device["parameter_bytes"] for device in record["plan"]["devices"]]
    assert [device["device_uuid"] for device in record["devices"]] == [card.uuid for card in CARDS[:devices]]
    if engine == "transformers":  # accelerate decides how to spread the layers
        assert sum(device["parameter_bytes"] for device in record["devices"]) == sum(planned)
    else:
        assert [device["parameter_bytes"] for device in record["devices"]] == planned
    for device in record["devices"]:
        assert device["parameter_bytes"] <= device["peak_allocated_bytes"] <= device["peak_reserved_bytes"]
        check_phases(engine, device)
        if device["nvml_used_bytes"] is None:  # in a container, whose process ids the driver does not know
            assert device["reasons"]["nvml_used_bytes"].startswith("NVML ")
        else:
            assert device["nvml_used_bytes"] > device["parameter_bytes"]
    [repeat] = record["ranks"][0]["repeats"]
    assert repeat["wall_s"] > 0
    assert min(repeat["ttft_s"] + repeat["itl_s"]) >= 0


@pytest.mark.parametrize("model", ["tiny_falcon", "tiny_llama"])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_on_a_card_gives_the_tokens_of_the_cpu(engine: str, model: str) -> None:
    check(engine, model, 1)


@several
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_on_two_cards_gives_the_tokens_of_the_cpu(engine: str) -> None:
    check(engine, "tiny_falcon", 2)


@several
@pytest.mark.parametrize("way", ["sequential", "balanced_low_0"])
def test_layers_on_whichever_card_give_the_tokens_of_the_cpu(way: str) -> None:
    found = ran("transformers", "tiny_falcon", 2, "cuda", f"backend.device_map={way}")[1]
    same_tokens(found, ran("transformers", "tiny_falcon", 1, "cpu")[1])


@pytest.mark.parametrize(("engine", "place"), [("transformers", "cpu"), ("transformers", "disk"), ("vllm", "cpu")])
def test_offloaded_weights_give_the_tokens_of_the_cpu(engine: str, place: str) -> None:
    check_offload(engine, 1, place)


@several
def test_offloaded_shards_give_the_tokens_of_the_cpu() -> None:
    check_offload("fsdp", 2, "cpu")


def check_offload(engine: str, devices: int, place: str) -> None:
    """Check that the bytes on the GPUs and off them are as planned, and that the tokens are right."""
    if not has(engine):
        pytest.skip(f"backend={engine} is not installed for CUDA")
    record, completions = ran(engine, "tiny_falcon", devices, "cuda", f"offload={place}")
    same_tokens(completions, ran("transformers", "tiny_falcon", 1, "cpu")[1])
    for device, planned in zip(record["devices"], record["plan"]["devices"], strict=True):
        assert device["parameter_bytes"] == planned["parameter_bytes"]
        assert device["offloaded_bytes"] == planned["offloaded_bytes"] > 0


@several
def test_random_weights_on_cards_do_not_depend_on_the_sharding() -> None:
    alone, shared = (ran("fsdp", "tiny_falcon", size, "cuda", "model.weights=random")[1] for size in (1, 2))
    same_tokens(shared, alone)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """A checkpoint with a matrix of more pieces than the ring has buffers, a small matrix and a scalar."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    tensors = {"wide": torch.randn(40_000, 1001), "half": torch.randn(777, 130).bfloat16(), "one": torch.tensor(2.5)}
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "start", "shape"),
    [
        ("wide", (0, 0), (40_000, 1001)),
        ("wide", (12_345, 0), (20_000, 1001)),
        ("wide", (3, 500), (39_000, 501)),
        ("half", (0, 0), (777, 130)),
        ("half", (5, 7), (700, 99)),
        ("one", (), ()),
    ],
)
def test_blocks_through_pinned_memory_are_those_of_the_cpu(
    checkpoint: Checkpoint, name: str, start: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    found = {place: torch.full(shape, torch.nan, dtype=dtype, device=place) for place in ("cpu", "cuda:0")}
    for out in found.values():
        with OpenFiles(checkpoint) as files:
            read_targets(files, [Target(checkpoint.tensors[name], start, out)])
    assert torch.equal(found["cuda:0"].cpu(), found["cpu"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_on_a_card_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    folder = EMBEDDED / "tiny_falcon"
    found = []
    for place in ("cpu", "cuda:0"):
        model = build_meta(folder, dtype)
        load_weights(model, Checkpoint.open(folder), place)
        assert {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())} == {place}
        found.append({name: tensor.cpu() for name, tensor in (*model.named_parameters(), *model.named_buffers())})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_random_weights_on_a_card_are_sane_and_the_same_again() -> None:
    made = []
    for _ in range(2):
        model = build_meta(EMBEDDED / "tiny_falcon", torch.float32)
        fill_random(model, 3, torch.device("cuda", 0))
        made.append(model.get_input_embeddings().weight)
    assert torch.equal(*made)
    assert made[0].device == torch.device("cuda", 0)
    assert abs(made[0].std().item() - 0.02) < 0.001


@torch.inference_mode()
@pytest.mark.parametrize("quantization", OWN_QUANTIZATIONS)
def test_a_card_packs_and_multiplies_as_the_processor_does(quantization: str) -> None:
    """For both models in bf16: the mean difference of the logits is far below the quantization step."""
    for name in ("tiny_llama", "tiny_falcon"):
        logits = []
        for place in ("cpu", "cuda:0"):
            model = build_meta(EMBEDDED / name, torch.bfloat16)
            quantize_layers(model, make_quantizer(quantization, torch.bfloat16))
            load_weights(model, Checkpoint.open(EMBEDDED / name), place)
            ids = torch.tensor([[5, 77, 301, 12, 9, 44, 130, 8]], device=place)
            logits.append(model(ids).logits.float().cpu())
        assert (logits[0] - logits[1]).abs().mean() < 0.1, name


def attention(length: int, keys: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query of 8 heads, key and value of 2 heads, on the CPU, and a causal mask in which one row is left-padded."""
    torch.manual_seed(0)
    query = torch.randn(3, length, 8, 64).transpose(1, 2).to(dtype)
    key, value = (torch.randn(3, 2, keys, 64).to(dtype) for _ in range(2))
    mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length).repeat(3, 1, 1, 1)
    mask[0, :, :, :2] = False
    mask[0, :, :2, 0] = True  # padding tokens need a key to attend to
    return query, key, value, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (1, 77), (1, 128), (77, 77), (128, 128)])
def test_falcons_attention_needs_no_kernel_that_keeps_scores(length: int, keys: int, dtype: torch.dtype) -> None:
    asked = attention(length, keys, dtype)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        found = attend(*(tensor.cuda() for tensor in asked), group=4)
    exact = attend(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in asked), group=4)
    width = 1e-4 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(found.cpu().float(), exact, atol=width, rtol=width)


@pytest.mark.parametrize("model", ["tiny_falcon", "tiny_llama"])
def test_prompts_of_one_length_are_answered_with_flash_attention_alone(model: str) -> None:
    """Flash attention takes no mask, and torch must not have to repeat the keys of a group for it."""
    made = build_meta(EMBEDDED / model, torch.bfloat16)
    keep_kv_heads_only(made)
    card = torch.device("cuda", 0)
    load_weights(made, Checkpoint.open(EMBEDDED / model), card)
    prompts = [Prompt(index, "", (5, 6, 7, 8)) for index in range(3)]
    decoder = SlotDecoder(made, (), card, World(), 0, PhasePeaks(()), 3, 40, prefill_tokens=99, splits_prompts=False)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = decoder.generate(prompts, SamplingConfig(max_new_tokens=8, ignore_eos=True), lambda *_: None)
    assert [len(item.token_ids) for item in found.completions] == [8, 8, 8]


@pytest.mark.parametrize("model", ["tiny_falcon", "tiny_llama"])
@pytest.mark.parametrize("way", ["cudagraph", "inductor"])
def test_steps_that_are_made_ahead_give_the_tokens_of_others(way: str, model: str) -> None:
    plain = ran("transformers", model, 1, "cuda", "measure.compile=none")
    record, completions = ran("transformers", model, 1, "cuda", f"measure.compile={way}")
    same_tokens(completions, plain[1])
    assert (record["compilation"]["way"], plain[0]["compilation"]["way"]) == (way, "none")
    assert record["compilation"]["seconds"] > 0
    assert ran("transformers", model, 1, "cuda")[0]["compilation"]["way"] == "cudagraph", "what auto is on a card"


@several
@pytest.mark.parametrize("model", ["tiny_falcon", "tiny_llama"])
def test_graphs_of_several_cards_give_the_tokens_of_others(model: str) -> None:
    record, completions = ran("tensor_parallel", model, 2, "cuda", "measure.compile=cudagraph")
    same_tokens(completions, ran("tensor_parallel", model, 2, "cuda", "measure.compile=none")[1])
    assert record["compilation"]["way"] == "cudagraph"


def test_a_replay_launches_the_kernels_of_a_step_at_once() -> None:
    """More prompts than slots, of different lengths, some of which end early; then the kernels of one step are
    counted."""
    model = build_meta(EMBEDDED / "tiny_llama", torch.float32).to_empty(device="cuda").eval()
    fill_random(model, 0, torch.device("cuda", 0))
    cuda = torch.device("cuda", 0)
    engine = SlotDecoder(model, (), cuda, World(), 0, PhasePeaks(()), 4, 300, 2048, splits_prompts=False)
    prompts = [Prompt(index, "", tuple(range(5, 5 + length))) for index, length in enumerate((7, 200, 3, 90, 12, 5))]
    sampling = SamplingConfig(max_new_tokens=40, ignore_eos=True)

    def answers() -> list[tuple[int, ...]]:
        return [item.token_ids for item in engine.generate(prompts, sampling, lambda *_: None).completions]

    expected = answers()
    assert engine.slots is not None
    with torch.inference_mode():
        engine.slots.static = graphs = Graphs(engine.slots)
    assert sorted(graphs.graphs) == [(rows, reach) for rows in (1, 2, 4) for reach in (128, 256, 300)]
    assert answers() == expected
    with torch.inference_mode(), torch.profiler.profile() as profile:
        graphs(4, 200)
        torch.cuda.synchronize()
    launches = [event.name for event in profile.events() if event.name.startswith("cudaLaunchKernel")]
    assert [event.name for event in profile.events()].count("cudaGraphLaunch") == 1
    assert len(launches) < 10, "where the tokens go, and the mask"


def test_a_prompt_in_falcons_attention_keeps_no_scores() -> None:
    query = torch.randn(1, 64, 2048, 64, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(1, 4, 2048, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = torch.ones(1, 1, 2048, 2048, dtype=torch.bool, device="cuda").tril()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(query, key, value, mask, group=16)
    again = 2 * query.nbytes  # keys and values repeated for all heads
    assert torch.cuda.max_memory_allocated() - before < again + query.nbytes + 64 * MIB  # scores: 1024 MiB


def test_a_draw_on_a_card_waits_for_nothing() -> None:
    logits = torch.randn(3, 500, device="cuda")
    sampler = Sampler(SamplingConfig(temperature=0.7, top_k=50, top_p=0.9), 3, torch.device("cuda", 0))
    generators = [sampler.generator(Prompt(index, "", (1,))) for index in range(3)]
    sampler.choose(logits, generators)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens, _ = sampler.choose(logits, generators)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.max() < 500


@pytest.mark.parametrize("is_captured", [False, True])
def test_a_call_waits_for_nothing_but_its_tokens(is_captured: bool) -> None:
    """Even if prompts take slots between the steps; the tokens are those of an unchecked call."""
    model = build_meta(EMBEDDED / "tiny_llama", torch.float32)
    card = torch.device("cuda", 0)
    load_weights(model, Checkpoint.open(EMBEDDED / "tiny_llama"), card)
    engine = SlotDecoder(model, (0,), card, World(), 0, PhasePeaks(()), 2, 60, prefill_tokens=4, splits_prompts=False)
    prompts = [Prompt(index, "", tuple(range(5, 5 + length))) for index, length in enumerate((7, 3, 9, 3, 12))]

    def answers() -> list[tuple[int, ...]]:
        made = engine.generate(prompts, SamplingConfig(max_new_tokens=20), lambda *_: None)
        return [item.token_ids for item in made.completions]

    expected = answers()
    assert engine.slots is not None
    if is_captured:
        with torch.inference_mode():
            engine.slots.static = Graphs(engine.slots)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert answers() == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_card_that_is_full_says_what_it_lacks() -> None:
    with pytest.raises(torch.OutOfMemoryError) as shortage:
        torch.empty(2**50, dtype=torch.uint8, device="cuda:0")
    status, said = explain(shortage.value)
    assert (status, said.device, said.asked_bytes) == ("oom", "cuda:0", 2**50)
    assert 0 < said.free_bytes <= (CARDS[0].capacity_bytes or 2**60)
