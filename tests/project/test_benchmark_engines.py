"""scripts/benchmark_engines.py with one contestant that answers and one that cannot start."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from running import ROOT, run

PROGRAM = str(ROOT / "scripts" / "benchmark_engines.py")


@pytest.mark.slow
def test_a_round_is_written_and_a_contestant_that_fails_is_named(tmp_path: Path) -> None:
    command = [
        sys.executable, PROGRAM, "--models", "tiny_llama", "--precisions", "fp32", "--ranks", "3", "--repeats", "1",
        "--engines", "transformers,tensor_parallel", "--new-tokens", "3", "--output", str(tmp_path / "benchmarks"),
    ]  # fmt: skip
    ended = run(command, 200, PYTHONPATH=str(ROOT))
    assert ended.code == 0, ended.err[-3000:]
    value = json.loads((tmp_path / "benchmarks.json").read_text())
    [point] = value["points"]
    ours, other = point["rows"]
    assert ours["answers"] == 20
    assert ours["tokens_per_s"] == ours["rounds"][0] > 0
    assert "cannot be divided by 3 devices" in other["failure"]
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| transformers | " in text
    assert f"| tensor_parallel | {other['failure']} |" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmarks.json", "benchmarks.md"]


def test_an_unknown_contestant_is_refused() -> None:
    ended = run([sys.executable, PROGRAM, "--engines", "llama.cpp"], 60)
    assert ended.code == 2
    assert "llama.cpp: not one of model.generate, transformers" in ended.err
