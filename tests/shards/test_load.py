from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import zipfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor.debug
from running import ROOT, ranks_of, run
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, PretrainedConfig

from shards.checkpoint.checkpoint import Checkpoint
from shards.checkpoint.open_files import OpenFiles
from shards.errors import CheckpointError
from shards.load import load, ring, slices
from shards.load.blocks import local_block, local_bytes
from shards.load.load import load_weights
from shards.load.meta import build_meta
from shards.load.random_weights import fill_random
from shards.load.slices import PIECE_BYTES, Target, read_targets
from shards.load.torch_files import read_torch_file
from shards.parallel.fully_shard import decoder_layers, fully_shard_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=100, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    ),
    "falcon": lambda: FalconConfig(
        vocab_size=259, hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_kv_heads=2,
        new_decoder_architecture=True, bias=False, alibi=False, max_position_embeddings=128, tie_word_embeddings=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config()).save_pretrained(root / name, max_shard_size="200KB")
    return root


def greedy(model: nn.Module, steps: int = 12) -> list[int]:
    ids = torch.arange(1, 11).view(1, -1)
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    tokens: list[int] = ids[0].tolist()
    return tokens


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model


def same_state(ours: nn.Module, theirs: nn.Module) -> None:
    mine = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    wanted = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    assert list(mine) == list(wanted)
    for name, tensor in wanted.items():
        assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(mine[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_device_holds_what_transformers_loads(checkpoints: Path, name: str, dtype: torch.dtype) -> None:
    folder = checkpoints / name
    seen: list[tuple[int, int]] = []
    model = build_meta(folder, dtype)
    stats = load_weights(model, Checkpoint.open(folder), "cpu", lambda done, total: seen.append((done, total)))
    same_state(model, plain(folder, dtype))
    assert greedy(model) == greedy(plain(folder, dtype))
    assert stats.bytes_read == Checkpoint.open(folder).nbytes
    assert stats.local_bytes == local_bytes(model)
    assert seen[-1] == (stats.bytes_read, stats.bytes_read)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "falcon")


def one_file(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of a checkpoint in one pytorch_model.bin, with its state dict changed."""
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    torch.save(change(dict(plain(folder).state_dict())), target / "pytorch_model.bin")
    return target


def untied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "lm_head.weight": state["lm_head.weight"] + 1}


SPELLINGS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "as it is": lambda state: state,
    "without prefix": lambda state: {name.removeprefix("transformer."): value for name, value in state.items()},
    "head instead of embedding": lambda state: {k: v for k, v in state.items() if "word_embeddings" not in k},
    "tied weight stored twice": lambda state: {**state, "lm_head.weight": state["lm_head.weight"].clone()},
    "old rotary buffers": lambda state: {**state, "transformer.h.0.rotary_emb.inv_freq": torch.ones(4)},
    "parameters": lambda state: {name: nn.Parameter(value) for name, value in state.items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_bin_files_load_in_all_spellings(checkpoints: Path, tmp_path: Path, spelling: str) -> None:
    folder = one_file(checkpoints / "falcon", tmp_path / "bin", SPELLINGS[spelling])
    checkpoint = Checkpoint.open(folder)
    model = build_meta(folder, torch.float32)
    load_weights(model, checkpoint, "cpu")
    assert checkpoint.legacy
    assert not checkpoint.tensors
    same_state(model, plain(checkpoints / "falcon"))


def test_bin_files_with_an_index(checkpoints: Path, tmp_path: Path) -> None:
    state = dict(plain(checkpoints / "llama").state_dict())
    names = list(state)
    files = {"pytorch_model-1.bin": names[:9], "pytorch_model-2.bin": names[9:]}
    for file, part in files.items():
        torch.save({name: state[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = build_meta(checkpoints / "llama", torch.float32)
    load_weights(model, Checkpoint.open(tmp_path), "cpu")
    same_state(model, plain(checkpoints / "llama"))


def bad_bin(path: Path, content: Any, keep: float = 1.0) -> None:
    torch.save(content, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


@pytest.mark.parametrize(
    ("content", "keep", "fact"),
    [
        ({"a": torch.ones(99)}, 0.8, "is truncated, or was written by torch older than 1.6"),
        ({"a": torch.ones(4, 3).T}, 1.0, "is not a state dict of tensors (a is not stored row by row)"),
        ({"a": {"b": torch.ones(3)}}, 1.0, "is not a state dict of tensors (a is a dict)"),
        ({"a": Path("x")}, 1.0, "is not a state dict of tensors (Unsupported global: GLOBAL pathlib."),
        ({"a": nn.Linear(2, 2)}, 1.0, "is not a state dict of tensors (Unsupported global: GLOBAL torch.nn"),
    ],
)
def test_a_bad_bin_file_is_one_line_and_runs_no_code(tmp_path: Path, content: Any, keep: float, fact: str) -> None:
    bad_bin(tmp_path / "pytorch_model.bin", content, keep)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path, read_torch_file)
    assert fact in str(caught.value)
    assert "\n" not in str(caught.value)


PICKLES = {
    "a text of 2^40 bytes": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"x.",
    "a byte array of 2^40 bytes": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
    "a place far away in the memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "a stack that is empty": b"\x80\x02s.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "text": b"I" + b"9" * 5000 + b"\n.",
    "a list": b"\x80\x02].",
    "a name that is no text": b"\x80\x02}K\x01K\x01s.",
    "a call of the shell": b"cos\nsystem\n(S'touch pwned'\ntR.",
}


@pytest.mark.parametrize("kind", PICKLES)
def test_an_index_that_torch_did_not_write_is_one_line(tmp_path: Path, kind: str) -> None:
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("x/data.pkl", PICKLES[kind])
        archive.writestr("x/version", b"3\n")
    with pytest.raises(
        CheckpointError, match=r"(is not a state dict of tensors \(.+\)|holds no tensor)\. HINT: "
    ) as caught:
        Checkpoint.open(tmp_path, read_torch_file)
    assert "\n" not in str(caught.value)


def test_tied_weights_that_differ_are_an_error(checkpoints: Path, tmp_path: Path) -> None:
    folder = one_file(checkpoints / "falcon", tmp_path / "bin", untied)
    with pytest.raises(CheckpointError, match=r"config ties .* but .* holds other values for it"):
        load_weights(build_meta(folder, torch.float32), Checkpoint.open(folder), "cpu")


def test_of_a_tied_weight_that_is_stored_twice_one_piece_is_read_again(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "PIECE_BYTES", 4096)
    folder = one_file(checkpoints / "falcon", tmp_path / "bin", SPELLINGS["tied weight stored twice"])
    model = build_meta(folder, torch.float32)
    stats = load_weights(model, Checkpoint.open(folder), "cpu")
    row = model.get_input_embeddings().weight[0].nbytes
    assert stats.bytes_read == sum(parameter.nbytes for parameter in model.parameters()) + 4096 // row * row


def test_a_quantized_checkpoint_is_an_error(checkpoints: Path, tmp_path: Path) -> None:
    def quantize(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**state, "lm_head.weight": state["lm_head.weight"].to(torch.int8)}

    folder = one_file(checkpoints / "llama", tmp_path / "bin", quantize)
    with pytest.raises(CheckpointError, match=r"holds lm_head.weight as I8, the model has torch.float32"):
        load_weights(build_meta(folder, torch.float32), Checkpoint.open(folder), "cpu")


@pytest.mark.parametrize(
    ("source", "fact"),
    [("nowhere", "has no config"), ({"model_type": "no_such_model"}, "The configuration given has no config")],
)
def test_a_config_that_cannot_be_read_is_one_line(tmp_path: Path, source: Any, fact: str) -> None:
    with pytest.raises(CheckpointError, match=fact):
        build_meta(tmp_path / source if isinstance(source, str) else source, torch.float32)


def test_nothing_is_allocated_for_a_checkpoint_that_does_not_fit(checkpoints: Path) -> None:
    model = build_meta(checkpoints / "falcon", torch.float32)
    with pytest.raises(CheckpointError, match=r"26 missing \(transformer.h.0.*29 surplus \(model.embed_tokens.weight"):
        load_weights(model, Checkpoint.open(checkpoints / "llama"), "cpu")
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: os.truncate(path, path.stat().st_size - 8), "changed while it was in use"),
        (lambda path: os.utime(path, ns=(0, 0)), "changed while it was in use"),
        (lambda path: shutil.copy(path, f"{path}.new") and os.replace(f"{path}.new", path), "changed while it"),
    ],
    ids=["gone", "truncated", "written to", "replaced"],
)
def test_files_that_change_under_us_fail_cleanly(
    checkpoints: Path, tmp_path: Path, spoil: Callable[[Path], None], fact: str
) -> None:
    folder = Path(shutil.copytree(checkpoints / "llama", tmp_path / "copy"))
    checkpoint = Checkpoint.open(folder)
    spoil(max(checkpoint.stamps))
    threads = threading.active_count()
    with pytest.raises(CheckpointError, match=fact):
        load_weights(build_meta(folder, torch.float32), checkpoint, "cpu")
    assert threading.active_count() == threads


def test_a_file_that_changes_while_it_is_read_is_noticed(checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "llama", tmp_path / "copy"))
    checkpoint = Checkpoint.open(folder)

    def touch(done: int, total: int) -> None:
        if done == total:
            os.utime(max(checkpoint.stamps), ns=(0, 0))

    with pytest.raises(CheckpointError, match="changed while it was in use"):
        load_weights(build_meta(folder, torch.float32), checkpoint, "cpu", touch)


@pytest.fixture
def as_rank() -> Iterator[Callable[[int, int], None]]:
    """Yields a function that makes this process rank r of n with a fake process group, which sends nothing."""

    def enter(rank: int, world_size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        for clear in ("_clear_sharding_prop_cache", "_clear_python_sharding_prop_cache"):
            getattr(torch.distributed.tensor.debug, clear, lambda: None)()  # the caches keep the mesh of another rank
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())

    yield enter
    if dist.is_initialized():
        dist.destroy_process_group()


class Odd(nn.Module):
    """Tensors of one to three dimensions, some with fewer rows than there are ranks."""

    base_model_prefix = ""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"two": (2, 8), "flat": (7,), "wide": (12, 20), "deep": (4, 6, 8), "one": (1, 4)}.items():
            setattr(self, name, nn.Parameter(torch.arange(float(torch.Size(shape).numel())).view(shape) + len(name)))


def saved_odd(folder: Path) -> nn.Module:
    from safetensors.torch import save_file

    model = Odd().requires_grad_(False)
    save_file(dict(model.named_parameters()), folder / "model.safetensors")
    return model


PLACEMENTS: list[tuple[tuple[int, ...], dict[str, Sequence[Any]]]] = [
    ((3,), {}),
    ((2,), {"wide": [Shard(1)], "deep": [Shard(2)], "two": [Replicate()]}),
    ((2, 2), {"wide": [Shard(0), Shard(1)], "deep": [Shard(1), Shard(2)], "flat": [Replicate(), Shard(0)]}),
    ((2, 2), {"wide": [Shard(1), Shard(1)], "deep": [Shard(0), Shard(0)], "two": [Replicate(), Shard(1)]}),
]


@pytest.mark.parametrize("piece_bytes", [1 << 20, 100])
@pytest.mark.parametrize(("mesh_shape", "placements"), PLACEMENTS)
def test_each_rank_gets_its_slice_of_each_placement(
    tmp_path: Path,
    as_rank: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    mesh_shape: tuple[int, ...],
    placements: dict[str, Sequence[Any]],
    piece_bytes: int,
) -> None:
    monkeypatch.setattr(slices, "PIECE_BYTES", piece_bytes)
    whole = dict(saved_odd(tmp_path).named_parameters())
    world_size = torch.Size(mesh_shape).numel()
    for rank in range(world_size):
        as_rank(rank, world_size)
        mesh = init_device_mesh("cpu", mesh_shape)
        with torch.device("meta"):
            model = Odd().requires_grad_(False)
        for name, parameter in list(model.named_parameters()):
            placed = placements.get(name, [Shard(0)] * len(mesh_shape))
            setattr(model, name, nn.Parameter(distribute_tensor(parameter, mesh, placed), requires_grad=False))
        load_weights(model, Checkpoint.open(tmp_path), "cpu")
        for name, parameter in model.named_parameters():
            placed = placements.get(name, [Shard(0)] * len(mesh_shape))
            expected = distribute_tensor(whole[name], mesh, placed, src_data_rank=None).to_local()
            assert torch.equal(parameter.to_local(), expected), (rank, name)


def test_rows_and_columns_by_name_with_a_cast(tmp_path: Path) -> None:
    whole = dict(saved_odd(tmp_path).named_parameters())
    wanted = [("wide", (3, 5), (6, 11)), ("deep", (1, 2, 3), (2, 3, 4)), ("flat", (0,), (7,)), ("two", (2, 0), (0, 8))]
    checkpoint = Checkpoint.open(tmp_path)
    targets = [Target(checkpoint.tensors[name], start, torch.empty(shape).double()) for name, start, shape in wanted]
    with OpenFiles(checkpoint) as files:
        read_targets(files, targets)
    for target, (name, start, shape) in zip(targets, wanted, strict=True):
        index = tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
        assert torch.equal(target.out, whole[name][index].double()), name


class Wide(nn.Module):
    """One matrix of 32 MiB in float32."""

    base_model_prefix = ""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4096, 2048), requires_grad=False)


class Recorded:
    """A fake of torch.cuda.Event, for machines without GPUs."""

    def record(self, stream: object) -> None: ...
    def synchronize(self) -> None: ...


def test_a_card_is_sent_whole_pieces_of_the_buffers_and_cuts_them_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = torch.ones(4000, 1024)
    save_file({"wide": wide}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    sent: list[torch.Tensor] = []

    def send(stored: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(stored)
        return stored.to(device)

    monkeypatch.setattr(ring, "send", send)
    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    out = torch.empty(4000, 512, device="meta")  # stands for a GPU: a device other than the CPU on every machine
    with OpenFiles(checkpoint) as files:
        assert read_targets(files, [Target(checkpoint.tensors["wide"], (0, 512), out)]) == wide.nbytes
    assert sum(piece.nbytes for piece in sent) == wide.nbytes
    for piece in sent:
        assert piece.is_contiguous()
        assert piece.untyped_storage().nbytes() == PIECE_BYTES  # a view of the buffer, which would be pinned on CUDA


def saved_wide(path: Path, padding: int) -> torch.Tensor:
    """Write `Wide` to a safetensors file whose header has `padding` extra bytes; returns the values."""
    values = torch.arange(4096.0 * 2048).view(4096, 2048)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [4096, 2048], "data_offsets": [0, values.nbytes]}})
    text = header.encode() + b" " * (-len(header) % 8 + padding)
    path.write_bytes(len(text).to_bytes(8, "little") + text + values.numpy().tobytes())
    return values


@pytest.mark.slow
def test_memory_is_taken_only_for_what_the_file_has_otherwise(tmp_path: Path) -> None:
    for padding in (0, 1):
        (tmp_path / str(padding)).mkdir()
        saved_wide(tmp_path / str(padding) / "model.safetensors", padding)
    words = [f"{tmp_path}/{padding}:{dtype}" for dtype in ("float32", "float16") for padding in (0, 1)]
    ended = run(
        [sys.executable, str(ROOT / "tests" / "programs" / "load_memory_program.py"), *words], PYTHONPATH=str(ROOT)
    )
    assert ended.code == 0, ended.err
    as_stored, not_aligned, cast, cast_not_aligned = json.loads(ended.out)
    buffers, other = slices.RING * slices.PIECE_BYTES, 4 << 20
    assert -(1 << 20) <= as_stored <= other
    assert 31 << 20 <= not_aligned <= (32 << 20) + other
    assert 15 << 20 <= cast <= (16 << 20) + other
    assert 15 << 20 <= cast_not_aligned <= (16 << 20) + buffers + other


def test_a_mapped_weight_is_not_written_back_and_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values = saved_wide(path, 0)
    stored = path.read_bytes()
    with torch.device("meta"):
        model = Wide()
    load_weights(model, Checkpoint.open(tmp_path), "cpu")
    with torch.no_grad():
        model.weight[0].zero_()
    assert path.read_bytes() == stored
    path.unlink()
    assert torch.equal(model.weight[1:], values[1:])
    assert not model.weight[0].any()


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_random_values_do_not_depend_on_the_sharding(
    as_rank: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch, name: str, world_size: int
) -> None:
    monkeypatch.setattr("shards.load.random_weights.BLOCK_ELEMENTS", 1000)
    alone = build_meta(CONFIGS[name](), torch.float32)
    fill_random(alone, 7, "cpu")
    whole = dict(alone.named_parameters())
    for rank in range(world_size):
        as_rank(rank, world_size)
        model = fully_shard_model(build_meta(CONFIGS[name](), torch.float32), init_device_mesh("cpu", (world_size,)))
        fill_random(model, 7, "cpu")
        for key, parameter in model.named_parameters():
            (first, *_), local = local_block(parameter)
            assert torch.equal(local, whole[key][first : first + local.shape[0]]), (rank, key)


def test_random_columns_are_those_of_the_whole(as_rank: Callable[[int, int], None]) -> None:
    model = build_meta(CONFIGS["llama"](), torch.bfloat16)
    fill_random(model, 0, "cpu")
    name = "model.layers.0.self_attn.o_proj"
    for rank in range(2):
        as_rank(rank, 2)
        cut = build_meta(CONFIGS["llama"](), torch.bfloat16)
        mesh = init_device_mesh("cpu", (2,))
        module = cut.get_submodule(name)
        module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(1)]), requires_grad=False)
        fill_random(cut, 0, "cpu")
        columns = model.get_submodule(name).weight[:, 32 * rank : 32 * rank + 32]
        assert torch.equal(module.weight.to_local(), columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_random_weights_are_sane(name: str, dtype: torch.dtype) -> None:
    model = build_meta(CONFIGS[name](), dtype)
    stats = fill_random(model, 0, "cpu")
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 11).view(1, -1)).logits.float()
    assert stats.bytes_read == 0
    assert torch.isfinite(logits).all()
    assert len(logits[0, -1].unique()) > 100
    other = build_meta(CONFIGS[name](), dtype)
    fill_random(other, 1, "cpu")
    assert not torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert 0.019 < float(model.get_input_embeddings().weight.float().std()) < 0.021


@pytest.mark.parametrize(("name", "layers"), [("llama", "LlamaDecoderLayer"), ("falcon", "FalconDecoderLayer")])
def test_decoder_layers_are_found(name: str, layers: str) -> None:
    found = decoder_layers(build_meta(CONFIGS[name](), torch.float32))
    assert [type(layer).__name__ for layer in found] == [layers] * 3


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_fabric_ranks_hold_their_shards_and_answer_as_one_model(checkpoints: Path, world_size: int) -> None:
    reports = run_ranks(world_size, checkpoints)
    for report in reports:
        for name in CONFIGS:
            expected = {
                "tokens": greedy(plain(checkpoints / name)),
                "gathers": 12 * 3 + 1 + 1,  # all layers in each step, the root once, the first layer for the next step
                "notes_after_reset": 0,
                "whole_on_cpu": [],
                "tied": name == "falcon",
            }
            assert {key: report[name][key] for key in expected} == expected
            assert report[name]["notes"] > 0
            assert report[name]["share"] <= 1.05 / world_size
            assert report[name]["bytes_read"] <= 1.05 * report[name]["total"] / world_size


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_with_whole_layers_answer_as_one_model_and_hold_what_is_planned(
    checkpoints: Path, world_size: int
) -> None:
    expected = {name: greedy(plain(checkpoints / name)) for name in CONFIGS}
    for report in run_ranks(world_size, checkpoints):
        for name in CONFIGS:
            assert report[name]["offloaded"] == expected[name]
            for found in report[name]["resident"]:
                assert found["tokens"] == expected[name]
                assert found["held"] == found["planned"]


@cache
def run_ranks(world_size: int, checkpoints: Path) -> list[dict[str, Any]]:
    ended = ranks_of("fsdp_rank.py", world_size, str(checkpoints))
    assert ended.code == 0, ended.err[-4000:]
    return [json.loads((checkpoints / f"rank_{rank}.json").read_text()) for rank in range(world_size)]
