"""Changes of speed: what counts as a difference, rules for continuous integration, other differences of two runs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from launcher.backends.base import DeviceMemory
from launcher.results.changes import FigureChange, Rule, Values, change_of, changes, other_circumstances
from launcher.results.comparison import Difference
from launcher.results.figures.metrics import ROWS, figures
from launcher.results.measured import Repeat
from launcher.results.record import RankRecord, Record
from launcher.system.environment import Environment, GitState, Gpus
from shards.errors import UserError

STEPS = 32
NOISE = (
    0.9954, 1.0290, 1.0124, 0.9836, 1.0276, 1.0252, 0.9881, 0.9868, 0.9908, 1.0109, 1.0356, 1.0462, 1.0232, 0.9983,
    1.0117, 1.0174, 0.9999, 0.9832, 0.9977, 0.9879, 0.9932, 1.0271, 1.0011, 0.9958, 1.0110, 0.9927, 0.9941, 1.0086,
    1.0096, 0.9858, 1.0031, 0.9883, 0.9991, 0.9902, 1.0227, 0.9814, 0.9941, 1.0034, 1.0001, 1.0121,
)  # fmt: skip
"""Seconds of 40 repeats of `backend=dummy backend.step_s=0.02` on two busy cores, divided by their median."""


def measured(walls: list[float], load_s: float = 1.0, memory: int = 100, notes: tuple[str, ...] = ()) -> Record:
    """The record of a run with one prompt, whose repeats took `walls` seconds."""
    repeats = tuple(
        Repeat(
            number=number,
            wall_s=wall_s,
            prefill_s=wall_s / STEPS,
            decode_s=wall_s * (STEPS - 1) / STEPS,
            completions=1,
            prompt_tokens=4,
            new_tokens=STEPS,
            decode_steps=STEPS - 1,
            lengths=((4, STEPS),),
            ttft_s=(wall_s / STEPS,),
            itl_s=(wall_s / STEPS,) * (STEPS - 1),
            same_tokens=True,
            e2el_s=(wall_s,),
            counters={ROWS: 100.0},
        )
        for number, wall_s in enumerate(walls)
    )
    own = figures([[repeat] for repeat in repeats], 1, 1)
    assert own is not None
    return Record(
        status="ok",
        backend="dummy",
        model="tiny",
        precision="fp32",
        world_size=1,
        num_devices=1,
        num_nodes=1,
        batch_size=1,
        config={"backend": {"name": "dummy"}, "seed": 0, "output_dir": "runs"},
        load_s=load_s,
        metrics=own.metrics,
        ranks=(RankRecord(0, "ok", "host", 1, repeats=repeats),),
        devices=(DeviceMemory(0, "cuda:0", peak_allocated_bytes=memory),),
        notes=notes,
    )


def different(parts: list[FigureChange]) -> list[str]:
    return [change.name for change in parts if change.is_different]


def test_a_slow_down_of_ten_percent_is_told_from_noise_in_each_of_20_pairs() -> None:
    draw = random.Random(16)

    def walls(factor: float = 1.0) -> list[float]:
        return [factor * wall_s for wall_s in draw.choices(NOISE, k=5)]

    equal = [different(changes(measured(walls()), measured(walls()))) for _ in range(20)]
    slower = [different(changes(measured(walls()), measured(walls(1.1)))) for _ in range(20)]
    assert equal == [[]] * 20
    assert (
        slower
        == [["new_tokens_per_s", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "itl_s", "tpot_s", "e2el_s"]]
        * 20
    )


@pytest.mark.parametrize(
    ("name", "base", "new", "is_different", "verdict"),
    [
        ("new_tokens_per_s", (10, 10.1, 9.9), (8.8, 8.8, 8.7), True, "12 % slower, outside the spread of both"),
        ("new_tokens_per_s", (10, 10.1, 9.9), (11, 11.1, 11.05), True, "10 % faster, outside the spread of both"),
        ("new_tokens_per_s", (10, 12, 8), (8.8, 8.9, 8.7), False, "no difference beyond the spread"),
        ("new_tokens_per_s", (10, 10.6, 10), (9.8, 9.2, 9.9), False, "no difference beyond the spread"),
        ("new_tokens_per_s", (10, 10, 10), (9.9, 9.9, 9.9), False, "no difference beyond the spread"),
        ("ttft_s", (0.1, 0.1, 0.1), (0.05, 0.05, 0.05), True, "50 % shorter, outside the spread of both"),
        ("load_s", (2,), (2.5,), None, "25 % longer, of single values: the spread is not known"),
        ("peak_allocated_bytes", (100,), (103,), None, "3 % more"),
        ("peak_allocated_bytes", (100,), (100,), None, "equal"),
        ("kv_cache_bytes", (0,), (0,), None, "equal"),
        ("kv_cache_bytes", (0,), (7,), None, "0 before"),
    ],
)
def test_verdicts(
    name: str, base: tuple[float, ...], new: tuple[float, ...], is_different: bool | None, verdict: str
) -> None:
    change = change_of(name, base, new)
    assert (change.is_different, change.verdict) == (is_different, verdict)


def test_all_figures_of_two_runs() -> None:
    found = changes(measured([1.0, 1.0], load_s=2.0), measured([2.0, 2.0], load_s=2.0, memory=150))
    assert {(one.name, one.rank): one.ratio for one in found} == pytest.approx(
        {
            ("new_tokens_per_s", None): 0.5,
            ("prefill_tokens_per_s", None): 0.5,
            ("decode_tokens_per_s", None): 0.5,
            ("ttft_s", None): 2.0,
            ("itl_s", None): 2.0,
            ("tpot_s", None): 2.0,
            ("e2el_s", None): 2.0,
            ("load_s", None): 1.0,
            (ROWS, None): 1.0,
            ("peak_allocated_bytes", 0): 1.5,
        }
    )
    assert found[0].base == Values(32.0, 32.0, 32.0, 2)


def test_a_figure_without_repeats_is_not_guessed() -> None:
    base = measured([1.0, 1.0])
    assert [one.name for one in changes(base, replace(base, metrics=None, ranks=(), devices=()))] == ["load_s"]


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ("new_tokens_per_s<0.95", ["b against a: new_tokens_per_s is 0.500 of the base, which is < 0.95."]),
        ("new_tokens_per_s < .5", []),
        ("new_tokens_per_s<=0.5", ["b against a: new_tokens_per_s is 0.500 of the base, which is <= 0.5."]),
        ("peak_allocated_bytes>1", ["b against a: peak_allocated_bytes of rank 0 is 1.500 of the base, which is > 1."]),
        ("ttft_s>=3", []),
    ],
)
def test_rules(rule: str, broken: list[str]) -> None:
    found = changes(measured([1.0, 1.0]), measured([2.0, 2.0], memory=150))
    assert Rule.parse(rule).broken_by(found, "b against a") == broken


def test_rules_that_cannot_be_asked() -> None:
    for text, message in {
        "speed<1": r"--fail-if: speed is not a figure. HINT: one of new_tokens_per_s, ",
        "new_tokens_per_s=1": r"is not a figure, < or >, and a ratio. HINT: --fail-if 'new_tokens_per_s<0.95'",
        "new_tokens_per_s<fast": r"is not a figure, < or >, and a ratio.",
    }.items():
        with pytest.raises(UserError, match=message):
            Rule.parse(text)
    with pytest.raises(UserError, match=r"nvml_used_bytes was not measured in both runs \(b against a\)"):
        Rule.parse("nvml_used_bytes>1").broken_by(changes(measured([1.0]), measured([1.0])), "b against a")


def environment(commit: str, driver: str, torch: str) -> Environment:
    return Environment(
        launcher="1",
        git=GitState(commit, dirty=False),
        python="3",
        executable="python",
        packages={"torch": torch},
        host="host",
        platform="Linux",
        cpu="cpu",
        cpu_count=2,
        memory_bytes=1,
        gpus=Gpus(("A6000",), driver, 13000),
    )


def test_what_else_differs() -> None:
    base = replace(measured([1.0]), environment=environment("a" * 40, "570.1", "2.13"))
    other = replace(
        measured([1.0], notes=("GPU-1: process 7 (python) already held 1.00 GiB when the run began", "another note")),
        config=base.config | {"seed": 1, "output_dir": "elsewhere"},
        environment=environment("b" * 40, "580.1", "2.14"),
    )
    assert other_circumstances(base, base) == []
    assert other_circumstances(base, other) == [
        Difference("seed", 0, 1),
        Difference("commit", "a" * 12, "b" * 12),
        Difference("version of torch", "2.13", "2.14"),
        Difference("driver", "570.1", "580.1"),
        Difference("neighbours", None, "GPU-1: process 7 (python) already held 1.00 GiB when the run began"),
    ]
