"""A real SLURM on this one machine, for tests: a controller and a few nodes, isolated from any other SLURM.

Every daemon runs in its own UTS and mount namespaces, with the cluster's `hosts` file mounted over /etc/hosts. All
processes of a job inherit that mount, so it identifies the cluster's processes even after their parents have ended; no
outside process has it. The name of the cluster's folder contains the process that owns the cluster.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from slurm_config import ENTER_NETWORK, ENTER_NODE, config_files, free_subnet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PREFIX = "slt"
PROGRAMS = ("munged", "munge", "unmunge", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "nsenter", "ip")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
PATH = f"{os.defpath}:/usr/local/sbin:/usr/sbin:/sbin"
TMP = tempfile.gettempdir() if len(tempfile.gettempdir()) < 40 else "/tmp"  # a socket's path has at most 107 bytes

Network = Literal["uts", "netns"]
T = TypeVar("T")


class SlurmCluster:
    """A controller and `nodes` nodes n1, n2, ... that are idle once `start` (or `with`) returns.

    Network `uts`: the nodes have their own host names and share the machine's network. `netns`: they also have their
    own addresses on a bridge, and can be cut off. The CPUs, memory and GPUs of the nodes are only declared; the GPUs
    are null devices. Needs root: see `missing`. Several clusters can run at once; those of dead owners are ended first.
    """

    def __init__(
        self, network: Network = "uts", nodes: int = 2, cpus: int = 8, gpus: int = 2, node_timeout_s: int = 30
    ) -> None:
        self.network, self.cpus, self.gpus, self.node_timeout_s = network, cpus, gpus, node_timeout_s
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self.folder = Path()
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def env(self) -> dict[str, str]:
        """This process' environment without the variables of another SLURM, and with those that select this cluster."""
        rest = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return rest | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{rest.get('PATH', '')}:{PATH}"}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout_s: float = 40) -> None:
        """Start all daemons and wait until every node is idle. On failure, stop all and raise RuntimeError with their
        logs."""
        end_stale()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{_owner()}-", dir=TMP))
        self.folder.chmod(0o755)  # munged requires that its socket is accessible
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        try:
            self._configure()
            self._start_daemons()
            wait_until(self._all_idle, timeout_s, "idle nodes", self.node_states)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            logs = "\n".join(f"--- {p.name}\n{p.read_text()[-2000:]}" for p in sorted(self.folder.glob("*.log")))
            self.stop()
            raise RuntimeError(f"SLURM did not start: {error}\n{logs}") from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill every process of the cluster, including those that its jobs left running, and remove its files and
        network links."""
        end_cluster(self.folder)
        for process in self._processes:
            process.wait(timeout=10)
        self._processes.clear()

    def run(
        self, *argv: str | Path, cwd: Path | None = None, timeout_s: float = 60, check: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a client command of the cluster; it and its children are killed after `timeout_s`. `check` is as in
        subprocess."""
        command = [str(word) for word in argv]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, cwd=cwd, env=self.env, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        ) as process:
            try:
                out, err = process.communicate(stdin, timeout=timeout_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if check and process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {out}{err}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def sbatch(self, script: str, *options: str, cwd: Path) -> int:
        """Submit the text of a batch script from `cwd`; returns the job id."""
        return int(self.run("sbatch", "--parsable", *options, cwd=cwd, stdin=script).stdout.split(";")[0])

    def job(self, job_id: int | str) -> dict[str, str]:
        """The fields of the first record of `scontrol show job`; values are cut at the first blank."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job_id)).stdout.splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def squeue(self, form: str = "%i %T") -> list[str]:
        """One line for each pending or running job."""
        return self.run("squeue", "--noheader", "--format", form).stdout.splitlines()

    def node_states(self) -> dict[str, str]:
        """The state of each node as named by `sinfo`; empty if the controller does not answer."""
        try:
            done = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", timeout_s=5, check=False)
        except subprocess.TimeoutExpired:
            return {}
        return dict(line.split() for line in done.stdout.splitlines())

    def wait_state(self, job_id: int | str, *states: str, timeout_s: float = 60) -> dict[str, str]:
        """Wait until the job's state is one of `states`; returns its fields. TimeoutError names the actual state."""

        def reached() -> dict[str, str] | None:
            job = self.job(job_id)
            return job if job["JobState"] in states else None

        found = wait_until(reached, timeout_s, f"job {job_id} {'/'.join(states)}", lambda: self.job(job_id))
        assert found is not None
        return found

    def cut(self, node: str) -> None:
        """Disconnect the node from the network (only `netns`); its processes continue to run."""
        self.run("ip", "link", "set", self._veth(node), "down")

    def mend(self, node: str) -> None:
        """Undo `cut`."""
        self.run("ip", "link", "set", self._veth(node), "up")

    def _veth(self, node: str) -> str:
        return f"{_bridge(self.folder)}{node[1:]}"

    def _configure(self) -> None:
        """Write the daemons' configuration files, with currently free addresses; create the bridge and the devices."""
        hosts = ["ctl", *self.nodes]
        self._addresses = dict.fromkeys(hosts, "127.0.0.1")
        if self.network == "netns":
            subnet, bridge = free_subnet(), _bridge(self.folder)
            self._addresses = {host: f"{subnet}.{10 + i}" for i, host in enumerate(hosts)}
            self.run("ip", "link", "add", bridge, "type", "bridge")
            self.run("ip", "address", "add", f"{self._addresses['ctl']}/24", "dev", bridge)
            self.run("ip", "link", "set", bridge, "up")
        for gpu in range(self.gpus):  # GRES needs device files: copies of /dev/null are enough
            os.mknod(self.folder / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        for name, text in config_files(self.folder, self._addresses, self.cpus, self.gpus, self.node_timeout_s).items():
            (self.folder / name).write_text(text)

    def _start_daemons(self) -> None:
        folder, conf = str(self.folder), str(self.folder / "slurm.conf")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "sock", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "txt"}
        options = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
        self._spawn("ctl", "munged", "--foreground", "--num-threads=2", *options)
        wait_until(self._munge_answers, 20, "munged")
        self._spawn("ctl", "slurmctld", "-D", "-i", "-f", conf)
        for node in self.nodes:
            self._spawn(node, "slurmd", "-D", "-N", node, "-f", conf)

    def _all_idle(self) -> bool:
        if ended := [process.args for process in self._processes if process.poll() is not None]:
            raise RuntimeError(f"a daemon ended at once: {ended}")
        return set(self.node_states().values()) == {"idle"}

    def _munge_answers(self) -> bool:
        made = self.run("munge", "-S", self.folder / "munge.sock", "-n", check=False)
        read = self.run("unmunge", "-S", self.folder / "munge.sock", check=False, stdin=made.stdout)
        return read.returncode == 0

    def _spawn(self, host: str, *argv: str) -> None:
        """Start a daemon on `host`, with its output in `<host>-<program>.log`."""
        own_network = self.network == "netns" and host != "ctl"
        script = "set -e\n" + (ENTER_NETWORK if own_network else "") + ENTER_NODE
        unshare = ["unshare", "--uts", "--mount", *(["--net"] if own_network else [])]
        place = {"NAME": host, "FOLDER": str(self.folder), "ADDRESS": self._addresses[host]}
        links = {"BRIDGE": _bridge(self.folder), "VETH": self._veth(host)} if own_network else {}
        env = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": os.environ.get("HOME", "/root")} | place | links
        with (self.folder / f"{host}-{argv[0]}.log").open("wb") as log:
            command = [*unshare, "sh", "-c", script, "sh", *argv]
            nothing = subprocess.DEVNULL
            self._processes.append(
                subprocess.Popen(
                    command, env=env, cwd="/", stdin=nothing, stdout=log, stderr=log, start_new_session=True
                )
            )


def missing() -> str | None:
    """The reason why no cluster can be started here; None if one can."""
    path = f"{os.environ.get('PATH', '')}:{PATH}"
    if absent := [program for program in PROGRAMS if shutil.which(program, path=path) is None]:
        return f"no SLURM: {', '.join(absent)} not found (Debian: apt-get install {PACKAGES})"
    if os.geteuid() != 0:
        return "no SLURM: starting one needs root"
    command = ["unshare", "--uts", "--mount", "--net", "true"]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return f"no SLURM: {tried.stderr.strip()}" if tried.returncode else None


def wait_until(check: Callable[[], T], timeout_s: float, what: str, explain: Callable[[], object] | None = None) -> T:
    """The first true result of `check`, called every 0.1 s; TimeoutError with `explain()` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := check()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {timeout_s:g} s: {explain() if explain else value}")
        time.sleep(0.1)
    return value


def members(folder: Path) -> Iterator[int]:
    """Process ids of the cluster in `folder`: the processes that have its hosts file mounted."""
    mark = f"/{folder.name}/hosts"
    for mounts in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            if mark in mounts.read_text():
                yield int(mounts.parent.name)
        except OSError:  # the process has ended meanwhile, or is a zombie
            continue


def end_cluster(folder: Path) -> None:
    """Kill all processes of the cluster in `folder`, remove its bridge and the folder; a second call does nothing."""
    if not folder.name.startswith(f"{PREFIX}-"):
        return

    def killed() -> bool:
        alive = list(members(folder))
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return not alive

    wait_until(killed, 20, f"end of the processes of {folder}", lambda: list(members(folder)))
    if Path("/sys/class/net", _bridge(folder)).exists():
        subprocess.run(["ip", "link", "delete", _bridge(folder)], check=False, timeout=10)
    shutil.rmtree(folder, ignore_errors=True)


def end_stale() -> None:
    """End the clusters whose owner process has ended."""
    for folder in Path(TMP).glob(f"{PREFIX}-*-*-*"):
        pid, ticks = folder.name.split("-")[1:3]
        if _start_ticks(pid) != ticks:
            end_cluster(folder)


def _owner() -> str:
    return f"{os.getpid()}-{_start_ticks('self')}"


def _start_ticks(pid: str) -> str | None:
    """The start time of a process, which identifies it uniquely together with its id; None if it does not exist."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _bridge(folder: Path) -> str:
    """The name of the cluster's bridge: at most 15 bytes even with a node's number appended."""
    return f"sl{folder.name.rpartition('-')[2]}"
