"""The structure of the code, read from its syntax trees: which module imports which, and lengths of files and
functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from running import ROOT

from launcher.config.engines import BUILT_IN

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGES = ("launcher", "shards")
MOST_LINES_OF_A_FILE = 299
MOST_LINES_OF_A_FUNCTION = 60

HEAVY = {"torch", "transformers", "accelerate", "lightning", "litgpt", "deepspeed", "vllm"}
"""Packages that take seconds to import, and are not installed on a machine that only plans or reports."""

TENSORS = {
    "launcher.backends.deepspeed.backend",
    "launcher.backends.deepspeed.all_reduce",
    "launcher.backends.deepspeed.zero",
    "launcher.backends.fsdp.backend",
    "launcher.backends.litgpt.backend",
    "launcher.backends.litgpt.convert",
    "launcher.backends.litgpt.lora",
    "launcher.compress.calibrated",
    "launcher.compress.gradients",
    "launcher.compress.streamed",
    "launcher.backends.module",
    "launcher.backends.tensor_parallel.backend",
    "launcher.backends.transformers.backend",
    "launcher.backends.vllm.worker",
    "launcher.backends.decode",
    "launcher.backends.sampling",
    "launcher.backends.drafts",
    "launcher.backends.slots.drafting.acceptance",
    "launcher.backends.slots.attention",
    "launcher.backends.slots.drafting.guesses",
    "launcher.backends.slots.drafting.speculation",
    "launcher.backends.slots.cache",
    "launcher.backends.slots.compilation",
    "launcher.backends.slots.decoder",
    "launcher.backends.slots.queue",
    "launcher.backends.slots.device",
    "launcher.backends.slots.static",
    "launcher.backends.slots.straight",
    "launcher.backends.trace",
    "launcher.launch.forks",
    "launcher.launch.join",
    "launcher.serve.rank",
    "launcher.backends.memory",
    "shards.load.blocks",
    "shards.load.conversion",
    "shards.parallel.adapters",
    "shards.parallel.collectives",
    "shards.parallel.families",
    "shards.parallel.fully_shard",
    "shards.parallel.fused",
    "shards.parallel.packed",
    "shards.parallel.products",
    "shards.parallel.shared_layers",
    "shards.load.quantized.bitsandbytes_quantizers",
    "shards.load.disk",
    "shards.load.quantized.integer_quantizers",
    "shards.load.quantized.stored",
    "shards.load.load",
    "shards.load.quantized.quantizers",
    "shards.load.meta",
    "shards.load.meta_shapes",
    "shards.parallel.probe",
    "shards.machine.process_group",
    "shards.load.random_weights",
    "shards.load.ring",
    "shards.load.slices",
    "shards.load.torch_files",
    "shards.load.quantized.widened_quantizers",
    "shards.parallel.tensor_parallel",
}
"""The modules that may import a heavy package, directly or through each other; all others must not."""

LAZY = {
    ("launcher", "launcher.api"): "the package is light to import, as every rank does",
    ("launcher.config.engines", "*"): "an engine is imported when it is used",
    ("launcher.launch.forks", "*"): "the module of the ranks is named by the command",
    ("shards.load.quantized.quantizers", "*"): "bitsandbytes is imported where its quantizers are used",
    ("launcher.backends.vllm.options", "vllm"): "as its backend, after the environment was set",
    ("launcher.backends.vllm.requests", "vllm"): "as its backend, after the environment was set",
    ("launcher.backends.vllm.startup", "vllm"): "as its backend, after the environment was set",
    ("launcher.backends.vllm.engine", "psutil"): "the doctor reads an engine's packages before any are installed",
    ("launcher.__main__", "launcher.launch.join"): "a rank may import torch, the process that launches may not",
    ("launcher.backends.vllm.backend", "vllm"): "vLLM reads the environment on import; the backend sets it first",
    ("launcher.prompts.prompts", "launcher.prompts.chat"): "only chats need Jinja",
    ("launcher.compress.__main__", "launcher.compress.streamed"): "what is wrong with a request is said before torch",
    ("launcher.report.__main__", "launcher.report.page.sections"): "tables need no matplotlib",
    ("launcher.report.__main__", "launcher.report.page.figures"): "tables need no matplotlib",
    ("launcher.doctor.importing", "*"): "to import, and to see what comes of it, is what it is for",
}
"""(module, what it imports inside functions): the reason. * is an import by a computed name."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the two packages by its name."""
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def walk(node: ast.AST, into_functions: bool = True, into_types: bool = True) -> Iterator[ast.AST]:
    """The nodes below `node`, optionally without the bodies of functions and of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not into_functions:
            continue
        if is_type_checking(child) and not into_types:
            continue
        yield child
        yield from walk(child, into_functions, into_types)


def imported(node: ast.AST) -> list[str]:
    """The names of the modules that one statement imports; for modules of this project, the full names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        parts = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
        rest = len(parts) < len(node.names)
        return sorted(parts) + ([node.module] if rest else [])
    return []


