"""`python -m launcher [overrides]`: parse, run, print. Does not import torch."""

from __future__ import annotations

from launcher.system.interrupts import end_quietly_when_interrupted

if __name__ == "__main__":  # first, because the imports below take seconds
    end_quietly_when_interrupted()

import importlib
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from launcher.api import compose, run
from launcher.composition import help as usage
from launcher.composition.compose import command_of
from launcher.composition.overrides import option_like
from launcher.config.schema import ConfigError
from launcher.config.values import to_dict
from launcher.launch.nodes import become_node, check_nodes
from launcher.launch.ranks import worker_command
from launcher.launch.run import start
from launcher.launch.slurm import arrays
from launcher.launch.slurm.arrays import DETACHED, Detached
from launcher.launch.slurm.script import job_of, name_of, sbatch_text
from launcher.launch.sweep import points_of, run_points
from launcher.prepare.node import check_node
from launcher.prepare.prepare import prepare
from launcher.report.comparison_table import show as show_comparison
from launcher.report.dry_run import show_plan
from launcher.report.layout import console, print_json
from launcher.report.rows import CSV, rows_of, write_rows
from launcher.report.run.tables import json_line, show
from launcher.report.sweep_table import show_sweep, sweep_line, varied
from launcher.results.comparison import alike
from launcher.run_dir.finished import read_finished
from launcher.run_dir.run import describe
from launcher.run_dir.run_dir import RunDir
from launcher.system.files import absolute, make_folder
from launcher.system.terminal import Parser, run_command
from shards.errors import UserError, WorldError
from shards.machine.world import World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.config.schema import RunConfig
    from launcher.results.record import Record


