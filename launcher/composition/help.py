"""The text of `--help`: the groups and their options as they are in `conf/`, and example commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.composition.presets import conf_dir, groups, options
from launcher.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLES = (
    ("two processes shard the embedded model and answer the default prompts", "backend=fsdp devices=2"),
    ("the plan of a large model, without starting anything", "model=falcon_40b devices=4 precision=bf16 dry_run=true"),
    ("your own prompts and model", "model.path=/models/my-llama prompts=file prompts.path=questions.txt"),
    ("a job on two nodes of a SLURM cluster", "launch=slurm num_nodes=2 cluster=example"),
    (
        "reproduce a published benchmark; `python -m launcher.experiments` lists them",
        "experiment=falcon_40b_fsdp_2xa6000",
    ),
    ("a sweep, each point in a fresh process, one table at the end", "-m backend=fsdp,transformers devices=1,2"),
)


def version() -> str:
    """The version of the launcher."""
    return f"launcher {__version__}"


def text(config_dirs: Sequence[str] = ()) -> str:
    """The whole help, including the options in the user's own folders."""
    width = max(map(len, groups()))
    choices = "\n".join(f"  {group:<{width}}  {' | '.join(options(group, config_dirs))}" for group in groups())
    examples = "\n".join(f"  # {purpose}\n  python -m launcher {command}".rstrip() for purpose, command in EXAMPLES)
    lines = (conf_dir() / "config.yaml").read_text(encoding="utf-8").splitlines()
    start = lines.index("  - experiment: null") + 1  # the first line after the list of groups
    defaults = "\n".join(f"  {line}".rstrip() for line in lines[start:] if line)
    return f"""\
Split a causal language model over devices, run a prompt set through it, report tokens/s and the memory of each device.

usage: python -m launcher [-m] [GROUP=OPTION ...] [KEY=VALUE ...]

  -m, --multirun      a=1,2 b=x,y are the points of a sweep
  --cfg               print the composed configuration and stop
  --json              print one JSON object and nothing else
  --config-dir DIR    a folder of your own configuration files, searched beside the built-in ones
  --help, --version

groups (python -m launcher GROUP=OPTION)
{choices}

keys and their defaults (python -m launcher KEY=VALUE, nested ones as sampling.max_new_tokens=64)
{defaults}

examples
{examples}

Under torchrun, srun, mpirun, deepspeed or accelerate launch the same command joins the ranks that they started.
Exit code: 0 every run is ok, 1 a run failed, 2 something to mend first (one line says what)."""
