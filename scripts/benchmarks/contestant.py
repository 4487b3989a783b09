"""One process of a contestant of benchmark_engines.py: it loads a model and answers all prompts on each request.

The engines of this project are called as a run calls them, the others as in their documentation.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from launcher.backends.base import Prompt  # noqa: E402
from launcher.backends.litgpt.shapes import litgpt_config  # noqa: E402
from launcher.system.files import read_json  # noqa: E402
from shards.machine.orphans import signal_when_orphaned  # noqa: E402
from shards.machine.process_group import barrier  # noqa: E402
from shards.machine.world import World  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    Answers = dict[int, list[int]]
    Answer = Callable[[], Answers]
    """Answers this process' share of the prompts: new tokens by the prompt's index."""


def main() -> None:
    """`contestant.py DESCRIPTOR`: receive the job and the signal for each turn over this inherited file descriptor."""
    signal_when_orphaned(signal.SIGKILL)
    os.set_inheritable(int(sys.argv[1]), False)
    driver = Connection(int(sys.argv[1]))  # closed only at exit, when an error message is in the log already
    job = driver.recv()
    began = time.perf_counter()
    answer, meet = CONTESTANTS[job["kind"]](job, World.from_env(os.environ))
    driver.send({"load_s": time.perf_counter() - began})
    while driver.recv() == "go":
        meet()
        began = time.perf_counter()
        answers = answer()
        driver.send({"seconds": time.perf_counter() - began, "answers": answers})
    sys.stdout.flush()
    os._exit(0)  # engines leave threads that can hang the interpreter's own exit


def prompts_of(job: dict[str, Any]) -> list[Prompt]:
    return [Prompt(index, "", tuple(ids)) for index, ids in enumerate(job["prompts"])]


def ours(job: dict[str, Any], world: World) -> tuple[Answer, Callable[[], None]]:
    """An engine of this project, through the interface that a run uses."""
    # Imported here, because an environment for LitGPT lacks the packages that these modules import.
    compose = importlib.import_module("launcher.composition.compose")
    engines = importlib.import_module("launcher.config.engines")
    planning = importlib.import_module("launcher.prepare.planning")
    checkpoint = importlib.import_module("shards.checkpoint.checkpoint")
    os.environ.update(job.get("environment", {}))
    config = compose.compose_run([
        *job["overrides"], "accelerator=cpu", f"devices={job['devices']}", f"precision={job['precision']}",
        f"sampling.max_new_tokens={job['new_tokens']}",
        f"sampling.ignore_eos={job['ignore_eos']}",
    ])  # fmt: skip
    config.model.path, config.measure.batch_size = job["folder"], len(job["prompts"])
    prompts = prompts_of(job)
    backend = engines.resolve(config.backend.implementation)(config)
    fields = read_json(Path(job["folder"]) / "config.json")
    tensors = checkpoint.Checkpoint.open(Path(job["folder"])).tensors
    plan = planning.plan_of(config, fields, tensors, prompts, False)
    backend.load(plan, world, lambda done, total: None)
    if hasattr(backend, "compile"):
        backend.compile(prompts, config.sampling, lambda *_: None)

    def answer() -> Answers:
        generation = backend.generate(prompts, config.sampling, lambda *_: None)
        return {item.index: list(item.token_ids) for item in generation.completions}

    return answer, backend.barrier


def dtype_of(job: dict[str, Any]) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]


def eos_of(job: dict[str, Any]) -> int | None:
    """The token that ends an answer; None if every answer has its full length."""
    if job["ignore_eos"]:
        return None
    eos: int = job["eos"]
    return eos


def plain_model(job: dict[str, Any]) -> Any:
    transformers = importlib.import_module("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype_of(job)).eval()


def generated(model: Any, job: dict[str, Any]) -> Answers:
    """The answers of `model.generate` to one left-padded batch, each cut after its EOS."""
    rows = job["prompts"]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    eos = eos_of(job)
    with torch.inference_mode():
        outputs = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=job["new_tokens"], do_sample=False, eos_token_id=eos,
            pad_token_id=0, use_cache=True,
        )  # fmt: skip
    return {index: until_eos(row, eos) for index, row in enumerate(outputs[:, width:].tolist())}


def until_eos(row: list[int], eos: int | None) -> list[int]:
    if eos in row:
        return row[: row.index(eos) + 1]
    return row


def model_generate(job: dict[str, Any], world: World) -> tuple[Answer, Callable[[], None]]:
    model = plain_model(job)
    return lambda: generated(model, job), lambda: None


def fabric_fsdp(job: dict[str, Any], world: World) -> tuple[Answer, Callable[[], None]]:
    """Fabric's ModelParallelStrategy with FSDP2 on each layer and the model; every rank answers the same prompts."""
    fabric_module = importlib.import_module("lightning.fabric")
    strategies = importlib.import_module("lightning.fabric.strategies")
    environments = importlib.import_module("lightning.fabric.plugins.environments")
    fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard

    def parallelize(model: Any, mesh: Any) -> Any:
        if hasattr(model, "transformer"):
            layers = model.transformer.h
        else:
            layers = model.model.layers
        for layer in layers:
            fully_shard(layer, mesh=mesh["data_parallel"])
        return fully_shard(model, mesh=mesh["data_parallel"])

    size = world.world_size
    strategy = strategies.ModelParallelStrategy(parallelize, data_parallel_size=size, tensor_parallel_size=1)
    environment = environments.TorchElasticEnvironment()
    fabric = fabric_module.Fabric(accelerator="cpu", devices=size, strategy=strategy, plugins=[environment])
    fabric.launch()
    model = fabric.setup(plain_model(job))
    model.mark_forward_method("generate")
    return lambda: generated(model, job), barrier


