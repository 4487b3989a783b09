#!/usr/bin/env python3
"""Prints style metrics of a code base as Markdown: `python scripts/measure_style.py [FOLDER ...]`.

Without arguments it measures this project's packages. It uses only the standard library, so that other code bases can
be measured the same way; tests are left out. A branch is an `if`, a loop, an `except`, a ternary, a `case`, a
comprehension's loop or `if`, and each operand of `and` and `or` after the first. A single-use private helper is a
function named `_x` with one use in its module. Ternaries and comprehensions are counted per 1,000 lines that are
neither blank nor comments, `Any` per 1,000 lines of any kind. The share of vague names is the share of assignments
(also by `:=`) to a name in `VAGUE`.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

VAGUE = {
    "found",
    "made",
    "place",
    "places",
    "said",
    "held",
    "one",
    "thing",
    "things",
    "it",
    "what",
    "who",
    "where",
    "own",
}
"""Names that say nothing about their values."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
HINT = "HINT: python scripts/measure_style.py launcher shards"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)


@dataclass
class Counts:
    """Sums over the files of one code base."""

    files: int = 0
    lines: int = 0
    code_lines: int = 0
    code_characters: int = 0
    folders: Counter[str] = field(default_factory=Counter)
    function_lines: list[int] = field(default_factory=list)
    branches: int = 0
    broad_excepts: int = 0
    type_ignores: int = 0
    any_uses: int = 0
    single_use_helpers: int = 0
    ternaries: int = 0
    nested_ternaries: int = 0
    comprehensions: int = 0
    assignments: int = 0
    vague_assignments: int = 0

    def add(self, path: Path) -> None:
        """Count one file."""
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, str(path))
        self.files += 1
        self.folders[str(path.parent)] += 1
        lines = text.splitlines()
        self.lines += len(lines)
        code = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        self.code_lines += len(code)
        self.code_characters += sum(map(len, code))
        self.type_ignores += len(re.findall(r"#\s*type:\s*ignore", text))
        self.single_use_helpers += count_single_use_helpers(tree)
        for node in ast.walk(tree):
            self._add_node(node)

    def _add_node(self, node: ast.AST) -> None:
        if isinstance(node, FUNCTIONS):
            self.function_lines.append((node.end_lineno or node.lineno) - node.lineno + 1)
        if isinstance(node, BRANCHES):
            self.branches += 1
        if isinstance(node, ast.BoolOp):
            self.branches += len(node.values) - 1
        if isinstance(node, ast.IfExp):
            self.ternaries += 1
            self.nested_ternaries += any(isinstance(part, ast.IfExp) for part in (node.body, node.orelse))
        if isinstance(node, COMPREHENSIONS):
            self.comprehensions += 1
            self.branches += sum(1 + len(loop.ifs) for loop in node.generators)
        if isinstance(node, ast.ExceptHandler):
            self.broad_excepts += node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        if isinstance(node, ast.Name) and node.id == "Any":
            self.any_uses += 1
        for name in assigned_names(node):
            self.assignments += 1
            self.vague_assignments += name in VAGUE

    def rows(self) -> list[tuple[str, str]]:
        """The counts by name, as text."""
        functions = len(self.function_lines)
        decile = statistics.quantiles(self.function_lines, n=10, method="inclusive")[-1]
        return [
            ("files / lines", f"{self.files} / {self.lines:,}"),
            ("fullest folder", f"{max(self.folders.values())}"),
            (
                "function median / p90 / max",
                f"{statistics.median(self.function_lines):g} / {decile:g} / {max(self.function_lines)}",
            ),
            ("branches per function", f"{self.branches / functions:.1f}"),
            ("broad except / type-ignore", f"{self.broad_excepts} / {self.type_ignores}"),
            ("`Any` per 1,000 lines", f"{1000 * self.any_uses / self.lines:.1f}"),
            ("single-use private helpers, % of functions", f"{100 * self.single_use_helpers / functions:.0f}"),
            ("characters a line of code", f"{self.code_characters / self.code_lines:.0f}"),
            (
                "ternaries / comprehensions per 1,000 lines",
                f"{1000 * self.ternaries / self.code_lines:.0f} / {1000 * self.comprehensions / self.code_lines:.0f}",
            ),
            ("nested ternaries", f"{self.nested_ternaries}"),
            ("assignments to vague names, %", f"{100 * self.vague_assignments / max(self.assignments, 1):.1f}"),
        ]


def assigned_names(node: ast.AST) -> list[str]:
    """The names that one assignment statement or expression assigns to."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
        targets = [node.target]
    names = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]


def count_single_use_helpers(tree: ast.Module) -> int:
    """The number of functions and methods named `_x` that their module uses exactly once."""
    helpers = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS) and node.name.startswith("_") and not node.name.startswith("__")
    }
    uses: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            uses[node.id] += 1
        elif isinstance(node, ast.Attribute):
            uses[node.attr] += 1
    return sum(uses[name] == 1 for name in helpers)


def source_files(folder: Path) -> list[Path]:
    """The Python files below a folder, without tests."""
    return [path for path in sorted(folder.rglob("*.py")) if not {"test", "tests"} & set(path.parts)]


def main(folders: list[Path]) -> int:
    """Print one table for all folders together."""
    counts = Counts()
    for folder in folders:
        if not folder.is_dir():
            print(f"{folder} is not a folder. {HINT}", file=sys.stderr)
            return 2
        for path in source_files(folder):
            counts.add(path)
    if len(counts.function_lines) < 2:
        print(f"{len(counts.function_lines)} functions are too few for a count. {HINT}", file=sys.stderr)
        return 2
    print("| count | value |\n|---|--:|")
    for name, value in counts.rows():
        print(f"| {name} | {value} |")
    return 0


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    sys.exit(main([Path(word) for word in sys.argv[1:]] or [root / "launcher", root / "shards"]))
