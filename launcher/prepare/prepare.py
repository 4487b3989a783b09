"""RunConfig -> a run that can start. What the user can fix is found here, before any process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends.slots.families import why_static
from launcher.config.cluster import check_cluster
from launcher.config.engines import NO_PLAN
from launcher.config.formats import Weights
from launcher.config.machine import other_machine
from launcher.config.schema import Accelerator, ConfigError, MeasureConfig, Scheduling
from launcher.config.unread import unread_batch_size
from launcher.models import EMBEDDED
from launcher.prepare.compiling import check_compile
from launcher.prepare.experiments import check_experiment
from launcher.prepare.planning import paces, plan_of, short_memory
from launcher.prepare.shapes import built_of, config_of, embedded_folder
from launcher.prepare.speculative import settle_guesses
from launcher.prompts.prompts import check_context, guessed_prompts, has_tokenizer, load_prompts, sampling_of
from launcher.prompts.quality import windows
from launcher.run_dir.run import Run
from launcher.system.files import absolute
from shards.checkpoint.adapter_config import read_config
from shards.checkpoint.checkpoint import Checkpoint, has_weights, is_derived
from shards.checkpoint.hub import resolve
from shards.machine.cards import SEE_ALL_CARDS, cuda_devices
from shards.model.config_fields import ConfigFields, check_config
from shards.model.quantized_checkpoint import from_config
from shards.model.shape import KNOWN_FAMILIES, ModelShape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from launcher.backends.base import Prompt
    from launcher.config.schema import RunConfig
    from shards.checkpoint.tensor_files import TensorEntry
    from shards.model.config_fields import TransformersConfig
    from shards.plan.plan import Plan
    from shards.untrusted_files import JsonObject

HEAD = "lm_head.weight"
WORKER_PACKAGES = ("msgspec", "psutil", "tokenizers", "pynvml")  # what a rank needs beside its engine


def prepare(config: RunConfig, command: tuple[str, ...], given: Sequence[Prompt] = ()) -> Run:
    """Resolve, check and plan a run, of the prompts of its configuration or those that are given as token ids.

    Nothing is written. Raises UserError.
    """
    _check_launch(config)
    on_cuda = check_node(config)
    if config.launch.nccl_debug and not on_cuda:
        raise ConfigError("launch.nccl_debug=true, and without GPUs no rank uses NCCL.", "launch.nccl_debug=false")
    config = replace(config, accelerator=Accelerator.cuda if on_cuda else Accelerator.cpu)
    config, notes = config.backend.settle(config, on_cuda)
    folder = model_folder(config)
    model_config = _model_config(config, folder)
    config = _with_adapter(_settle_scheduling(config, model_config, notes))
    fields = ConfigFields(model_config)
    tensors = None
    if folder is not None and config.model.weights is Weights.auto and config.backend.uses_weights:
        checkpoint = None if config.dry_run and not has_weights(folder) else Checkpoint.open(folder)
        if checkpoint is None:
            notes.append(f"{folder} has no weights: the plan is made from its config.json")
        elif checkpoint.tensors:  # those of pytorch_model*.bin only a rank can tell, by torch
            _check_names(config, checkpoint, model_config)
            tensors = checkpoint.tensors
    prompts = list(given) or _prompts(config, folder, fields.size("vocab_size"), notes)
    longest = _longest(config, fields, prompts)
    config = settle_guesses(config, model_config, longest)
    check_compile(config, on_cuda)
    config.backend.refuse(config, model_config, on_cuda, longest)
    notes += [*_notes_batch_size(config), *_notes_order(config, on_cuda), *config.backend.notes(config, on_cuda)]

    def plan_for(config: RunConfig, at_once: int | None = None) -> Plan | None:
        return plan_of(config, model_config, tensors, prompts, on_cuda, at_once)

    plan = plan_for(config)
    notes += [NO_PLAN] if plan is None else built_of(model_config, tensors, config.backend.python).all_notes()
    notes += _notes_plan(config, plan, tensors)
    run = Run(
        config=config,
        command=command,
        model_folder=folder,
        model_config=model_config,
        prompts=tuple(prompts),
        plan=plan,
        world_size=config.world_size,
        num_devices=config.num_devices,
        on_cuda=on_cuda,
        notes=tuple(notes),
        quality_windows=windows(config, folder, fields.count("max_position_embeddings")),
    )
    return _with_paces(run, plan_for) if config.dry_run or config.machine else run


def _with_paces(run: Run, plan_for: Callable[..., Plan | None]) -> Run:
    """The run with the ceilings of all engines, and a note of them for a server on a machine that is named."""
    run = replace(run, paces=paces(run.config, plan_for, run.at_once))
    if run.config.dry_run or not run.paces:
        return run
    speeds = ", ".join(f"{name} {pace:,.1f}" for name, pace in run.paces.items())
    line = f"ceilings of machine={run.config.machine}, {run.at_once} prompts at a time: {speeds} tokens/s"
    return replace(run, notes=(*run.notes, line))


def _prompts(config: RunConfig, folder: Path | None, vocab_size: int, notes: list[str]) -> list[Prompt]:
    """The prompts as token ids; for a plan of a model without a tokenizer of about the right lengths, with a note."""
    has_ids = config.prompts.input_tokens is not None or (folder is not None and has_tokenizer(folder))
    if has_ids or not config.dry_run:
        return load_prompts(config, folder, vocab_size)
    notes.append(f"{config.model.path} has no tokenizer here: prompts are counted as a token for each 4 bytes")
    return guessed_prompts(config, vocab_size)


def _longest(config: RunConfig, fields: ConfigFields, prompts: Sequence[Prompt]) -> int:
    """The most tokens of a prompt and its answer; ConfigError where the context of the model is shorter."""
    new_tokens = sampling_of(config).max_new_tokens
    key = "sampling.max_new_tokens" if config.prompts.output_tokens is None else "prompts.output_tokens"
    context = fields.count("max_position_embeddings") or fields.count("n_positions")
    check_context(prompts, new_tokens, context, key)
    return max(len(prompt.token_ids) for prompt in prompts) + new_tokens


def check_node(config: RunConfig) -> bool:
    """True for a run on CUDA; ConfigError for packages and devices that this machine lacks.

    A plan for another machine needs neither.
    """
    if config.dry_run and (other := other_machine(config)) is not None:
        return other[0].kind == "cuda" and config.backend.uses_devices
    _check_packages(config)
    config.backend.check_here()
    return _check_devices(config)


def _check_names(config: RunConfig, checkpoint: Checkpoint, model_config: TransformersConfig) -> None:
    """The tensors are those of the model, as far as that is known before transformers has built it."""
    known = model_config.get("model_type") in KNOWN_FAMILIES and not config.model.trust_remote_code
    if not known or not config.backend.loads_by_name or from_config(model_config):
        return
    shape = ModelShape.from_config(model_config)
    embedding = next(parameter.name for parameter in shape.parameters if parameter.cut == "embedding")
    checkpoint.verify(
        {parameter.name: parameter.shape for parameter in shape.parameters},
        {embedding: [HEAD]} if shape.tied else {},
        embedding.partition(".")[0],
        is_derived,
    )


def _check_launch(config: RunConfig) -> None:
    check_experiment(config)
    if config.launch.name not in ("local", "slurm"):
        raise ConfigError(f"launch.name={config.launch.name} is not known.", "launch=local, or launch=slurm")
    if config.launch.name == "slurm":
        check_cluster(config.cluster)


def _check_packages(config: RunConfig) -> None:
    """The engine's packages must be there, in this environment or in that of `backend.python`, but for a container."""
    backend, python, key = config.backend, config.backend.python, "backend.python"
    if config.launch.name == "slurm":
        if config.cluster.container or config.dry_run:
            return
        key = "backend.python" if python else "cluster.python"
        python = python or config.cluster.python
    needed = (*backend.modules(), "torch") if config.world_size > 1 else backend.modules()  # torchrun starts several
    if missing := _missing(tuple(dict.fromkeys(needed)), python, key):
        environment = "here" if python is None else f"for {python}"
        raise ConfigError(
            f"backend={backend.name} needs {', '.join(missing)}, which is not installed {environment}.",
            f"{backend.install_hint(missing)}, or {key}= the interpreter of an environment that has it",
        )