def init_inference(job: dict[str, Any], world: World) -> tuple[Answer, Callable[[], None]]:
    """`deepspeed.init_inference`: every rank loads the whole model, which DeepSpeed then splits."""
    os.environ["LOCAL_SIZE"] = str(world.world_size)  # DeepSpeed's all-reduce crashes without it
    deepspeed = importlib.import_module("deepspeed")
    engine = deepspeed.init_inference(
        plain_model(job), tensor_parallel={"tp_size": world.world_size}, dtype=dtype_of(job), max_out_tokens=4096,
        replace_with_kernel_inject=False,
    )  # fmt: skip
    return lambda: generated(engine.module, job), barrier


def bare_vllm(job: dict[str, Any], world: World) -> tuple[Answer, Callable[[], None]]:
    """`vllm.LLM` with its own defaults, and the environment that it needs on a CPU."""
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")
    os.environ.update(job["environment"])
    vllm = importlib.import_module("vllm")
    dtype = str(dtype_of(job)).removeprefix("torch.")
    llm = vllm.LLM(
        job["folder"], tensor_parallel_size=job["devices"], dtype=dtype, skip_tokenizer_init=True, **job["arguments"]
    )
    stop = []
    if not job["ignore_eos"]:
        stop.append(job["eos"])
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], ignore_eos=job["ignore_eos"], stop_token_ids=stop, detokenize=False
    )
    requests = [{"prompt_token_ids": row} for row in job["prompts"]]

    def answer() -> Answers:
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        return {index: list(item.outputs[0].token_ids) for index, item in enumerate(outputs)}

    return answer, llm.reset_prefix_cache


def litgpt(job: dict[str, Any], world: World) -> tuple[Answer, Callable[[], None]]:
    """LitGPT's `generate/base.py`: one prompt after the other."""
    base, model = importlib.import_module("litgpt.generate.base"), importlib.import_module("litgpt.model")
    convert = importlib.import_module("litgpt.scripts.convert_hf_checkpoint")
    values = litgpt_config(read_json(Path(job["folder"]) / "config.json"))
    config = model.Config(**values)
    load_file = importlib.import_module("safetensors.torch").load_file
    stored: dict[str, torch.Tensor] = {}
    for path in Path(job["folder"]).glob("*.safetensors"):
        stored |= load_file(path)
    weights: dict[str, torch.Tensor] = {}
    if values["name"] == "llama":
        convert.copy_weights_hf_llama(config, {}, weights, stored)
    else:
        convert.copy_weights_falcon(config, weights, stored)
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    gpt = model.GPT(config).to(dtype_of(job)).eval()
    gpt.load_state_dict(weights)
    eos = eos_of(job)

    def answer() -> Answers:
        answers = {}
        for index, row in enumerate(job["prompts"]):
            most = len(row) + job["new_tokens"]
            with torch.inference_mode():
                gpt.max_seq_length = most
                gpt.set_kv_cache(batch_size=1, dtype=dtype_of(job))
                ids = base.generate(gpt, torch.tensor(row), most, temperature=0.0, eos_id=eos, include_prompt=False)
                gpt.clear_kv_cache()
            answers[index] = ids.tolist()
        return answers

    return answer, lambda: None


CONTESTANTS = {
    "ours": ours,
    "model.generate": model_generate,
    "fabric": fabric_fsdp,
    "deepspeed": init_inference,
    "vllm": bare_vllm,
    "litgpt": litgpt,
}

if __name__ == "__main__":
    main()