def imports(name: str, into_functions: bool, into_types: bool) -> set[str]:
    nodes = walk(tree(modules()[name]), into_functions, into_types)
    return {found for node in nodes for found in imported(node)}


def top(name: str) -> str:
    return name.partition(".")[0]


def test_shards_knows_nothing_of_the_launcher() -> None:
    strays = {
        name: sorted(found)
        for name in modules()
        if top(name) == "shards"
        and (found := {other for other in imports(name, True, True) if top(other) == "launcher"})
    }
    assert strays == {}


@pytest.mark.parametrize("into_types", [False, True], ids=["at run time", "with the types"])
def test_imports_point_one_way(into_types: bool) -> None:
    graph = {name: imports(name, True, into_types) & modules().keys() for name in modules()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' <- '.join(error.args[1])}")
    assert sorted(order) == sorted(modules())


def test_no_relative_imports() -> None:
    strays = [
        name
        for name in modules()
        for node in walk(tree(modules()[name]))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert strays == []


def lazy_imports(node: ast.AST, inside: bool = False) -> Iterator[str]:
    """The imports inside functions: our modules by full name, others by package, * for a computed name."""
    for child in ast.iter_child_nodes(node):
        if inside:
            names = imported(child)
            if isinstance(child, ast.Call) and ast.unparse(child.func) in ("importlib.import_module", "__import__"):
                known = isinstance(child.args[0], ast.Constant)
                names = [ast.literal_eval(child.args[0])] if known else ["*"]
            yield from (name if name in modules() else top(name) for name in names)
        yield from lazy_imports(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def test_functions_import_only_what_is_listed() -> None:
    found = {(name, what) for name, path in modules().items() for what in lazy_imports(tree(path))}
    assert found - LAZY.keys() == set()
    assert LAZY.keys() - found == set(), "no longer needed in the list"


def test_only_named_modules_import_heavy_packages() -> None:
    heavy = {name for name in modules() if HEAVY & set(map(top, imports(name, False, False)))}
    while more := {name for name in modules() if name not in heavy and imports(name, False, False) & heavy}:
        heavy |= more
    assert heavy - TENSORS == set()
    assert TENSORS - heavy == set(), "no longer needed in the list"


def test_one_module_asks_the_driver() -> None:
    assert [name for name in modules() if "pynvml" in imports(name, True, True)] == ["shards.machine.nvml"]


COMMANDS = (
    "launcher.__main__", "launcher.compare", "launcher.doctor.__main__", "launcher.plan", "launcher.launch.slurm.end",
    "launcher.status", "launcher.rank.worker", "launcher.serve.__main__", "launcher.history", "launcher.verify",
    "launcher.reproduce",
)  # fmt: skip


def test_commands_start_without_heavy_packages() -> None:
    program = f"import sys, {', '.join(COMMANDS)}; print(*sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []


def sources() -> list[Path]:
    return [*modules().values(), *sorted((ROOT / "scripts").rglob("*.py"))]


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES_OF_A_FILE} == {}


def test_functions_are_short() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": count
        for path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (count := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    }
    assert long == {}


ENGINE_ROOMS = ("launcher.backends.", "shards.engines.", "launcher.config.engines")
SAME_NAMES = {
    ("shards.machine.shared_memory", "vllm"): "the package, whose operators serve other engines",
    ("shards.machine.world", "deepspeed"): "the launcher of that name, which starts ranks of any engine",
    ("launcher.results.record", "fsdp"): "a scheme in records of version 1",
    ("launcher.results.record", "tensor_parallel"): "a scheme in records of version 1",
}
"""Places where the name of an engine is a text with another meaning."""


def test_engines_are_named_in_their_own_rooms_and_the_registry_only() -> None:
    found = {
        (name, node.value)
        for name, path in modules().items()
        if not name.startswith(ENGINE_ROOMS)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and node.value in BUILT_IN
    }
    assert found == SAME_NAMES.keys()
