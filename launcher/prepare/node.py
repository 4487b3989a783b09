"""Check that this machine has the packages and devices of a run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from launcher.config.machine import other_machine
from launcher.config.schema import Accelerator, ConfigError
from shards.machine.cards import SEE_ALL_CARDS, cuda_devices

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig

WORKER_PACKAGES = ("msgspec", "psutil", "tokenizers", "pynvml")  # packages that a rank needs besides its engine's


def check_node(config: RunConfig) -> bool:
    """True for a run on CUDA; ConfigError for packages or devices that this machine lacks.

    A plan for another machine needs neither. For SLURM the devices of the submitting machine do not matter: the run is
    on CUDA if the job requests GPUs.
    """
    if config.dry_run and (other := other_machine(config)) is not None:
        return other[0].kind == "cuda" and config.backend.uses_devices
    _check_packages(config)
    config.backend.check_here()
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


def _check_packages(config: RunConfig) -> None:
    """Check that the engine's packages are installed, in this environment or in that of `backend.python`; skipped for a
    container."""
    backend, python, key = config.backend, config.backend.python, "backend.python"
    if config.launch.name == "slurm" and (config.cluster.container or config.dry_run):
        return
    if config.launch.name == "slurm" and python is None:
        python, key = config.cluster.python, "cluster.python"
    needed = list(backend.modules())
    if config.world_size > 1 and "torch" not in needed:
        needed.append("torch")  # launcher.launch.forks imports it
    environment = f"for {python}"
    if python is None:
        environment = "here"
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
    else:
        program = "import importlib.util as i, sys; print(*(n for n in sys.argv[1:] if i.find_spec(n) is None))"
        words = [python, "-c", program, *needed, *WORKER_PACKAGES]
        try:
            answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            match error:
                case subprocess.CalledProcessError():
                    last_line = error.stderr.strip().rpartition("\n")[2]
                    reason = f"exit code {error.returncode}, {last_line or 'no message'}"
                case subprocess.TimeoutExpired():
                    reason = f"no answer in {error.timeout:g} s"
                case _:
                    reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{key}={python} does not run here: {reason}.", f"{key}={sys.executable}") from None
        missing = answer.stdout.split()
    if missing:
        raise ConfigError(
            f"backend={backend.name} needs {', '.join(missing)}, which is not installed {environment}.",
            f"{backend.install_hint(missing)}, or {key}= the interpreter of an environment that has it",
        )