def _missing(packages: tuple[str, ...], python: str | None, key: str) -> list[str]:
    """The modules that an interpreter does not find; asked without importing them. `key` is the one that names it."""
    if python is None:
        return [name for name in packages if importlib.util.find_spec(name) is None]
    program = "import importlib.util as i, sys; print(*(n for n in sys.argv[1:] if i.find_spec(n) is None))"
    try:
        asked = subprocess.run(
            [python, "-c", program, *packages, *WORKER_PACKAGES], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        match error:
            case subprocess.CalledProcessError():
                reason = f"exit code {error.returncode}, {error.stderr.strip().rpartition(chr(10))[2] or 'no message'}"
            case subprocess.TimeoutExpired():
                reason = f"no answer in {error.timeout:g} s"
            case _:
                reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{key}={python} does not run here: {reason}.", f"{key}={sys.executable}") from None
    return asked.stdout.split()


def _check_devices(config: RunConfig) -> bool:
    """True for a run on CUDA, here for good; ConfigError where a node has fewer devices than are asked for.

    The machine that submits to SLURM says nothing of the nodes: there it is on CUDA where the job asks for GPUs.
    """
    if not config.backend.uses_devices and config.accelerator is Accelerator.cuda:
        raise ConfigError(f"accelerator=cuda, and backend={config.backend.name} uses no device.", "accelerator=auto")
    if config.accelerator is Accelerator.cpu or not config.backend.uses_devices:
        return False
    if config.launch.name == "slurm":
        return config.accelerator is Accelerator.cuda or config.cluster.gpus_flag != "none"
    cards = cuda_devices(os.environ)
    if not cards and config.accelerator is Accelerator.cuda:
        raise ConfigError("accelerator=cuda, and no CUDA device can be seen.", "accelerator=cpu")
    if cards and config.devices > len(cards):
        raise ConfigError(
            f"devices={config.devices}, and this machine shows {len(cards)} CUDA devices.",
            f"devices={len(cards)}, or accelerator=cpu; under SLURM {SEE_ALL_CARDS}",
        )
    return bool(cards)


def _notes_plan(config: RunConfig, plan: Plan | None, tensors: Mapping[str, TensorEntry] | None) -> list[str]:
    """The plan's advice, and a warning if memory is short."""
    if plan is None:
        return []
    tight = short_memory(config, plan, tensors)
    return [line for line in (plan.advice, tight) if line]


def _notes_batch_size(config: RunConfig) -> list[str]:
    """A batch size of a file, as of an experiment that is made again with another engine, which does not read it."""
    is_unread = config.backend.continuous_batching and config.measure.batch_size != MeasureConfig().batch_size
    return [unread_batch_size(config)] if is_unread else []


def _notes_order(config: RunConfig, on_cuda: bool) -> list[str]:
    """A warning if CUDA orders mixed GPUs otherwise than NVML: the plan may describe other cards than the run gets."""
    order = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if order == "PCI_BUS_ID" or not on_cuda or config.launch.name == "slurm":
        return []
    alike = len({card.name for card in cuda_devices(os.environ)}) == 1
    return [] if alike else [f"CUDA_DEVICE_ORDER={order}: the plan takes the cards in the order of NVML (PCI_BUS_ID)"]


def _settle_scheduling(config: RunConfig, model_config: TransformersConfig, notes: list[str]) -> RunConfig:
    """A model that cannot have slots is decoded in static batches, and a note says why."""
    asked = config.backend.has_slots and config.is_continuous and not config.speculative.is_on
    why = why_static(model_config, config.model.trust_remote_code) if asked else None
    if why is None:
        return config
    notes.append(f"measure.scheduling=static: {why}")
    return replace(config, measure=replace(config.measure, scheduling=Scheduling.static))


def _with_adapter(config: RunConfig) -> RunConfig:
    """The run with the folder of its adapter, which must be one that can be merged."""
    path = config.adapter.path
    if path is None:
        return config
    folder = EMBEDDED / path.removeprefix("embedded:") if path.startswith("embedded:") else absolute(Path(path))
    read_config(folder)
    return replace(config, adapter=replace(config.adapter, path=str(folder)))


def model_folder(config: RunConfig) -> Path | None:
    """The folder of the model on this machine; None where shapes are enough (random weights, dry run, random tokens for
    a server)."""
    path = config.model.path
    if folder := embedded_folder(path, "model.path"):
        return folder
    needs_tokenizer = config.prompts.input_tokens is None
    is_real = config.model.weights is Weights.auto and not config.dry_run
    needs_folder = is_real and (config.backend.uses_weights or needs_tokenizer)
    if config.model.config and not needs_folder and not Path(path).is_dir():
        return None
    weights = needs_folder and config.backend.uses_weights
    return resolve(path, config.model.revision, weights=weights)


def _model_config(config: RunConfig, folder: Path | None) -> JsonObject:
    """The transformers config of the model: of its folder, or of the preset for random weights."""
    if folder is None:
        assert config.model.config is not None
        check_config(config.model.config)
        return config.model.config
    return config_of(folder)
