"""`python -m launcher.experiments`: published benchmarks that can be reproduced, beside what their hardware allows."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from launcher.composition.compose import compose_run
from launcher.composition.presets import options
from launcher.config.machine import machine_of
from launcher.prepare.experiments import published_figures
from launcher.report.layout import console
from launcher.report.published_table import LABELS, figure_text
from launcher.system.terminal import Parser, run_command
from shards.errors import UserError
from shards.machine.cards import cuda_devices, short_name

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from launcher.config.schema import RunConfig

INTRODUCTION = """\
# Reproducing published benchmarks

Written by `python -m launcher.experiments --markdown`. Each preset in `conf/experiment/` is a complete configuration:

    python -m launcher experiment=falcon_40b_fsdp_2xa6000                       # on the published hardware
    python -m launcher experiment=falcon_40b_fsdp_2xa6000 model=tiny_falcon     # a rehearsal on any machine
    python -m launcher experiment=falcon_40b_fsdp_2xa6000 model.weights=random  # without downloading weights

One command rehearses all presets of an article: [rehearsals.md](rehearsals.md).

The limit is that of the published hardware: the highest speed that memory bandwidth, arithmetic and links allow, the
shortest time, or the planned memory (without CUDA context and libraries). Machines are compared by their shares of the
limit. If a source does not name its card, there is no share, and a figure is only compared with the fastest card of its
time.
"""


def parse(argv: Sequence[str] | None) -> Namespace:
    """Parse the command line; ConfigError for mistakes."""
    parser = Parser(prog="python -m launcher.experiments", description=(__doc__ or "").partition(": ")[2])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--markdown", action="store_true", help="print docs/reproduce.md")
    kind.add_argument("--json", action="store_true", help="print everything as one JSON object")
    return parser.parse_intermixed_args(argv)


def runs_here(config: RunConfig, cards: Sequence[str]) -> str:
    """A short text that says whether this machine can run the experiment as published."""
    experiment = config.experiment
    if experiment.needs:
        return f"needs {', '.join(experiment.needs)}"
    if len(cards) < config.devices:
        return "rehearse"
    if experiment.hardware is None:
        return "yes"
    _, published_card = machine_of(experiment.hardware)
    if set(cards[: config.devices]) == {published_card}:
        return "yes"
    return "on other cards"


def markdown(configs: Sequence[RunConfig]) -> str:
    """The text of docs/reproduce.md."""
    parts = [INTRODUCTION]
    for config in configs:
        experiment = config.experiment
        hardware = experiment.hardware or "not named by the source"
        parts.append(f"## {experiment.name}\n\n{experiment.about}. Hardware: {hardware}.\n")
        parts.append("| figure | published | limit there | share |\n|---|--:|--:|--:|")
        figures = published_figures(config)
        for figure in figures:
            value, limit, share = figure_text(figure)
            parts.append(f"| {LABELS[figure.name]} | {value} | {limit} | {share} |")
        lines = [f"Source: {experiment.source}; {experiment.location}."]
        lines += [f"Above the limit: {figure.objection}." for figure in figures if figure.objection]
        if experiment.unknown:
            lines.append(f"Not known: {', '.join(experiment.unknown)}.")
        if experiment.needs:
            lines.append(f"Not supported yet: {', '.join(experiment.needs)}.")
        parts.append("\n" + "\n".join(f"- {line}" for line in [*lines, *experiment.notes]) + "\n")
    return "\n".join(parts)


def show(configs: Sequence[RunConfig], cards: Sequence[str]) -> None:
    """Print a row for each published figure."""
    table = Table("experiment", "figure", "published", "limit there", "share", "here")
    for config in configs:
        name, here = config.experiment.name, escape(runs_here(config, cards))
        for figure in published_figures(config, asks=False):
            table.add_row(name, LABELS[figure.name], *figure_text(figure), here)
            name = here = ""  # only in the first row of an experiment
    console().print(table)
    console().print("python -m launcher experiment=NAME; rehearse one anywhere with model=tiny_falcon", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 with one line on stderr for a mistake that the user can fix."""
    try:
        arguments = parse(argv)
        configs = [compose_run([f"experiment={name}"]) for name in options("experiment")]
        cards = [short_name(device.name) for device in cuda_devices(os.environ)]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.markdown:
        print(markdown(configs), end="")
    elif arguments.json:
        rows = [
            {**asdict(config.experiment), "here": runs_here(config, cards), "figures": list(map(asdict, figures))}
            for config in configs
            for figures in [published_figures(config, asks=False)]
        ]
        print(json.dumps({"experiments": rows}))
    else:
        show(configs, cards)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
