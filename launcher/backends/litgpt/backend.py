"""LitGPT's own modules and generation loop: `generate/sequentially.py` in one process, or `generate/tp.py` over several
ranks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins import BitsandbytesPrecision
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from litgpt.config import Config
from litgpt.generate import tp
from litgpt.generate.base import generate_fn
from litgpt.generate.sequentially import sequential
from litgpt.model import GPT, build_mask_cache

from launcher.backends.base import LENGTH, STOP, Completion, Generation, as_token_ids
from launcher.backends.heartbeat import heartbeat
from launcher.backends.litgpt.convert import CONFIG, MODEL, converted
from launcher.backends.litgpt.engine import SEQUENTIAL
from launcher.backends.litgpt.shapes import litgpt_config
from launcher.backends.memory import DECODE, PREFILL, PhasePeaks, module_memory
from launcher.config.parts.storage import Precision
from launcher.system.files import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.backends.base import DeviceMemory, OnStep, Prompt
    from launcher.backends.litgpt.engine import LitgptConfig
    from launcher.config.schema import RunConfig, SamplingConfig
    from shards.machine.world import World
    from shards.plan.plan import Plan

PRECISIONS = {Precision.fp32: "32-true", Precision.fp16: "16-true", Precision.bf16: "bf16-true"}
LEAST_LENGTH = 16  # tokens in the cache until the first prompts arrive


class LitgptBackend:
    """Answers one prompt after the other, as LitGPT's scripts do; token ids in, token ids out."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.options: LitgptConfig = config.backend  # type: ignore[assignment]
        self.folder = Path(config.model.path)
        self.model: Any = None

    def load(self, plan: Plan | None, world: World, progress: Callable[[int, int], None]) -> None:
        self.world = world
        kind, dtype = self.config.accelerator.value, getattr(torch, self.config.precision.value)
        if kind == "cuda" and self.options.generate == SEQUENTIAL:
            self.devices = [torch.device("cuda", card) for card in range(self.config.devices)]
        elif kind == "cuda":
            self.devices = [torch.device("cuda", world.local_rank)]
        else:
            self.devices = [torch.device(kind)]
        self.peaks = PhasePeaks(self.devices)
        settings: dict[str, Any] = {"precision": PRECISIONS[self.config.precision], "plugins": []}
        if self.options.quantize != "none":
            settings = {"plugins": [BitsandbytesPrecision(self.options.quantize.removeprefix("bnb."), dtype)]}
        if world.world_size > 1:
            settings["strategy"] = "ddp"
            settings["plugins"].append(TorchElasticEnvironment())
        fabric = Fabric(accelerator=kind, devices=world.local_world_size, num_nodes=world.num_nodes, **settings)
        with heartbeat(lambda: progress(0, 1)):
            fabric.launch()
            fields = read_json(self.folder / "config.json")
            adapter = self.config.adapter.path
            asked = (self.folder, litgpt_config(fields), Path(adapter) if adapter else None)
            if fabric.local_rank == 0:
                converted(*asked)
            fabric.barrier()
            folder = converted(*asked)
            with fabric.init_tensor(), torch.device("meta"):
                model = GPT(Config.from_file(folder / CONFIG))
            state = torch.load(folder / MODEL, mmap=True, map_location="cpu")
            if "lm_head.weight" not in state:  # tied in transformers, and never in LitGPT
                state["lm_head.weight"] = state["transformer.wte.weight"].clone()
            model.load_state_dict(state, assign=True)
            self.model = self._placed(fabric, model.to(dtype).eval())
        self.root = fabric.device
        self.peaks.end("load")
        progress(1, 1)

    def _placed(self, fabric: Any, model: Any) -> Any:
        """The model on its devices, by the functions of LitGPT's scripts, in their order."""
        if self.options.generate == SEQUENTIAL:
            wrapped = fabric.setup_module(model, move_to_device=False)
            return sequential(wrapped, fabric.device, LEAST_LENGTH, len(self.devices))
        model = fabric._precision.convert_module(model)
        if fabric.world_size > 1:
            order_heads(model, fabric.world_size)
            model = tp.tensor_parallel(fabric, model)
        with fabric.init_tensor():
            model.max_seq_length = LEAST_LENGTH
            model.cos, model.sin = model.rope_cache()
            model.set_kv_cache(batch_size=1)
        return fabric.to_device(model)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Generation:
        length = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_new_tokens
        if length > self.model.max_seq_length:  # enlarge the caches and masks
            self.model.max_seq_length = length
            for block in self.model.transformer.h:
                device = block.attn.proj.weight.device
                block.attn.kv_cache = block.attn.build_kv_cache(1, length, self.model.rope_cache_length(), device)
            self.model.mask_cache = build_mask_cache(length, self.root)
        completions: list[Completion] = []
        prefill_s = decode_s = 0.0
        start = perf_counter()
        for prompt in prompts:
            began, moments = perf_counter(), list[float]()
            tokens, phase, reason = list[int](), PREFILL, LENGTH
            for token in self._tokens(prompt, sampling):
                tokens.append(int(token))
                moments.append(perf_counter())
                self.peaks.end(phase)
                phase = DECODE
                on_step(1)
            gaps = tuple(later - earlier for earlier, later in pairwise(moments))
            if not sampling.ignore_eos and tokens[-1] in self._eos_token_ids():
                reason = STOP
            ended = Completion(prompt.index, tuple(tokens), reason, moments[0] - start, gaps)
            completions.append(ended)
            on_step(0, (ended,))
            prefill_s, decode_s = prefill_s + moments[0] - began, decode_s + sum(gaps)
        steps = sum(len(completion.itl_s) for completion in completions)
        return Generation(tuple(completions), prefill_s, decode_s, steps)

    def _tokens(self, prompt: Prompt, sampling: SamplingConfig) -> Any:
        """The tokens of an answer as LitGPT's loop yields them, EOS included."""
        torch.manual_seed(self.config.seed + prompt.index)
        eos = self._eos_token_ids()
        if sampling.ignore_eos:
            eos = ()
        for block in self.model.transformer.h:
            block.attn.kv_cache.reset_parameters()
        return generate_fn(
            self.model,
            torch.tensor(prompt.token_ids, device=self.root),
            len(prompt.token_ids) + sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k or None,
            top_p=sampling.top_p,
            stop_tokens=tuple([token] for token in eos),
            include_prompt=False,
            include_eos=True,
        )

    def _eos_token_ids(self) -> tuple[int, ...]:
        eos = (read_json(self.folder / "generation_config.json") or {}).get("eos_token_id")
        if eos is None:
            eos = read_json(self.folder / "config.json").get("eos_token_id")
        return as_token_ids(eos)

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def memory(self) -> list[DeviceMemory]:
        caches: dict[torch.device, int] = {}
        for block in self.model.transformer.h:
            for buffer in (block.attn.kv_cache.k, block.attn.kv_cache.v):
                caches[buffer.device] = caches.get(buffer.device, 0) + buffer.nbytes
        return [
            module_memory(self.model, device, rank, caches, self.peaks, is_reserved=True)
            for rank, device in enumerate(self.devices, self.world.rank)
        ]

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def order_heads(model: Any, ranks: int) -> None:
    """Group queries, keys and values by rank: LitGPT's tensor_parallel cuts their joint matrix into equal blocks of
    rows, but its converter has written all queries before all keys (release 0.5.13)."""
    config = model.config
    sizes = [heads * config.head_size for heads in (config.n_head, config.n_query_groups, config.n_query_groups)]
    for block in model.transformer.h:
        weight = block.attn.qkv.weight
        parts = [part.chunk(ranks) for part in weight.data.split(sizes)]
        weight.data = torch.cat([kind[rank] for rank in range(ranks) for kind in parts])
