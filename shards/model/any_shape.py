"""The shape of a causal LM of any family: from transformers, run in another process, or from its tensors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shards.errors import PlanError
from shards.machine.interpreter import python_path
from shards.machine.orphans import before_exec
from shards.model.config_fields import ConfigFields
from shards.model.shape import Cut, ModelShape, Parameter, layer_of

if TYPE_CHECKING:
    from shards.model.config_fields import TransformersConfig
    from shards.untrusted_files import JsonObject

TIMEOUT_S = 180.0
HINT = "have its checkpoint on this machine, or backend.python= an interpreter with a transformers that knows it."
HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True, slots=True)
class Built:
    """The shape of a model as transformers builds it, and notes on what its plan leaves out."""

    shape: ModelShape
    notes: tuple[str, ...] = ()

    def all_notes(self) -> tuple[str, ...]:
        """Notes on what is not exact in a plan, one line each."""
        notes, (experts, used) = list(self.notes), self.shape.experts
        if used < experts:
            notes.append(f"a decode step is taken to read {used} of {experts} experts, as one prompt does")
        return tuple(f"{self.shape.family}: {note}" for note in notes)


def ask_transformers(config: TransformersConfig, python: str, timeout_s: float = TIMEOUT_S) -> Built:
    """The model of a config, built by the transformers of an interpreter on the meta device: exact, but takes seconds.

    PlanError, in one line, if that fails.
    """
    shapes = f"the shapes of model_type {config.get('model_type')!r}"
    quiet = {"CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    try:
        with tempfile.TemporaryFile("w+") as asked:  # no pipe: an interpreter may end before it reads
            asked.write(json.dumps(config))
            asked.seek(0)
            done = subprocess.run(
                [python, "-m", "shards.load.meta_shapes"],
                stdin=asked,
                env={**os.environ, **quiet, "PYTHONPATH": python_path(os.environ)},
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
                preexec_fn=before_exec(signal.SIGKILL),
            )
    except subprocess.TimeoutExpired:
        raise PlanError(f"{python} did not find {shapes} in {timeout_s:.0f} s.", HINT) from None
    except OSError as error:
        raise PlanError(f"{python} does not run, to find {shapes}: {error.strerror}.", HINT) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise PlanError(f"{python} cannot find {shapes}: {reason.rstrip('.')}.", HINT)
    answer: JsonObject = json.loads(done.stdout.strip().splitlines()[-1])
    if "problem" in answer:
        hint = HINT
        if answer["known"]:
            hint = "a causal language model."
        raise PlanError(f"{answer['problem']}.", hint)
    return Built(shape_from_tensors(answer["sizes"], answer["tensors"]), tuple(answer["notes"]))


def shape_from_tensors(config: TransformersConfig, tensors: Mapping[str, Iterable[int]]) -> ModelShape:
    """The shape of a decoder-only model, from sizes under their usual names and the shapes of its tensors (for example
    from the headers of its checkpoint)."""
    fields, shapes = ConfigFields(config), {name: tuple(shape) for name, shape in tensors.items()}
    hidden = fields.size("hidden_size", fields.count("n_embd"))
    heads = fields.size("num_attention_heads", fields.count("n_head"))
    tied = fields.flag("tie_word_embeddings", True) or not any(name.endswith(HEADS) for name in shapes)
    vocab = fields.size("vocab_size")
    return ModelShape(
        family=str(config.get("model_type")),
        num_layers=fields.size("num_hidden_layers", fields.count("n_layer")),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=fields.size("num_key_value_heads", heads),
        head_dim=fields.size("head_dim", hidden // heads),
        vocab_size=vocab,
        intermediate_size=fields.size("intermediate_size", fields.count("n_inner") or 4 * hidden),
        max_position_embeddings=fields.count("max_position_embeddings") or fields.count("n_positions"),
        tied=tied,
        gated_mlp=True,
        parallel_attention=False,
        expanded_cache=False,
        parameters=tuple(
            Parameter(name, shape, _cut(name, shape, vocab))
            for name, shape in shapes.items()
            if not (tied and name.endswith(HEADS))
        ),
        experts=(fields.size("num_experts", 1), fields.size("num_experts_per_tok", 1)),
        windows=tuple(config.get("windows") or ()),
    )


def _cut(name: str, shape: tuple[int, ...], vocab: int) -> Cut:
    """Matrices in layers, and stacks of them, can be cut; which way is not known, and does not change the bytes."""
    if layer_of(name) is not None:
        if len(shape) > 1:
            return "column"
        return "whole"
    if len(shape) == 2 and shape[0] == vocab:
        if name.endswith(HEADS):
            return "head"
        return "embedding"
    return "whole"
