"""A model on the meta device and a checkpoint -> every rank holds its own shards, and nothing else ever."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from shards.checkpoint import OpenFiles
from shards.conversion import MergedEntry, converted, note_conversions, part_targets
from shards.errors import CheckpointError
from shards.slices import TORCH_DTYPES, Target, map_target, read_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from shards.checkpoint import Checkpoint
    from shards.slices import Progress
    from shards.tensor_files import TensorEntry

DERIVED = r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.masked_bias$"  # in old checkpoints; computed today


@dataclass(frozen=True, slots=True)
class Block:
    """The part of the uncut model that a plain tensor holds: of parameter `name`, of `shape`, the block at `start`."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoadStats:
    """`bytes_read` from disk-backed files by this rank, `local_bytes` that its parameters and buffers take."""

    bytes_read: int
    local_bytes: int
    seconds: float


def build_meta(
    source: Path | str | Mapping[str, Any] | PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False
) -> nn.Module:
    """The causal language model of a folder with a config.json, or of a config, on the meta device, for inference."""
    config = _config(source, trust_remote_code)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    note_conversions(model)
    return model.eval().requires_grad_(False)


def _config(source: Path | str | Mapping[str, Any] | PretrainedConfig, trust_remote_code: bool) -> PretrainedConfig:
    if isinstance(source, PretrainedConfig):
        return source
    try:
        if isinstance(source, (str, Path)):
            return AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code, local_files_only=True)
        return AutoConfig.for_model(**source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = source if isinstance(source, (str, Path)) else "The configuration given"
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{what} brings code of its own, which is not run unasked.",
                "model.trust_remote_code=true, if you trust it",
            ) from None
        raise CheckpointError(
            f"{what} has no config that transformers can read: {error}", "it must hold the config.json of a causal LM"
        ) from None


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    device: torch.device | str,
    progress: Progress = lambda done, total: None,
) -> LoadStats:
    """Fill every parameter and buffer of `model`, plain or DTensor, with this rank's part of `checkpoint`.

    Tensors on meta come to `device`; tied ones stay tied; buffers that no checkpoint holds are computed. Only the
    bytes of the local shards are read. On a CPU, a local part whose bytes lie in the file as the model needs them is
    the file itself, mapped. Names and shapes are checked before anything is allocated or read.
    """
    began = time.perf_counter()
    found = _match(model, checkpoint)
    materialize(model, device)
    tensors = dict(stored_tensors(model))
    with OpenFiles(checkpoint) as files:
        targets = [target for name, tensor in tensors.items() for target in _targets(files, found[name][0], tensor)]
        bytes_read = read_targets(files, targets, progress)
        for name, tensor in tensors.items():
            _check_copies(files, found[name], tensor)
    return LoadStats(bytes_read, local_bytes(model), time.perf_counter() - began)


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give tensors on meta memory on `device`; computed buffers get their values, all others have none yet."""
    made: dict[int, tuple[torch.Tensor, nn.Parameter]] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None or not old.is_meta:
                continue
            if id(old) not in made:
                made[id(old)] = old, nn.Parameter(torch.empty_like(old, device=device), requires_grad=False)
            setattr(module, name, made[id(old)][1])
        _materialize_buffers(model, module, torch.device(device))
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"still on meta: {left}"


def local_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that this rank holds; tied ones count once."""
    return sum(_local(tensor).nbytes for tensor in (*model.parameters(), *model.buffers()))


def mark_block(tensor: torch.Tensor, block: Block) -> None:
    """Note on a plain tensor in memory which part of the model it is, for engines that cut a model their own way."""
    tensor.block = block  # type: ignore[attr-defined]


def whole(name: str, tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """Name and shape of a tensor in the uncut model."""
    block: Block | None = getattr(tensor, "block", None)
    return (name, tuple(tensor.shape)) if block is None else (block.name, block.shape)


def local_block(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.Tensor]:
    """Where in the whole tensor the local part begins, and the local part itself."""
    if not isinstance(tensor, DTensor):
        block: Block | None = getattr(tensor, "block", None)
        return (0,) * tensor.dim() if block is None else block.start, tensor.detach()
    local = _local(tensor)
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape) == tuple(local.shape), f"local shape {tuple(local.shape)}, by its placement {tuple(shape)}"
    return tuple(start), local


