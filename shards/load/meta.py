"""A model on the meta device: built from its config, and allocated later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from shards.errors import CheckpointError
from shards.load.blocks import copy_marks
from shards.load.conversion import note_conversions

if TYPE_CHECKING:
    from shards.model.config_fields import TransformersConfig


def build_meta(
    source: Path | str | TransformersConfig | PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False
) -> nn.Module:
    """The causal language model of a folder with a config.json, or of a config, on the meta device, for inference."""
    config = _config(source, trust_remote_code)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    note_conversions(model)
    return model.eval().requires_grad_(False)


def _config(source: Path | str | TransformersConfig | PretrainedConfig, trust_remote_code: bool) -> PretrainedConfig:
    if isinstance(source, PretrainedConfig):
        return source
    try:
        if isinstance(source, (str, Path)):
            return AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code, local_files_only=True)
        return AutoConfig.for_model(**source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        name = "The configuration given"
        if isinstance(source, (str, Path)):
            name = str(source)
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{name} needs its own code, which is not run without permission.",
                "model.trust_remote_code=true, if you trust it",
            ) from None
        raise CheckpointError(
            f"{name} has no config that transformers can read: {error}", "it must hold the config.json of a causal LM"
        ) from None


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Allocate tensors on meta on `device`; buffers that are computed get their values, everything else is
    uninitialised."""
    replaced: dict[int, tuple[torch.Tensor, nn.Parameter]] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None or not old.is_meta:
                continue
            if id(old) not in replaced:
                new = nn.Parameter(torch.empty_like(old, device=device), requires_grad=False)
                copy_marks(old, new)
                replaced[id(old)] = old, new
            setattr(module, name, replaced[id(old)][1])
        materialize_buffers(model, module, torch.device(device))
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"still on meta: {left}"


def materialize_buffers(model: nn.Module, module: nn.Module, device: torch.device) -> None:
    """Allocate the buffers of a module on meta on `device`; those that are computed get their values."""
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
    """The buffers of a new module of the same class and config, if its constructor takes only the config (rotary
    embeddings)."""
    config = getattr(module, "config", None)
    if config is None or any(True for _ in module.parameters()):
        return None
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(model, "dtype", torch.float32))
    try:
        with torch.device("cpu"):
            fresh = type(module)(config=config)
    finally:
        torch.set_default_dtype(default)
    return dict(fresh._buffers)


def _initialised(model: nn.Module, module: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """The buffers as the model's own initialisation makes them; CheckpointError for one that it does not set."""
    for name in names:
        buffer = module._buffers[name]
        unset = 0.0
        if buffer.is_floating_point():
            unset = float("nan")
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
