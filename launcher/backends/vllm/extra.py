"""Check `backend.extra` against the arguments of the installed vLLM, read from its source."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

ONLINE = {"fp8_per_tensor": "fp8", "fp8_per_channel": "fp8_channel", "fp8_per_block": "fp8_block"}
"""Quantizations that vLLM makes while it loads plain weights, by its names."""

OURS = {
    "model": "model.path=",
    "tensor_parallel_size": "devices=",
    "dtype": "precision=",
    "seed": "seed=",
    "trust_remote_code": "model.trust_remote_code=",
    "worker_extension_cls": "leave it out",
}
"""Arguments that the launcher sets, and the option to use instead."""


def installed_package(python: str | None) -> Path | None:
    """The folder of the vLLM that an interpreter would import, found without importing it."""
    if python is None:
        spec = importlib.util.find_spec("vllm")
        if spec is None or spec.origin is None:
            return None
        return Path(spec.origin).parent
    program = "import importlib.util as i; print(i.find_spec('vllm').origin)"
    try:
        asked = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return Path(asked.stdout.strip()).parent


def accepted_arguments(package: Path) -> set[str]:
    """The arguments of vllm.LLM and vllm.EngineArgs, read from their source: importing vLLM takes seconds."""
    engine = _class_in(package / "engine" / "arg_utils.py", "EngineArgs")
    fields = {
        node.target.id for node in engine if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    [init] = (
        node.args
        for node in _class_in(package / "entrypoints" / "llm.py", "LLM")
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    return fields | {argument.arg for argument in (*init.args, *init.kwonlyargs)} - {"self"}


def _class_in(path: Path, name: str) -> list[ast.stmt]:
    """The statements of a class in a source file."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def check_extra(package: Path, extra: Mapping[str, Any], options: Collection[str]) -> None:
    """ConfigError for a key of `backend.extra` that vllm.LLM does not have, or that the launcher itself sets.

    `options` are the options of this engine that exist besides `extra`.
    """
    known = accepted_arguments(package)
    for name, value in extra.items():
        if name in OURS:
            raise ConfigError(f"backend.extra.{name} is set by the launcher.", OURS[name])
        if name not in known:
            hint = f"leave {name} out"
            for near in difflib.get_close_matches(name, known, 1):
                hint = f"backend.extra.{near}={value}"
                if near in options:
                    hint = f"backend.{near}={value}"
            raise ConfigError(f"vLLM has no argument {name!r} (backend.extra.{name}).", hint)