def _local(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return local.detach()


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by name, each once."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer


def _match(model: nn.Module, checkpoint: Checkpoint) -> dict[str, tuple[TensorEntry, ...]]:
    tensors = dict(stored_tensors(model))
    first = {id(tensor): name for name, tensor in tensors.items()}
    tied: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for source in {first[id(parameter)], whole(name, parameter)[0]} - {name}:
            tied.setdefault(source, []).append(name)
            tied.setdefault(name, []).append(source)
    shapes = {name: whole(name, tensor)[1] for name, tensor in tensors.items()}
    checkpoint = converted(model, checkpoint, {*shapes, *tied})
    found = checkpoint.verify(shapes, tied, getattr(model, "base_model_prefix", ""), _ignored(model))
    for name, (entry, *_) in found.items():
        for stored in [part.entry for part in entry.parts] if isinstance(entry, MergedEntry) else [entry]:
            _check_dtype(stored, tensors[name].dtype)
    return found


def _ignored(model: nn.Module) -> Callable[[str], bool]:
    patterns = [DERIVED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def _check_dtype(entry: TensorEntry, dtype: torch.dtype) -> None:
    stored = TORCH_DTYPES[entry.dtype]
    plain = stored.is_floating_point and stored.itemsize > 1
    if stored != dtype and not (plain and dtype.is_floating_point):
        raise CheckpointError(
            f"{entry.file} holds {entry.name} as {entry.dtype}, the model has {dtype}: a quantized checkpoint?",
            "use the unquantized checkpoint, or an engine that reads this quantization (backend=vllm)",
        )


def _targets(files: OpenFiles, entry: TensorEntry, tensor: torch.Tensor) -> list[Target]:
    """What is to be read for a tensor, which is put into the mapped file where that serves it."""
    start, local = local_block(tensor)
    if isinstance(entry, MergedEntry):
        return list(part_targets(entry, start, local))
    target = Target(entry, start, local)
    mapped = map_target(files, target)
    if mapped is None:
        return [target]
    if isinstance(tensor, DTensor):
        tensor._local_tensor = mapped.out
    else:
        tensor.data = mapped.out
    return [mapped]


def _check_copies(files: OpenFiles, entries: tuple[TensorEntry, ...], tensor: torch.Tensor) -> None:
    """A tied tensor that is stored under two names has the same values under both."""
    start, local = local_block(tensor)
    for other in entries[1:]:
        if (other.file, other.offset) == (entries[0].file, entries[0].offset):
            continue
        copy = torch.empty_like(local)
        read_targets(files, [Target(other, start, copy)])
        if not torch.equal(copy, local):
            raise CheckpointError(
                f"The config ties {entries[0].name} to {other.name}, but {other.file} holds other values for it.",
                "set tie_word_embeddings to false in config.json",
            )


def _materialize_buffers(model: nn.Module, module: nn.Module, device: torch.device) -> None:
    computed = [name for name in module._non_persistent_buffers_set if _on_meta(module._buffers.get(name))]
    for name, buffer in module._buffers.items():
        if _on_meta(buffer) and name not in computed:
            module._buffers[name] = torch.empty_like(buffer, device=device)
    if computed:
        values = _rebuilt(model, module) or _initialised(model, module, computed)
        for name in computed:
            module._buffers[name] = values[name].to(device)


def _on_meta(buffer: torch.Tensor | None) -> bool:
    return buffer is not None and buffer.is_meta


def _rebuilt(model: nn.Module, module: nn.Module) -> dict[str, torch.Tensor] | None:
    """The buffers of a new module of the same class and config, where that is all the module is made of (rotary)."""
    config = getattr(module, "config", None)
    if config is None or any(True for _ in module.parameters()):
        return None
    with _default_dtype(getattr(model, "dtype", torch.float32)), torch.device("cpu"):
        fresh = type(module)(config=config)
    return dict(fresh._buffers)


def _initialised(model: nn.Module, module: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """The buffers as the model's own initialisation makes them; one that it leaves alone is an error."""
    for name in names:
        buffer = module._buffers[name]
        unset = float("nan") if buffer.is_floating_point() else 0
        module._buffers[name] = torch.full_like(buffer, unset, device="cpu")
    before = {name: module._buffers[name].clone() for name in names}
    model._init_weights(module)
    untouched = [name for name in names if torch.equal(before[name].nan_to_num(), module._buffers[name].nan_to_num())]
    if untouched:
        raise CheckpointError(
            f"{type(module).__name__} does not say how to compute its buffer {', '.join(untouched)}.",
            "use backend=transformers, which builds the model in full",
        )
    return {name: module._buffers[name] for name in names}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
