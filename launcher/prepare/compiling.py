"""Refuse a `measure.compile` that the run or this machine does not support."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from launcher.config.parts.compiling import Compile
from launcher.config.parts.storage import Offload
from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from launcher.config.schema import RunConfig

COMPILERS = ("g++", "clang++")


def check_compile(config: RunConfig, on_cuda: bool) -> None:
    """Raise ConfigError for a compilation mode that is not available."""
    way, backend = config.measure.compile, config.backend
    if way is Compile.inductor and config.launch.name == "local" and not has_compiler():
        fact = f"measure.compile=inductor generates C++, but there is no compiler ({' or '.join(COMPILERS)})."
        raise ConfigError(fact, "apt-get install g++, or measure.compile=none")
    if way is not Compile.cudagraph:
        return
    if not on_cuda:
        fact = "measure.compile=cudagraph captures kernels of CUDA, and this run is on CPUs."
        raise ConfigError(fact, "measure.compile=auto")
    if backend.data_parallel and config.num_devices > 1:
        fact = f"measure.compile=cudagraph: backend={backend.name} gathers layers into different memory in each step."
        raise ConfigError(fact, "measure.compile=inductor, or devices=1")
    if config.offload is not Offload.none:
        fact = (
            f"measure.compile=cudagraph: offload={config.offload.name} copies weights to different memory in each step."
        )
        raise ConfigError(fact, "measure.compile=auto, or offload=none")
    if not backend.one_process_per_device and config.num_devices > 1:
        fact = f"measure.compile=cudagraph captures one card, and backend={backend.name} is one process for all."
        raise ConfigError(fact, "measure.compile=auto, or devices=1")


def has_compiler() -> bool:
    """True if torch's inductor finds a C++ compiler: the one in CXX, or a common one."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), *COMPILERS) if name)
