"""Check the settings of a SLURM job."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from launcher.composition.quoting import for_shell, quoted
from launcher.config.schema import ConfigError

if TYPE_CHECKING:
    from launcher.config.parts.launching import ClusterConfig

UNSAFE = re.compile(r"[\s\"'\\#]+")
EXAMPLES = {"partition": "gpu", "mem": "64G", "time": "01:00:00"}
TIME = re.compile(r"(\d+-)?\d+(:\d+){1,2}|\d+-\d+|UNLIMITED|INFINITE", re.IGNORECASE)


def check_cluster(cluster: ClusterConfig) -> None:
    """ConfigError for a value that would end a #SBATCH line early, or that SLURM would read differently."""
    for name in ("partition", "account", "qos", "constraint", "reservation", "gpu_type", "mem", "time"):
        if (value := getattr(cluster, name)) and UNSAFE.search(value):
            parts = [part for part in UNSAFE.split(value) if part] or [EXAMPLES.get(name, "null")]
            raise ConfigError(f"cluster.{name}={value!r} has a blank, a quote, \\ or #.", f"cluster.{name}={parts[0]}")
    for name, command in (("extra", "sbatch"), ("srun", "srun")):
        for option in getattr(cluster, name):
            if not option.startswith("-") or "\n" in option:
                words = "-".join(option.split())
                fact = f"{option!r} is not an option of {command}."
                raise ConfigError(fact, for_shell(f"cluster.{name}=[{quoted(f'--{words}')}]"))
    if cluster.time and not TIME.fullmatch(cluster.time):
        total = 3600
        if cluster.time.isdecimal() and len(cluster.time) < 9:
            total = int(cluster.time)
        raise ConfigError(
            f"cluster.time={cluster.time} is not hours, minutes and seconds: YAML reads an unquoted 01:00:00 as 3600.",
            f"cluster.time={total // 3600:02}:{total // 60 % 60:02}:{total % 60:02}, in a file in quotes",
        )
    if cluster.time and (limit := seconds(cluster.time)) is not None and cluster.signal_s >= limit:
        raise ConfigError(
            f"cluster.signal_s={cluster.signal_s} is not before the end of cluster.time={cluster.time}.",
            f"cluster.signal_s={limit // 3}",
        )
    if cluster.gpus_flag not in ("gpus-per-node", "gres", "none"):
        raise ConfigError(f"cluster.gpus_flag={cluster.gpus_flag} is not known.", "cluster.gpus_flag=gpus-per-node")
    if cluster.gpus_flag == "none" and cluster.gpu_type is not None:
        fact = f"cluster.gpu_type={cluster.gpu_type} is not used with cluster.gpus_flag=none."
        raise ConfigError(fact, "cluster.gpus_flag=gpus-per-node")
    if not cluster.requeue and cluster.max_requeues != type(cluster)().max_requeues:
        fact = f"cluster.max_requeues={cluster.max_requeues} is not used with cluster.requeue=false."
        raise ConfigError(fact, "cluster.requeue=true")
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            better = re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("0123456789") or "NAME"
            fact = f"cluster.environment.{name}: {name!r} is not the name of a variable."
            raise ConfigError(fact, for_shell(f"cluster.environment.{better}={cluster.environment[name]}"))


def seconds(time: str) -> int | None:
    """A time limit as SLURM reads it: m:s, h:m:s, d-h, d-h:m, d-h:m:s; None without a limit."""
    if not time[0].isdigit():
        return None
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minutes, rest = (parts + [0, 0])[:3]
    else:
        hours, minutes, rest = [0] * (3 - len(parts)) + parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest
