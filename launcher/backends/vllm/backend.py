"""vLLM: tensor parallelism, a paged KV cache and continuous batching over the whole prompt set."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import psutil

from launcher.backends.base import LENGTH, LIKELIEST, STOP, Completion, DeviceMemory, Generation, Score
from launcher.backends.heartbeat import heartbeat
from launcher.backends.vllm.monitor import Watch
from launcher.backends.vllm.options import adapter_requests, arguments, environment, refusal
from launcher.backends.vllm.requests import check_lengths, sampling_params
from launcher.backends.vllm.startup import check_platform, temporary_files_in
from launcher.config.schema import Accelerator, ConfigError
from launcher.prompts.arrivals import Pacing
from launcher.results.figures.speculation import ACCEPTED, GUESSED
from launcher.system.files import read_json, write_json
from launcher.system.processes import MARK, scratch_prefix
from shards.errors import PlanError
from shards.machine.shared_memory import shared_memory_files, shared_memory_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from launcher.backends.base import OnStep, Prompt
    from launcher.backends.vllm.engine import VllmConfig
    from launcher.config.schema import RunConfig, SamplingConfig
    from shards.machine.world import World
    from shards.plan.plan import Plan

GUESSES = {GUESSED: "vllm:spec_decode_num_draft_tokens", ACCEPTED: "vllm:spec_decode_num_accepted_tokens"}
NO_CORE = "vLLM's engine core runs in a process of its own"


class VllmBackend:
    """`vllm.LLM` with token ids: one process that starts workers, or one rank for each device under an external
    launcher."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.options: VllmConfig = config.backend  # type: ignore[assignment]
        # Not torch.cuda.is_available(): it would keep the workers, which vLLM forks, from using CUDA.
        self.on_cpu = config.accelerator is Accelerator.cpu
        for name, value in environment(config, self.on_cpu).items():
            os.environ.setdefault(name, value)
        self.vllm = importlib.import_module("vllm")  # imported here because it reads the environment
        assert self.vllm.LLM  # the package imports its parts lazily: import them now
        self.external = False
        self.llm: Any = None
        self.watch: Watch | None = None
        self.scratch: tempfile.TemporaryDirectory[str] | None = None  # for sockets and stores that vLLM does not remove
        self.shared_memory: set[Path] = set()
        self.indices: dict[str, int] = {}  # prompt index of each request of a call
        self.adapters = adapter_requests(config)

    def load(self, plan: Plan | None, world: World, progress: Callable[[int, int], None]) -> None:
        self.external = world.world_size > 1
        devices = self.config.devices * self.config.num_nodes
        if self.external and world.world_size != devices:
            raise PlanError(
                f"vLLM under {world.launcher} needs one rank a device: {world.world_size} ranks, {devices} devices.",
                f"start {devices} ranks, or one process on one node",
            )
        if self.external:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # external_launcher requires it
        elif self.on_cpu:
            # Workers inherit the number of threads: all workers together must not use more threads than cores.
            share = max(len(os.sched_getaffinity(0)) // self.config.devices, 1)
            os.environ["OMP_NUM_THREADS"] = str(min(share, int(os.environ.get("OMP_NUM_THREADS", share))))
        check_platform(self.on_cpu)
        self.options.check_extra(Path(self.vllm.__path__[0]))
        self.scratch = tempfile.TemporaryDirectory(prefix=scratch_prefix(os.environ.get(MARK, "")))
        before = shared_memory_files()
        with temporary_files_in(self.scratch.name, self.on_cpu), heartbeat(lambda: progress(0, 1)):
            folder = self._model_folder()
            pool, offloaded_bytes = None, 0
            if plan is not None:
                pool, offloaded_bytes = plan.kv_cache_memory_bytes, plan.devices[0].offloaded_bytes
            if not pool:  # not planned: the memory of the node was not known
                fields = read_json(folder / "config.json") or {}
                pool = self.options.pool_bytes(self.config, fields, self.on_cpu)
            words = arguments(self.config, folder, self.external, self.on_cpu, pool, offloaded_bytes)
            try:
                self.llm = self.vllm.LLM(**words)
            except ValueError as error:  # pydantic's errors are ValueErrors too
                raise ConfigError(f"vLLM refuses: {refusal(error)}", "python -m launcher backend=vllm --cfg") from error
        children = psutil.Process().children(recursive=True)
        self.shared_memory = shared_memory_of([os.getpid(), *(child.pid for child in children)]) - before
        self.watch = Watch(self.llm.llm_engine)
        progress(1, 1)

    def _model_folder(self) -> Path:
        """The model's folder; a temporary one with a config.json if only the configuration has the shapes."""
        model = self.config.model
        if Path(model.path).is_dir() or model.config is None:
            return Path(model.path)
        assert self.scratch is not None
        write_json(Path(self.scratch.name) / "config.json", model.config)
        return Path(self.scratch.name)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, on_step: OnStep) -> Generation:
        check_lengths(prompts, sampling.max_new_tokens, self.llm.model_config.max_model_len)
        assert self.watch is not None
        engine = self.llm.llm_engine
        engine.reset_prefix_cache()  # a repeat must not find prompts that an earlier one computed
        if self.external and self.config.load.is_open:
            raise ConfigError(
                "Ranks that another launcher started do not support arrival times.",
                "load.request_rate=null load.arrivals=false, or python -m launcher alone",
            )
        if self.config.load.is_set:
            prompts = sorted(prompts, key=lambda prompt: prompt.index)
        pacing = Pacing.of(self.config, prompts)
        ids = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        params = sampling_params(prompts, sampling, self.llm.model_config, self.config.seed)
        requests: list[str] = []
        self.indices.clear()
        starts: list[float] = []
        completions: dict[int, Completion] = {}
        before = self._guesses()
        start = self.watch.restart()
        while len(completions) < len(prompts):
            now = perf_counter()
            if due := pacing.due(now - start, len(requests) - len(completions)):
                part = slice(due.start, due.stop)
                chosen = [self.adapters.get(prompt.adapter) for prompt in prompts[part]]
                requests += self.llm.enqueue(ids[part], params[part], lora_request=chosen, use_tqdm=False)
                self.indices.update(zip(requests[due.start :], (prompts[place].index for place in due), strict=True))
                starts += [_beginning(pacing, place, start, now) for place in due]
            if not engine.has_unfinished_requests():
                time.sleep(pacing.wait_s(now - start))
                continue
            finished = []
            for output in self._step(engine):
                # A request keeps its number; the engine adds a random suffix to it for its own use.
                place = int(output.request_id) - int(requests[0].partition("-")[0])
                moments = self.watch.arrivals[requests[place]]
                answer, reason = output.outputs[0], LENGTH
                if answer.finish_reason == "stop":
                    reason = STOP
                ttft_s, gaps = (
                    moments[0] - starts[place],
                    tuple(later - earlier for earlier, later in pairwise(moments)),
                )
                token_ids = tuple(answer.token_ids)
                completions[place] = Completion(prompts[place].index, token_ids, reason, ttft_s, gaps)
                finished.append(completions[place])
            on_step(self.watch.take_new(), finished)
        counters = {name: count - before[name] for name, count in self._guesses().items()}
        return Generation(tuple(completions[place] for place in range(len(prompts))), counters=counters)

    def _guesses(self) -> dict[str, float]:
        """Draft tokens proposed and accepted since the engine started; empty without speculative decoding."""
        if not self.config.speculative.is_on:
            return {}
        counts = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        return {name: float(counts.get(theirs, 0)) for name, theirs in GUESSES.items()}

    def score(self, token_ids: Sequence[int]) -> Score:
        params = self.vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=LIKELIEST, detokenize=False)
        prompts, alone = [{"prompt_token_ids": list(token_ids)}], self.adapters.get(None)
        [answer] = self.llm.generate(prompts, params, lora_request=alone, use_tqdm=False)
        likely = answer.prompt_logprobs[1:]  # at each position the likeliest tokens and the actual one
        chosen = [place[token].logprob for place, token in zip(likely, token_ids[1:], strict=True)]
        best = tuple(max(place, key=lambda token: place[token].logprob) for place in likely)
        likeliest = tuple(
            {token: one.logprob for token, one in place.items() if one.rank <= LIKELIEST} for place in likely
        )
        return Score(sum(chosen), best, likeliest)

    def stream_to(self, on_tokens: Callable[[int, Sequence[int]], None]) -> None:
        assert self.watch is not None
        self.watch.on_tokens = lambda request, token_ids: on_tokens(self.indices[request], token_ids)

    def _step(self, engine: Any) -> list[Any]:
        try:
            outputs: list[Any] = engine.step()
        except RuntimeError as error:  # if a worker is lost, its message is only "cancelled"
            executor = getattr(getattr(engine.engine_core, "engine_core", None), "model_executor", None)
            codes = {handle.rank: handle.proc.exitcode for handle in getattr(executor, "workers", ())}
            if lost := [f"rank {rank} with exit code {code}" for rank, code in codes.items() if code is not None]:
                raise RuntimeError(f"vLLM's workers ended: {', '.join(lost)}") from error
            raise
        return outputs

    def barrier(self) -> None:
        """Wait in vLLM's process group under an external launcher; a single process with workers has no other ranks."""
        if self.external:
            importlib.import_module("vllm.distributed.parallel_state").get_world_group().barrier()

    def memory(self) -> list[DeviceMemory]:
        assert self.watch is not None
        devices = []
        for values in self.llm.collective_rpc("device_memory"):
            num_blocks, used = values.pop("num_blocks"), None
            if self.watch.peak_blocks is None:
                values["reasons"]["kv_cache_bytes"] = NO_CORE
            else:
                used = values["kv_cache_reserved_bytes"] // num_blocks * self.watch.peak_blocks
            devices.append(DeviceMemory(kv_cache_bytes=used, **values))
        return devices

    def close(self) -> None:
        """Shut the engine down, and unlink the shared memory of its kernels. They unlink it themselves only on an
        orderly exit: not in a worker that is killed or slow, nor in a rank that leaves by `os._exit`."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            importlib.import_module("vllm.distributed").cleanup_dist_env_and_memory()
        for path in self.shared_memory:
            path.unlink(missing_ok=True)
        if self.scratch is not None:
            self.scratch.cleanup()


def _beginning(pacing: Pacing, place: int, start: float, now: float) -> float:
    """The start of a prompt's latency: its arrival time if it has one, its submission if concurrency is limited, else
    the start of the call."""
    if pacing.arrivals is not None:
        return start + pacing.arrivals[place]
    if pacing.concurrency is not None:
        return now
    return start
