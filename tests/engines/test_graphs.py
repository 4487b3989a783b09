"""Steps as CUDA graphs, simulated on a CPU: replays read and write the addresses of the capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded import record_graphs
from test_slots import answered, decoder, fields, made, prompts_of

from launcher.backends.base import Completion, Generation
from launcher.backends.slots import static
from launcher.backends.slots.compilation import compile_steps, differing
from launcher.backends.slots.static import Graphs
from launcher.composition.compose import compose_run
from launcher.config.parts.compiling import Compile
from launcher.config.schema import SamplingConfig
from shards.parallel.families import keep_kv_heads_only

SAMPLING = SamplingConfig(max_new_tokens=10, ignore_eos=True)


@pytest.mark.parametrize("family", ["bloom", "falcon", "gemma2", "llama", "mistral"])
def test_graphs_give_the_tokens_of_other_steps(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several numbers of rows and cache lengths, prompts read in chunks between the steps, wrapped sliding windows
    and free slots; and with other prompts than during the capture."""
    graphs = record_graphs(monkeypatch)
    monkeypatch.setattr(static, "REACHES", 16)
    model = made(family, fields(family))
    keep_kv_heads_only(model)
    engine = decoder(model, 3, 40, 7)
    sets = [prompts_of(lengths) for lengths in ((5, 24, 1, 17, 16, 15, 30), (30, 2, 9, 9))]
    expected = [[item.token_ids for item in answered(engine, prompts, SAMPLING).completions] for prompts in sets]
    assert engine.slots is not None
    with torch.inference_mode():
        engine.slots.static = Graphs(engine.slots)
    assert sorted(engine.slots.static.graphs) == [(rows, reach) for rows in (1, 2, 3) for reach in (16, 32, 40)]
    replayed: list[int] = []
    for graph in graphs:
        replay = graph.replay
        monkeypatch.setattr(graph, "replay", lambda replay=replay, calls=graph.calls: (replay(), replayed.append(1)))
    found = [[item.token_ids for item in answered(engine, prompts, SAMPLING).completions] for prompts in sets]
    assert found == expected
    assert len(replayed) > 20


def config_of(compile: str) -> Any:
    return compose_run(["backend=transformers", "devices=1", f"measure.compile={compile}"])


def test_a_step_that_waits_for_the_device_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a step would make the capture fail, and leave CUDA's allocator in capture mode."""
    graphs = record_graphs(monkeypatch)
    model = made("llama", fields("llama"))
    engine = decoder(model, 2, 40, 2048)
    prompts = prompts_of((5, 3))

    def wait(*_: Any) -> None:
        if torch.cuda.get_sync_debug_mode() == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    model.get_output_embeddings().register_forward_hook(wait)
    monkeypatch.setattr("launcher.backends.slots.compilation.settled", lambda *_: Compile.cudagraph)
    outcome = compile_steps(engine, config_of("auto"), lambda: answered(engine, prompts, SAMPLING))
    assert (outcome.way, outcome.note) == ("none", "RuntimeError: called a synchronizing CUDA operation")
    assert graphs == []
    assert engine.slots is not None
    assert engine.slots.static is None
    assert torch.cuda.get_sync_debug_mode() == "default"


@pytest.mark.parametrize(
    ("products", "gap", "wrong"),
    [("float32", 0.01, 1), ("bfloat16", 0.01, 0), ("bfloat16", 0.5, 1), ("float16", 0.01, 0), ("float32", 0.0, 0),
     ("bfloat16", float("nan"), 1)],
)  # fmt: skip
def test_other_tokens_are_wrong_unless_they_were_as_likely(products: str, gap: float, wrong: int) -> None:
    def generation(*rows: tuple[int, ...]) -> Generation:
        gaps = (3.0, gap, 3.0)
        return Generation(tuple(Completion(i, row, "length", top2_gaps=gaps) for i, row in enumerate(rows)))

    before, after = generation((1, 2, 3), (4, 5, 6)), generation((1, 7, 8), (4, 5, 6))
    assert differing(before, after, getattr(torch, products)) == (1, wrong)
