"""The base class of engines that run a transformers module: loading, generation, memory."""

from __future__ import annotations

import json
import os
import time
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist

from launcher.backends.base import LIKELIEST, LoadTimes, Score
from launcher.backends.decode import Decoder, eos_token_ids
from launcher.backends.drafts import make_guesser, with_draft
from launcher.backends.memory import PhasePeaks, module_memory
from launcher.backends.slots.compilation import compile_steps
from launcher.backends.slots.decoder import SlotDecoder
from launcher.backends.trace import Tracer
from launcher.config.parts.compiling import Compile
from launcher.config.parts.formats import WeightFormat, Weights
from launcher.config.parts.storage import Offload
from launcher.config.schema import DEFAULT_PREFILL_TOKENS
from shards.checkpoint.checkpoint import Checkpoint
from shards.errors import PlanError
from shards.load.adapter import Adapter, read_adapter
from shards.load.blocks import local_bytes, local_tensor
from shards.load.load import LoadStats, load_weights
from shards.load.meta import build_meta
from shards.load.quantized.quantizers import make_quantizer
from shards.load.quantized.stored import make_stored
from shards.load.random_weights import fill_random
from shards.machine.hardware import MIB
from shards.machine.process_group import any_rank, barrier, connect, connect_cards, device_of, disconnect
from shards.model.known_shape import KNOWN_FAMILIES
from shards.model.quantized_checkpoint import from_config
from shards.parallel.adapters import attach_adapter, fill_adapter
from shards.parallel.families import keep_kv_heads_only
from shards.parallel.fused import fuse_norms, fuse_rotations
from shards.parallel.products import pack_weights, quantize_layers
from shards.parallel.tensor_parallel import VocabularyHead
from shards.plan.memory import plan_tolerance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.backends.base import Compilation, DeviceMemory, Generation, OnStep, Prompt
    from launcher.config.schema import RunConfig, SamplingConfig
    from shards.machine.world import World
    from shards.plan.plan import Plan
    from shards.untrusted_files import JsonObject

    Progress = Callable[[int, int], None]


ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}  # new and old name; read when CUDA is first used