PRINTING_S = 3.0
"""Seconds that other ranks leave the first rank of a node to print an error: torchrun ends all ranks when one ends."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The command line: flags (in any position), and the overrides of the configuration in their order."""

    overrides: tuple[str, ...]
    config_dirs: tuple[str, ...]
    multirun: bool
    help: bool
    version: bool
    cfg: bool
    json: bool

    @classmethod
    def parse(cls, argv: Sequence[str] | None) -> Arguments:
        """Parse the command line; ConfigError for an unknown flag.

        `--local_rank=N`, which deepspeed's launcher adds, is ignored.
        """
        parser = Parser(prog="python -m launcher", add_help=False)
        parser.add_argument("overrides", nargs="*")
        parser.add_argument("--config-dir", action="append", dest="config_dirs", default=[])
        parser.add_argument("-m", "--multirun", action="store_true")
        parser.add_argument("-h", "--help", action="store_true")
        for flag in ("--version", "--cfg", "--json"):
            parser.add_argument(flag, action="store_true")
        parsed, unknown = parser.parse_known_intermixed_args(argv)
        for word in unknown:
            if not word.startswith("--local_rank"):
                raise ConfigError(f"{word} is not an option.", option_like(word))
        overrides, config_dirs = tuple(parsed.overrides), tuple(parsed.config_dirs)
        return cls(overrides, config_dirs, parsed.multirun, parsed.help, parsed.version, parsed.cfg, parsed.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every run is ok, 1 if one failed, 2 with a line on stderr for a mistake that the user can fix."""
    world = World()
    try:
        arguments = Arguments.parse(argv)
        if arguments.help:
            print(usage.text(arguments.config_dirs))
            return 0
        if arguments.version:
            print(usage.version())
            return 0
        world = World.from_env(os.environ)
        if arguments.multirun:
            return _sweep(arguments, world)
        began = time.time()
        overrides = list(arguments.overrides)
        if world.launcher != "alone":  # by default one device for each rank that the other launcher started
            overrides = [f"devices={world.local_world_size}", f"num_nodes={world.num_nodes}", *overrides]
        config = compose(*overrides, config_dirs=arguments.config_dirs)
        command = command_of(arguments.overrides, arguments.config_dirs)
        if (arguments.cfg or config.dry_run) and world.rank != 0:
            return 0
        if arguments.cfg:
            return _show_config([config])
        if config.run_dir is not None:  # resume this run with its own configuration
            others = [item for item in overrides if item.partition("=")[0] not in ("resume", "run_dir")]
            if others or not config.resume or world.launcher != "alone":
                fact = "run_dir= resumes a run with its own configuration; only resume=true can be given with it."
                raise ConfigError(fact, "python -m launcher resume=true run_dir=PATH")
            return _report(start(RunDir(absolute(config.run_dir))), began, arguments.json)
        if config.dry_run:
            return _dry_run(config, command)
        if world.launcher != "alone":
            return _join(config, world, command, arguments.json)
        if config.launch.rendezvous is not None:
            check_nodes(config)
            become_node(config, command, check_node(config))
        return _report(run(config, command), began, arguments.json)
    except Detached:
        return DETACHED
    except UserError as error:
        if world.local_rank == 0:  # one rank of each node, since nodes may differ
            print(error, file=sys.stderr)
        else:
            time.sleep(PRINTING_S)
        return 2


def _show_config(configs: Sequence[RunConfig]) -> int:
    """Print the composed configurations, one YAML document for each point of a sweep."""
    several = len(configs) > 1
    print(yaml.safe_dump_all(map(to_dict, configs), sort_keys=False, explicit_start=several), end="")
    return 0


def _sweep(arguments: Arguments, world: World) -> int:
    """Run the points of a sweep, or show their configurations or plans; returns the exit code."""
    if world.launcher != "alone":
        raise WorldError(
            f"-m starts the ranks of each point itself, and {world.launcher} has started {world.world_size}.",
            "leave -m out, or start the sweep alone: python -m launcher -m",
        )
    points = points_of(arguments.overrides, arguments.config_dirs)
    if arguments.cfg:
        return _show_config([point.config for point in points])
    if any(point.config.dry_run for point in points):
        for point in points:
            print(f"\n# {' '.join(point.overrides)}", flush=True)
            _dry_run(point.config, point.command)
        return 0
    records = run_points(points)
    swept = varied([point.overrides for point in points])
    if not arguments.json:
        show_sweep(records, swept, console())
        paths = [Path(record.run_dir) for record in records if record.status == "ok" and record.run_dir]
        for group in alike([read_finished(path) for path in paths]):
            show_comparison(group, console())
    try:
        folder = make_folder(Path(points[0].config.output_dir), f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_sweep")
        ended = []
        for point, record in zip(points, records, strict=True):
            if record.run_dir and Path(record.run_dir).parent == folder.parent:
                ended.append(arrays.Point(point.overrides, run_dir=RunDir(Path(record.run_dir))))
            else:
                ended.append(arrays.Point(point.overrides, record=record))
        arrays.write_points(folder, ended)
        write_rows(folder, rows_of(records))
    except (OSError, UserError) as error:
        print(f"note: the rows of the sweep were not written: {error}", file=sys.stderr)
    else:
        print(f"rows: {folder / CSV}   a page: python -m launcher.report {shlex.quote(str(folder))} --html page.html")
    print_json(sweep_line(records, swept), arguments.json)
    return exit_code(records)


def _report(record: Record, began: float, only_json: bool) -> int:
    """Print a run, with a note if it had finished before `began`; returns the exit code."""
    if record.status == "submitted":
        job = None
        if record.run_dir is not None:
            job = RunDir(Path(record.run_dir)).read_job()
        print_json(json_line(record) | {"job": job}, only_json)
    else:
        show(record, began, only_json)
    return exit_code([record])


def exit_code(records: Sequence[Record]) -> int:
    """0 if all runs are ok or submitted to a cluster, 2 if the only run was refused, 1 otherwise."""
    statuses = [record.status for record in records]
    if all(status in ("ok", "submitted") for status in statuses):
        return 0
    if statuses == ["refused"]:
        return 2
    return 1


def _join(config: RunConfig, world: World, command: tuple[str, ...], only_json: bool) -> int:
    """Run as one of the ranks that another launcher has started; does not return."""
    if config.launch.name == "slurm":
        raise WorldError(f"launch=slurm submits a job, and {world.launcher} has started the ranks.", "launch=local")
    if world.local_world_size * world.num_nodes != world.world_size:
        raise WorldError(
            f"{world.launcher} started {world.world_size} ranks on {world.num_nodes} nodes, "
            f"{world.local_world_size} of them here: not the same number on every node.",
            "as many ranks on each node, for example srun --ntasks-per-node=2",
        )
    if config.devices * config.num_nodes != world.world_size:
        raise WorldError(
            f"devices={config.devices} num_nodes={config.num_nodes} are {config.devices * config.num_nodes} ranks, "
            f"and {world.launcher} started {world.world_size}.",
            f"devices={world.local_world_size} num_nodes={world.num_nodes}, or leave both out",
        )
    if not config.backend.joins_ranks and world.world_size > 1:
        name = config.backend.name
        raise WorldError(
            f"backend={name} runs in one process, and {world.launcher} started {world.world_size}.",
            f"python -m launcher backend={name}",
        )
    if config.measure.find_batch_size:
        fact = f"measure.find_batch_size=true starts ranks itself, and {world.launcher} has."
        raise ConfigError(fact, "measure.find_batch_size=false")
    # Imported here, since it imports torch: a rank needs that, but the launching process must not import it.
    external = importlib.import_module("launcher.launch.join")
    began = time.time()
    code: int = external.join(config, command, world, lambda record: show(record, began, only_json))
    if sys.stdout is not None:  # None if it was closed at start
        sys.stdout.flush()
    os._exit(code)  # engines leave threads behind that can block a normal interpreter exit


def _dry_run(config: RunConfig, command: tuple[str, ...]) -> int:
    """Print the plan and the command; starts nothing and writes nothing."""
    prepared = prepare(config, command)
    out = console()
    show_plan(prepared, out)
    if config.launch.name == "slurm":
        description = describe(prepared)
        print(sbatch_text(job_of(description), name_of(description)))
        return 0
    words = worker_command("launcher.rank.worker", "RUN_DIR", prepared.world_size, config.backend.python)
    out.print("command: " + " ".join(words), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
