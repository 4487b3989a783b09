"""Convert a RunConfig to a run that can start, and report mistakes that the user can fix before any process starts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.backends.slots.families import why_static
from launcher.config.cluster import check_cluster
from launcher.config.engines import NO_PLAN
from launcher.config.parts.formats import Weights
from launcher.config.schema import Accelerator, ConfigError, MeasureConfig, Scheduling
from launcher.config.unread import unread_batch_size
from launcher.models import EMBEDDED, embedded_folder
from launcher.prepare.compiling import check_compile
from launcher.prepare.experiments import check_experiment
from launcher.prepare.node import check_node
from launcher.prepare.planning import paces, plan_of, short_memory
from launcher.prepare.shapes import built_of, config_of
from launcher.prepare.speculative import settle_guesses
from launcher.prompts.prompts import check_context, guessed_prompts, is_text_without_tokenizer, load_prompts
from launcher.prompts.quality import windows
from launcher.run_dir.run import Run
from launcher.system.files import absolute
from shards.checkpoint.adapter_config import read_config
from shards.checkpoint.checkpoint import Checkpoint, has_weights, is_derived
from shards.checkpoint.hub import resolve
from shards.machine.cards import cuda_devices
from shards.model.config_fields import ConfigFields, check_config
from shards.model.known_shape import KNOWN_FAMILIES, known_shape
from shards.model.quantized_checkpoint import from_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from launcher.backends.base import Prompt
    from launcher.config.schema import RunConfig
    from shards.checkpoint.tensor_files import TensorEntry
    from shards.model.config_fields import TransformersConfig
    from shards.plan.plan import Plan

HEAD = "lm_head.weight"


def prepare(config: RunConfig, command: tuple[str, ...], given: Sequence[Prompt] = ()) -> Run:
    """Resolve, check and plan a run, with the prompts of its configuration, or with those in `given` (as token ids).
    Writes no files; UserError for mistakes."""
    check_experiment(config)
    if config.launch.name not in ("local", "slurm"):
        raise ConfigError(f"launch.name={config.launch.name} is not known.", "launch=local, or launch=slurm")
    if config.launch.name == "slurm":
        check_cluster(config.cluster)
    on_cuda = check_node(config)
    if config.launch.nccl_debug and not on_cuda:
        raise ConfigError("launch.nccl_debug=true, and without GPUs no rank uses NCCL.", "launch.nccl_debug=false")
    config = replace(config, accelerator=Accelerator.cpu)
    if on_cuda:
        config = replace(config, accelerator=Accelerator.cuda)
    config, notes = config.backend.settle(config, on_cuda)
    folder = model_folder(config)
    if folder is not None:
        model_config = config_of(folder)
    else:
        assert config.model.config is not None, "random weights are made by the config of a preset"
        model_config = config.model.config
        check_config(model_config)
    config = _settle_model(config, model_config, notes)
    fields, tensors = ConfigFields(model_config), _tensors(config, folder, model_config, notes)
    vocab_size, prompts = fields.size("vocab_size"), list(given)
    if not prompts and config.dry_run and is_text_without_tokenizer(config, folder):
        notes.append(f"{config.model.path} has no tokenizer here: prompts are estimated as one token for each 4 bytes")
        prompts = guessed_prompts(config, vocab_size)
    elif not prompts:
        prompts = load_prompts(config, folder, vocab_size)
    longest = check_context(config, prompts, fields.count("max_position_embeddings") or fields.count("n_positions"))
    config = settle_guesses(config, model_config, longest)
    check_compile(config, on_cuda)
    config.backend.refuse(config, model_config, on_cuda, longest)

    def plan_for(config: RunConfig, at_once: int | None = None) -> Plan | None:
        return plan_of(config, model_config, tensors, prompts, on_cuda, at_once)

    plan = plan_for(config)
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
        notes=(*notes, *_notes(config, model_config, tensors, plan, on_cuda)),
        quality_windows=windows(config, folder, fields.count("max_position_embeddings")),
    )
    if config.dry_run or config.machine:
        run = replace(run, paces=paces(config, plan_for, run.at_once))
    if run.paces and not config.dry_run:  # a note, since the plan is only printed in a dry run
        speeds = ", ".join(f"{name} {pace:,.1f}" for name, pace in run.paces.items())
        line = f"ceilings of machine={config.machine}, {run.at_once} prompts at a time: {speeds} tokens/s"
        run = replace(run, notes=(*run.notes, line))
    return run


def _settle_model(config: RunConfig, model_config: TransformersConfig, notes: list[str]) -> RunConfig:
    """The configuration with the folders of the checked adapters; with static batches, and a note, if the model does
    not support slots."""
    if config.backend.has_slots and config.is_continuous and not config.speculative.is_on:
        reason = why_static(model_config, config.model.trust_remote_code)
        if reason is not None:
            notes.append(f"measure.scheduling=static: {reason}")
            config = replace(config, measure=replace(config.measure, scheduling=Scheduling.static))
    adapter = config.adapter
    path = None if adapter.path is None else _adapter_folder(adapter.path)
    paths = {name: _adapter_folder(given) for name, given in adapter.paths.items()}
    return replace(config, adapter=replace(adapter, path=path, paths=paths))


def _adapter_folder(path: str) -> str:
    """The folder of an adapter; ConfigError if it is not available."""
    folder = absolute(Path(path))
    if path.startswith("embedded:"):
        folder = EMBEDDED / path.removeprefix("embedded:")
    read_config(folder)
    return str(folder)


def _tensors(
    config: RunConfig, folder: Path | None, model_config: TransformersConfig, notes: list[str]
) -> Mapping[str, TensorEntry] | None:
    """The tensors of the checkpoint, checked against the model's shape if its family is built in.

    None without a checkpoint, or for pytorch_model*.bin, which only a rank can read, with torch.
    """
    if folder is None or config.model.weights is not Weights.auto or not config.backend.uses_weights:
        return None
    if config.dry_run and not has_weights(folder):
        notes.append(f"{folder} has no weights: the plan is made from its config.json")
        return None
    checkpoint = Checkpoint.open(folder)
    if not checkpoint.tensors:
        return None
    known = model_config.get("model_type") in KNOWN_FAMILIES and not config.model.trust_remote_code
    if known and config.backend.loads_by_name and not from_config(model_config):
        shape = known_shape(model_config)
        shapes = {parameter.name: parameter.shape for parameter in shape.parameters}
        embedding = next(parameter.name for parameter in shape.parameters if parameter.cut == "embedding")
        tied = {}
        if shape.tied:
            tied = {embedding: [HEAD]}
        checkpoint.verify(shapes, tied, embedding.partition(".")[0], is_derived)
    return checkpoint.tensors


def _notes(
    config: RunConfig,
    model_config: TransformersConfig,
    tensors: Mapping[str, TensorEntry] | None,
    plan: Plan | None,
    on_cuda: bool,
) -> list[str]:
    """Notes that the user should read before the run."""
    notes = []
    if config.backend.continuous_batching and config.measure.batch_size != MeasureConfig().batch_size:
        # It is set in a file, for example by an experiment for another engine; on the command line it is refused.
        notes.append(unread_batch_size(config))
    order = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    is_other_order = order != "PCI_BUS_ID" and on_cuda and config.launch.name != "slurm"
    if is_other_order and len({card.name for card in cuda_devices(os.environ)}) > 1:
        notes.append(f"CUDA_DEVICE_ORDER={order}: the plan takes the cards in the order of NVML (PCI_BUS_ID)")
    notes += config.backend.notes(config, on_cuda)
    if plan is None:
        return [*notes, NO_PLAN]
    notes += built_of(model_config, tensors, config.backend.python).all_notes()
    notes += [line for line in (plan.advice, short_memory(config, plan, tensors)) if line]
    return notes


def model_folder(config: RunConfig) -> Path | None:
    """The folder of the model on this machine; None if only its config is needed (random weights, dry run, random
    tokens for a server)."""
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