class ModuleBackend(ABC):
    """An engine that is a torch module with transformers' forward. Subclasses implement `place`."""

    mapped_files: frozenset[Path] = frozenset()  # files that weights of this process are mapped from
    gather: Callable[[torch.Tensor, torch.Tensor], object] = staticmethod(dist.all_gather_into_tensor)
    stats = LoadStats(0, 0, 0.0)  # as it stays if weights are left on disk

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.dtype = getattr(torch, config.precision.weights.value)
        self.product_dtype = getattr(torch, config.precision.products.value)
        # cuDNN's attention builds a plan for each new length of the cache, which takes longer than a step.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # With static batches each step allocates a new, larger cache: the blocks that CUDA's allocator keeps are too
        # small for it.
        if not config.is_continuous and not ALLOCATOR & os.environ.keys():
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

    @abstractmethod
    def place(self, plan: Plan | None, world: World, progress: Progress) -> torch.nn.Module:
        """The model, with this rank's part of its weights on `self.device`."""

    def load(self, plan: Plan | None, world: World, progress: Progress) -> None:
        began = time.perf_counter()
        self.world = world
        self.device = device_of(world, self.config.accelerator.value)
        connect(world, self.device, self.config.join_s)
        connect_cards(world, self.device, self.config.join_s)
        self.joined_s = time.perf_counter() - began
        self.peaks = PhasePeaks(self.devices)
        self.model = self.place(plan, world, progress)
        self.peaks.end("load")
        if plan is not None:
            shares = [device.parameter_bytes + device.offloaded_bytes for device in plan.devices]
            planned = sum(shares)
            if self.config.backend.one_process_per_device:
                planned = shares[self.world.rank]
            nbytes = sum(local_tensor(parameter).nbytes for parameter in self.model.parameters())
            tolerance = plan_tolerance(getattr(self.model.config, "model_type", None))
            check_share(self.world.rank, nbytes, planned, plan.num_parameters * self.dtype.itemsize, tolerance)
        self.pack(self.model)
        self.guesser = make_guesser(self.config.speculative, self.dtype, self.device, self.pack)
        self.decoder = self._decoder(plan)
        self.loaded_s = time.perf_counter() - began

    def load_times(self) -> LoadTimes:
        read_s, quantize_s = self.stats.read_s, self.stats.quantize_s
        return LoadTimes(self.joined_s, read_s, quantize_s, self.loaded_s - self.joined_s - read_s - quantize_s)

    def pack(self, model: torch.nn.Module) -> None:
        """Repack the weights of a model for the CPU's kernels if that is faster; fuse its norms and its rotations."""
        if self.device.type == "cpu" and self.packs(model):
            pack_weights(model)
            fuse_norms(model)
            fuse_rotations(model)

    def _decoder(self, plan: Plan | None) -> Decoder | SlotDecoder:
        is_data_parallel, eos, seed = self.config.backend.data_parallel, eos_token_ids(self.model), self.config.seed
        if not self.config.is_continuous:
            decoder = Decoder(self.model, eos, self.device, seed, peaks=self.peaks)
            if is_data_parallel:
                decoder.any_unfinished = any_rank
            return decoder
        measure = self.config.measure
        num_slots, length = measure.batch_size, 0
        if plan is not None:
            num_slots, length = plan.slots or num_slots, plan.slot_tokens or 0
        return SlotDecoder(
            self.model, eos, self.device, self.world, seed, self.peaks,
            num_slots=num_slots,
            length=length,
            prefill_tokens=measure.prefill_tokens or DEFAULT_PREFILL_TOKENS,
            splits_prompts=is_data_parallel,
            gather=self.gather,
            guesser=self.guesser,
            ahead=self.config.speculative.most,
        )  # fmt: skip

    @property
    def devices(self) -> list[torch.device]:
        """The devices of this process that hold parts of the model."""
        return [self.device]

    def meta_model(self) -> torch.nn.Module:
        """The model on the meta device, built from the checkpoint's folder or the configured shapes."""
        model = build_meta(self.source, self.dtype, self.config.model.trust_remote_code)
        keep_kv_heads_only(model)
        return model

    def quantize(self, model: torch.nn.Module) -> None:
        """Prepare the layers of a model on meta for unmerged adapters and for `quantization`; before it is sharded or
        filled."""
        if not self.config.adapter.merge and (adapter := self.adapter()) is not None:
            attach_adapter(model, adapter)
        if self.config.quantization is not WeightFormat.none:
            quantize_layers(model, make_quantizer(self.config.quantization.name, self.dtype))
        elif self.config.model.weights is Weights.auto:
            fields = json.loads((Path(self.config.model.path) / "config.json").read_text(encoding="utf-8"))
            stored = from_config(fields)
            if stored is not None and (kept := self.config.backend.kept(stored)) is not None:
                zeros_from = int(fields["quantization_config"].get("checkpoint_format") != "gptq_v2")
                quantize_layers(model, make_stored(kept, self.dtype, zeros_from), kept.chooses)

    @property
    def source(self) -> Path | str | JsonObject:
        model = self.config.model
        if model.weights is Weights.random and model.config:
            return model.config
        return model.path

    def packs(self, model: torch.nn.Module) -> bool:
        """True if weights can be repacked: the ranks of this node have memory for them, since packed weights no longer
        lie in the mapped files.

        Autocast, inductor and offload do not support packed weights.
        """
        is_compiled = self.config.measure.compile is Compile.inductor
        if self.config.precision.is_mixed or is_compiled or self.config.offload is not Offload.none:
            return False
        nbytes = local_bytes(model) * self.world.local_world_size
        return bool(nbytes < psutil.virtual_memory().available) and model.config.model_type in KNOWN_FAMILIES

    def fill(self, model: torch.nn.Module, progress: Progress) -> None:
        """Load every local shard: this rank's bytes of the checkpoint, or random values.

        If weights are offloaded to main memory, only the buffers go to the device.
        """
        is_away, device = self.config.offload is Offload.cpu, self.device
        if is_away:
            device = torch.device("cpu")
        if self.config.model.weights is Weights.random:
            self.stats = fill_random(model, self.config.seed, device, progress)
        else:
            self.checkpoint = Checkpoint.open(self.config.model.path)
            merged = separate = None
            if self.config.adapter.merge:
                merged = self.adapter()
            else:
                separate = self.adapter()
            self.stats = load_weights(model, self.checkpoint, device, progress, merged)
            self.mapped_files = self.stats.mapped_files
            if separate is not None:
                fill_adapter(model, separate)
        if is_away:
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.to(self.device)

    def adapter(self) -> Adapter | None:
        """The adapter of `adapter.path`; None without one."""
        folder = self.config.adapter.path
        if not folder:
            return None
        return read_adapter(Path(folder))

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Generation:
        with self.autocast():
            generation = self.decoder.generate(prompts, sampling, on_step)
        if self.mapped_files:
            self.checkpoint.check_mapped(self.mapped_files)
        if not self.config.backend.data_parallel and dist.is_initialized():
            # Each rank chooses tokens by itself, from logits that must be equal to the bit.
            digest = zlib.crc32(repr([item.token_ids for item in generation.completions]).encode())
            extremes = torch.tensor([digest, -digest])
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
            if extremes[0] != -extremes[1]:
                raise RuntimeError("the ranks chose different tokens for the same prompts")
        return generation

    def compile(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Compilation | None:
        decoder = self.decoder
        if not isinstance(decoder, SlotDecoder):
            return None
        with self.autocast():
            return compile_steps(decoder, self.config, lambda: self.generate(prompts, sampling, on_step))

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int]) -> Score:
        for module in self.model.modules():
            if isinstance(module, VocabularyHead):
                module.gathering = True
        ids = torch.tensor([token_ids], device=self.device)
        with self.autocast():
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        likely = logits.log_softmax(-1)
        chosen = likely.gather(1, ids[0, 1:, None].to(logits.device))
        values, tokens = likely.topk(min(LIKELIEST, likely.shape[1]))
        likeliest = tuple(
            dict(zip(*place, strict=True)) for place in zip(tokens.tolist(), values.tolist(), strict=True)
        )
        return Score(chosen.double().sum().item(), tuple(logits.argmax(-1).tolist()), likeliest)

    def autocast(self) -> torch.autocast:
        """A context with autocast for mixed precision; without mixed precision it does nothing."""
        return torch.autocast(
            self.device.type, self.product_dtype, enabled=self.config.precision.is_mixed, cache_enabled=False
        )

    def stream_to(self, on_tokens: Callable[[int, Sequence[int]], None]) -> None:
        """Stream tokens with continuous batching; a static batch reports its tokens only at its end."""
        if isinstance(self.decoder, SlotDecoder):
            self.decoder.on_tokens = on_tokens

    def trace(self) -> Tracer:
        return Tracer(self.device)

    def barrier(self) -> None:
        barrier()

    def memory(self) -> list[DeviceMemory]:
        is_reserved = isinstance(self.decoder, SlotDecoder)
        first = self.world.rank
        devices = [
            module_memory(self.model, device, rank, self.decoder.kv_cache_bytes, self.peaks, is_reserved)
            for rank, device in enumerate(self.devices, first)
        ]
        return [with_draft(devices[0], self.guesser), *devices[1:]]

    def close(self) -> None:
        disconnect()


def check_share(rank: int, nbytes: int, planned: int, whole: int, tolerance: float) -> None:
    """PlanError if a rank holds all of the model instead of its share, or another share than planned."""
    whole_is_right = planned > 0.98 * whole
    if abs(nbytes - planned) <= tolerance * planned and (nbytes < whole or whole_is_right):
        return
    verdict = "it was sharded differently than planned"
    if nbytes >= whole:
        verdict = "nothing was sharded"
    raise PlanError(
        f"rank {rank} holds {nbytes / MIB:.1f} MiB of {whole / MIB:.1f} MiB parameters, and its share is "
        f"{planned / MIB:.1f} MiB: {verdict}.",
        "backend=fsdp, which shards every model",
    )
