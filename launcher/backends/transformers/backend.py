"""The reference engine: the plain transformers model in one process; on several GPUs accelerate spreads its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from accelerate.utils import get_balanced_memory

from launcher.backends.module import ModuleBackend
from launcher.config.parts.storage import Offload
from shards.checkpoint.checkpoint import Checkpoint
from shards.errors import PlanError
from shards.load.disk import leave_on_disk
from shards.parallel.fully_shard import decoder_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.backends.base import DeviceMemory
    from launcher.backends.module import Progress
    from launcher.backends.transformers.engine import TransformersConfig
    from shards.machine.world import World
    from shards.plan.plan import Plan


class TransformersBackend(ModuleBackend):
    """`AutoModelForCausalLM`, whole or with its layers spread over the GPUs of this machine."""

    def place(self, plan: Plan | None, world: World, progress: Progress) -> torch.nn.Module:
        model = self.meta_model()
        self.quantize(model)
        if self.config.offload is not Offload.none:
            # accelerate's hooks copy the parameters of each module to the device for its forward.
            weights: Mapping[str, torch.Tensor]
            if self.config.offload is Offload.disk:
                stored = leave_on_disk(model, Checkpoint.open(self.config.model.path), self.device, self.adapter())
                self.checkpoint, self.mapped_files = stored.checkpoint, stored.files
                weights = stored
            else:
                self.fill(model, progress)
                weights = pinned(model)
            skipped = getattr(model, "_skip_keys_device_placement", None)
            add_hook_to_module(model, AlignDevicesHook(io_same_device=True, skip_keys=skipped), append=True)
            attach_align_device_hook(
                model, execution_device=self.device, offload=True, weights_map=weights, skip_keys=skipped
            )
            progress(1, 1)
            return model
        if len(self.devices) == 1:
            self.fill(model, progress)
            return model
        # Each decoder layer is whole on one GPU, in order; the GPUs compute one after the other.
        options: TransformersConfig = self.config.backend  # type: ignore[assignment]
        whole = [type(decoder_layers(model)[0]).__name__]
        cards = range(self.config.devices)
        room = {card: torch.cuda.mem_get_info(card)[0] for card in cards}
        if options.device_map != "sequential":
            low_0 = options.device_map == "balanced_low_0"
            room = get_balanced_memory(model, room, whole, dtype=self.dtype, low_zero=low_0)
        placed = infer_auto_device_map(model, room, whole, dtype=self.dtype)
        if outside := set(map(str, placed.values())) - set(map(str, cards)):
            left = ", ".join(sorted(outside))
            fact = f"The model does not fit {len(cards)} GPUs: parts are left for {left}."
            raise PlanError(fact, f"devices={len(cards) + 1}, or backend=fsdp")
        for name, card in placed.items():
            allocate_parameters(model.get_submodule(name), torch.device("cuda", card))
        model.tie_weights()
        self.fill(model, progress)
        return dispatch_model(model, placed, force_hooks=True)  # hooks move the inputs, also to a single GPU

    def memory(self) -> list[DeviceMemory]:
        if self.config.offload is not Offload.none:
            self.model.tie_weights()  # accelerate's hooks leave two meta parameters in place of a tied one
        return super().memory()

    @property
    def devices(self) -> list[torch.device]:
        """All GPUs of the run; without GPUs the CPU."""
        if self.device.type == "cpu":
            return [self.device]
        return [torch.device("cuda", card) for card in range(self.config.devices)]


def pinned(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a model, by all of their names, in pinned main memory that a GPU can read."""
    copies: dict[int, torch.Tensor] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    for _, parameter in named:
        if id(parameter) not in copies:
            copies[id(parameter)] = parameter.detach().pin_memory()
    return {name: copies[id(parameter)] for name, parameter in named}


def allocate_parameters(module: torch.nn.Module, device: torch.device) -> None:
    """Allocate the parameters of a module on meta on `device`, uninitialised."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and old.is_meta:
                part._parameters[name] = torch.nn.Parameter(torch.empty_like(old, device=device), requires_grad=False)
