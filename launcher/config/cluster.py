"""Checks of what a SLURM cluster is asked for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from launcher.config.schema import ClusterConfig

TIME = re.compile(r"(\d+-)?\d+(:\d+){1,2}|\d+-\d+|UNLIMITED|INFINITE", re.IGNORECASE)


def check_cluster(cluster: ClusterConfig) -> None:
    """ConfigError for what would end a #SBATCH line early, or mean to SLURM something else than it says."""
    for name in ("partition", "account", "qos", "constraint", "reservation", "gpu_type", "mem", "time"):
        if (value := getattr(cluster, name)) and re.search(r"[\s\"'\\#]", value):
            raise ConfigError(f"cluster.{name}={value!r} has a blank, a quote, \\ or #.", "what sbatch itself takes")
    for option in (*cluster.extra, *cluster.srun):
        if not option.startswith("-") or "\n" in option:
            raise ConfigError(f"{option!r} is not an option of sbatch or srun.", "cluster.extra=['--mail-type=END']")
    if cluster.time and not TIME.fullmatch(cluster.time):
        raise ConfigError(
            f"cluster.time={cluster.time} is not hours, minutes and seconds: YAML reads an unquoted 01:00:00 as 3600.",
            'cluster.time=01:00:00, in a file in quotes: time: "01:00:00"',
        )
    if cluster.time and (limit := seconds(cluster.time)) is not None and cluster.signal_s >= limit:
        raise ConfigError(
            f"cluster.signal_s={cluster.signal_s} is no time before the end of cluster.time={cluster.time}.",
            f"cluster.signal_s={limit // 3}, or 0 for no warning",
        )
    if cluster.gpus_flag not in ("gpus-per-node", "gres", "none"):
        raise ConfigError(f"cluster.gpus_flag={cluster.gpus_flag} is not known.", "gpus-per-node, gres or none")
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ConfigError(f"cluster.environment has {name!r}, which is no variable's name.", "letters, digits, _")


def seconds(time: str) -> int | None:
    """A time limit as SLURM reads it: m:s, h:m:s, d-h, d-h:m, d-h:m:s; None without a limit."""
    if not time[0].isdigit():
        return None
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, rest = (parts + [0, 0])[:3] if days else ([0] * (3 - len(parts)) + parts)
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest
