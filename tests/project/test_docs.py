"""Checks the documentation: every command in it composes, every link has a target."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from running import ROOT
from torch.distributed.run import parse_args as parse_torchrun

from launcher import compare, plan, probe, status
from launcher.__main__ import Arguments
from launcher.composition.compose import compose_run
from launcher.composition.help import EXAMPLES
from launcher.composition.sweeps import expand_sweep
from launcher.compress.request import read_request
from launcher.config.schema import ConfigError
from launcher.doctor.__main__ import parse as parse_doctor
from launcher.experiments import parse as parse_experiments
from launcher.history import parse as parse_history
from launcher.launch.nodes import check_nodes
from launcher.report.__main__ import parse as parse_report
from launcher.reproduce import parse as parse_reproduce
from launcher.serve.__main__ import parse as parse_served
from launcher.verify import parse as parse_verify

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:python|torchrun[^\n#`]*?) -m launcher\b[^\n#`]*")


def commands() -> list[str]:
    """Every command in the pages and in the help."""
    found = {text.strip() for page in PAGES for text in COMMAND.findall(page.read_text())}
    return sorted(found | {f"python -m launcher {arguments}".strip() for _, arguments in EXAMPLES})


def compose(words: list[str]) -> None:
    arguments = Arguments.parse(words)
    overrides = list(arguments.overrides)
    for point in expand_sweep(overrides) if arguments.multirun else [overrides]:
        config = compose_run(point, arguments.config_dirs)
        if config.launch.rendezvous is not None:
            check_nodes(config)


def show_plan(words: list[str]) -> None:
    if words != ["--help"]:  # argparse exits on --help
        assert plan.main(words) == 0


def parse_serve(words: list[str]) -> None:
    compose(parse_served(words).overrides)


PARSERS: dict[str, Callable[[list[str]], object]] = {
    "launcher": compose, "launcher.plan": show_plan, "launcher.probe": probe.parse, "launcher.compare": compare.parse,
    "launcher.doctor": parse_doctor, "launcher.report": parse_report,
    "launcher.experiments": parse_experiments, "launcher.status": status.parse, "launcher.serve": parse_serve,
    "launcher.compress": lambda words: words and read_request(words),
    "launcher.history": parse_history,
    "launcher.verify": parse_verify,
    "launcher.reproduce": parse_reproduce,
}  # fmt: skip


def understand(command: str) -> None:
    """Parse the command as the called program would; raises if the command is wrong."""
    words = shlex.split(command)
    module, rest = words[2], words[3:]
    if words[0] == "torchrun":
        asked = parse_torchrun(words[1:])
        assert asked.module
        module, rest = asked.training_script, asked.training_script_args
    PARSERS[module](rest)


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    understand(command)


@pytest.mark.parametrize(
    "command",
    [
        "python -m launcher devices=1,2",
        "python -m launcher --multi devices=1,2",
        "python -m launcher num_nodes=2 launch.rendezvous=node1:29400",
        "python -m launcher.plan model=falcon_40b machines=2xa6001",
        "python -m launcher.probe device=2",
        "python -m launcher.compare RUN_A",
        "python -m launcher.doctor --yaml",
        "python -m launcher.status --watch RUN_DIR",
        "python -m launcher.finish RUN_DIR",
        "torchrun --processes 2 -m launcher backend=fsdp",
        "torchrun --nproc-per-node 2 -m launcher backend=fspd",
    ],
)
def test_a_wrong_command_would_be_seen(command: str) -> None:
    assert COMMAND.fullmatch(command)
    with pytest.raises((ConfigError, SystemExit, AssertionError, KeyError)):
        understand(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
