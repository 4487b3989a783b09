"""Compiled decode steps: whole by inductor, layer by layer if the layers are sharded, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import command_line, ranks_of


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "ranks"), [("transformers", 1), ("tensor_parallel", 2), ("fsdp", 2)])
def test_steps_by_inductor_give_the_same_tokens(backend: str, ranks: int, tmp_path: Path) -> None:
    ended = ranks_of("compile_program.py", ranks, backend, str(ranks), str(tmp_path), timeout=280)
    assert ended.code == 0, ended.err[-3000:]
    for rank in range(ranks):
        seen = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert seen["compilation"]["way"] == "inductor"
        assert seen["compilation"]["note"] is None
        assert seen["compilation"]["seconds"] > 0
        assert seen["compiled"] == seen["eager"]
        assert seen["graphs"] > 0, "something was compiled"
        assert seen["graphs in a measure"] == 0, "and nothing when the clocks run"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["backend=transformers", "measure.compile=cudagraph"], "captures kernels of CUDA, and this run is on CPUs."),
        (["backend=vllm", "measure.compile=none"], "measure.compile=none: backend=vllm does not use it."),
        (
            ["backend=fsdp", "measure.scheduling=static", "measure.compile=inductor"],
            "measure.compile=inductor: measure.scheduling=static does not use it.",
        ),
        (
            ["backend=fsdp", "speculative=ngram", "measure.compile=inductor"],
            "measure.compile=inductor: steps of speculative decoding cannot be compiled.",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(overrides: list[str], line: str, tmp_path: Path) -> None:
    ended = command_line(*overrides, "model=tiny_llama", "accelerator=cpu", f"output_dir={tmp_path / 'runs'}")
    assert ended.code == 2
    assert line in ended.err
    assert not (tmp_path / "runs").exists()


def test_inductor_needs_a_compiler(tmp_path: Path) -> None:
    ended = command_line(
        "backend=transformers", "model=tiny_llama", "accelerator=cpu", "devices=1", "measure.compile=inductor",
        f"output_dir={tmp_path / 'runs'}", PATH=str(tmp_path), CXX="",
    )  # fmt: skip
    assert ended.code == 2
    assert "generates C++, but there is no compiler (g++ or clang++). HINT: apt-get install g++" in ended.err
