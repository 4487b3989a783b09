"""Runs as jobs of a real SLURM of two nodes: the status, exit code and completions of each."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from running import Ended, environment, launcher, run
from slurm_cluster import SlurmCluster, missing, wait_until

from launcher.system.files import read_json, read_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(150)]

DUMMY = ("launch=slurm", "backend=dummy", "accelerator=cpu", "launch.poll_s=0.3", "devices=1")
SLOW = ("backend.step_s=0.02", "sampling.max_new_tokens=16", "measure.batch_size=1", "measure.warmup=0")  # 0.3 s a call
PROMPTS = [3, 9, 27, 81, 5, 15, 45, 135, 7, 21, 63, 189]


class Cluster:
    """The launcher on a machine that submits to the cluster, in a new folder with a nasty name."""

    def __init__(self, slurm: SlurmCluster, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.env = {name: slurm.env[name] for name in ("SLURM_CONF", "PATH")}
        texts = "".join(json.dumps({"prompt": "word " * (1 + number % 3)}) + "\n" for number in PROMPTS)
        (folder / "prompts.jsonl").write_text(texts)

    def launch(self, *overrides: str, timeout: float = 100) -> Ended:
        return launcher(*DUMMY, *overrides, timeout=timeout, cwd=self.folder, **self.env)

    def status(self, *arguments: str, timeout: float = 100) -> Ended:
        return run([sys.executable, "-m", "launcher.status", *arguments], timeout, self.folder, **self.env)

    def submit(self, *overrides: str) -> tuple[str, Path]:
        """Submit without waiting; returns the job id and the run directory."""
        done = self.launch("launch.wait=false", *overrides)
        assert done.code == 0, done.err
        said = done.last_json
        assert said["status"] == "submitted"
        return said["job"], Path(said["run_dir"])

    def batches(self, run_dir: Path, count: int) -> None:
        """Wait until `count` completions are saved."""
        wait_until(lambda: len(saved(run_dir)) >= count, 30, "completions", lambda: log(run_dir))


def saved(run_dir: Path) -> list[dict[str, Any]]:
    return [row for path in run_dir.glob("rank_*.completions.jsonl") for row in read_lines(path)]


def log(run_dir: Path) -> str:
    return "\n".join(path.read_text() for path in run_dir.glob("*.log"))


def tokens(run_dir: Path) -> dict[int, list[int]]:
    """The tokens of a run's completions by prompt; checks that none is saved twice."""
    rows = read_lines(run_dir / "completions.jsonl")
    assert len({row["index"] for row in rows}) == len(rows)
    return {row["index"]: row["token_ids"] for row in rows}


Submitted = tuple[Cluster, str, Path]


@pytest.fixture(scope="module", autouse=True)
def limited(
    request: pytest.FixtureRequest, slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Submitted | None]:
    """A job that exceeds its time limit while the other tests run: SLURM checks limits every 30 s, and warns in the
    first half of the minute. None if its test is not selected."""
    if not any(item.name == test_time_limit_is_gone_past.__name__ for item in request.session.items):
        yield None
        return
    cluster = Cluster(slurm, tmp_path_factory.mktemp("limited"))
    limit = ("cluster.time=0:01:00", "cluster.signal_s=30", "cluster.extra=['--nodelist=n2']")
    yield cluster, *cluster.submit(*FILE, *SLOW, "measure.repeats=10", *limit)  # 12 prompts, 0.3 s each
    slurm.run("scancel", "--user=root", "--full", check=False)


@pytest.fixture
def cluster(slurm: SlurmCluster, limited: Submitted | None, tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "o'ne \"t$(touch owned)wo\\\n=%j&"
    folder.mkdir()
    yield Cluster(slurm, folder)

    def left() -> list[str]:
        return [job for job in slurm.squeue("%A") if limited is None or job != limited[1]]

    slurm.run("scancel", "--full", *left(), check=False)
    wait_until(lambda: not left(), 20, "no jobs", slurm.squeue)
    assert not list(tmp_path.rglob("owned")), "a name was run as a command"


MADE: dict[tuple[str, ...], dict[int, list[int]]] = {}


def undisturbed(folder: Path, *overrides: str) -> dict[int, list[int]]:
    """The tokens of the same run without SLURM, on this machine."""
    if overrides not in MADE:
        done = launcher(*DUMMY[1:3], *overrides, "backend.step_s=0", "devices=1", cwd=folder)
        assert done.code == 0, done.err
        MADE[overrides] = tokens(Path(done.last_json["run_dir"]))
    return MADE[overrides]


FILE = ("prompts=file", "prompts.path=prompts.jsonl")


@pytest.mark.slow
def test_two_ranks_on_each_of_two_nodes(cluster: Cluster) -> None:
    done = cluster.launch("num_nodes=2", "devices=2", *FILE)
    assert done.code == 0, done.err
    run_dir = Path(done.last_json["run_dir"])
    record = read_json(run_dir / "record.json")
    hosts = [(rank["rank"], rank["host"], rank["status"]) for rank in record["ranks"]]
    assert hosts == [(0, "n1", "ok"), (1, "n1", "ok"), (2, "n2", "ok"), (3, "n2", "ok")]
    assert tokens(run_dir) == undisturbed(cluster.folder, *FILE)
    job = (run_dir / "slurm_job").read_text().strip()
    state = cluster.slurm.job(job)
    assert (state["JobState"], state["ExitCode"], state["NumNodes"]) == ("COMPLETED", "0:0", "2")
    assert f"job {job}: COMPLETED" in done.err


@pytest.mark.slow
def test_script_is_submitted_again_by_hand(cluster: Cluster) -> None:
    _, run_dir = cluster.submit(*FILE)
    assert cluster.status("--follow", str(run_dir)).code == 0
    first = tokens(run_dir)
    again = cluster.slurm.run("sbatch", "--parsable", "submit.sbatch", cwd=run_dir).stdout.strip()
    cluster.slurm.wait_state(again, "COMPLETED", "FAILED")
    seen = cluster.status(str(run_dir))
    assert (seen.code, seen.last_json["points"]) == (0, {"ok": 1})
    assert (run_dir / "slurm_job").read_text() == f"{again}\n"
    assert tokens(run_dir) == first


@pytest.mark.slow
def test_failing_rank_fails_the_job(cluster: Cluster) -> None:
    done = cluster.launch("num_nodes=2", "backend.fail_at=generate")
    assert done.code == 1
    error = done.last_json["error"]
    assert (error["rank"], error["stage"], error["type"]) == (1, "warmup 1/1", "RuntimeError")
    record = read_json(Path(done.last_json["run_dir"]) / "record.json")
    assert (record["status"], record["ranks"][-1]["host"]) == ("failed", "n2")
    state = cluster.slurm.job((Path(done.last_json["run_dir"]) / "slurm_job").read_text().strip())
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "1:0", "0")


@pytest.mark.slow
def test_killed_rank_fails_the_job(cluster: Cluster) -> None:
    job, run_dir = cluster.submit("num_nodes=2", *FILE, *SLOW)
    cluster.batches(run_dir, 2)
    cluster.slurm.run("kill", "-9", str(read_json(run_dir / "rank_1.progress")["pid"]))
    state = cluster.slurm.wait_state(job, "COMPLETED", "FAILED")
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "1:0", "0")
    record = read_json(run_dir / "record.json")
    assert (record["status"], record["error"]["rank"], record["error"]["type"]) == ("failed", 1, "ProcessDied")


@pytest.mark.slow
def test_hanging_rank_ends_the_run(cluster: Cluster) -> None:
    done = cluster.launch("num_nodes=2", "backend.fail_at=hang", "hang_timeout_s=3", "measure.warmup=0")
    assert done.code == 1
    run_dir = Path(done.last_json["run_dir"])
    record = read_json(run_dir / "record.json")
    assert (record["status"], record["error"]["rank"]) == ("hang", 1), log(run_dir)
    assert "_maybe_hang" in (run_dir / "stacks_rank_1.txt").read_text()
    assert record["ranks"][-1]["host"] == "n2"


@pytest.mark.slow
def test_scancel_is_cancelled(cluster: Cluster) -> None:
    job, run_dir = cluster.submit("num_nodes=2", *FILE, *SLOW)
    cluster.batches(run_dir, 2)
    cluster.slurm.run("scancel", job)
    seen = cluster.status("--follow", str(run_dir))
    assert (seen.code, seen.last_json["points"]) == (1, {"cancelled": 1})
    assert len(tokens(run_dir)) >= 2
    assert cluster.slurm.job(job)["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_job_that_never_ran_is_cancelled(cluster: Cluster) -> None:
    job, run_dir = cluster.submit("num_nodes=5")

    def seen() -> dict[str, int]:
        return cluster.status(str(run_dir)).last_json["points"]

    wait_until(lambda: str(seen()).startswith("{'PENDING (Partition"), 30, "reason that SLURM gives", seen)
    cluster.slurm.run("scancel", job)
    assert seen() == {"cancelled": 1}


def job_numbers(cluster: Cluster) -> set[str]:
    """All jobs that SLURM knows, including finished ones."""
    return set(cluster.slurm.run("squeue", "-h", "-t", "all", "-o", "%A").stdout.split())


@pytest.mark.slow
def test_requeued_jobs_complete_the_set(cluster: Cluster) -> None:
    """One job that is requeued by hand, and one that is preempted by another job."""
    asked = (*FILE, *SLOW, "measure.repeats=2", "cluster.partition=main")
    by_hand = cluster.submit(*asked, "cluster.extra=['--nodelist=n2']")
    cluster.batches(by_hand[1], 3)
    cluster.slurm.run("scontrol", "requeue", by_hand[0])
    pre_empted = cluster.submit(*asked, "cluster.extra=['--nodelist=n1']")
    cluster.batches(pre_empted[1], 3)
    script = "#!/bin/sh\nsleep 1\n"
    cluster.slurm.sbatch(script, "-p", "high", "-w", "n1", "--exclusive", "-o", "/dev/null", cwd=cluster.folder)
    seen = cluster.status("--follow", str(by_hand[1]), str(pre_empted[1]))
    assert (seen.code, seen.last_json["points"]) == (0, {"ok": 2}), log(by_hand[1]) + log(pre_empted[1])
    for job, run_dir in (by_hand, pre_empted):
        state = cluster.slurm.job(job)
        assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1")
        assert tokens(run_dir) == undisturbed(cluster.folder, *FILE, *SLOW[1:])
        assert len(read_json(run_dir / "record.json")["attempts"]) == 2


@pytest.mark.slow
def test_array_of_four_points_one_of_them_impossible(cluster: Cluster) -> None:
    done = cluster.launch("-m", "sampling.max_new_tokens=4,5,6,2000", "cluster.array_limit=2", timeout=140)
    assert (done.code, done.last_json["points"]) == (1, {"ok": 3, "refused": 1}), done.err
    run_dirs = [Path(record["run_dir"]) for record in done.last_json["records"][:3]]
    new = [read_json(path / "record.json")["totals"]["new_tokens"] for path in run_dirs]
    assert new == [length * len(tokens(run_dirs[0])) for length in (4, 5, 6)]
    numbers = [(path / "slurm_job").read_text().strip().partition("_") for path in run_dirs]
    assert (len({number[0] for number in numbers}), [number[2] for number in numbers]) == (1, list("012"))
    [sweep] = (cluster.folder / "runs").glob("*_sweep_of_4")
    later = cluster.status(str(sweep))
    assert (later.code, later.last_json["points"]) == (1, {"ok": 3, "refused": 1})
    lines = [line for line in later.out.splitlines() if line.startswith("│")]
    rows = [line for line in lines if "ok" in line or "refused" in line]
    assert len(rows) == 4
    before = job_numbers(cluster)
    again = cluster.launch("-m", "sampling.max_new_tokens=4,5,6,2000", "resume=true")
    assert (again.code, again.last_json["points"]) == (1, {"ok": 3, "refused": 1}), again.err
    assert job_numbers(cluster) == before, "what is done is not submitted"


@pytest.mark.slow
def test_resumed_sweep_stays_with_the_jobs_that_it_has(cluster: Cluster) -> None:
    sweep = (
        "-m",
        "sampling.max_new_tokens=16,17",
        *FILE,
        *SLOW[:1],
        *SLOW[2:],
        "measure.repeats=2",
        "cluster.array_limit=1",
    )
    begun = cluster.launch(*sweep, "launch.wait=false")
    assert (begun.code, begun.last_json["points"]) == (0, {"submitted": 2}), begun.err
    run_dirs = [Path(record["run_dir"]) for record in begun.last_json["records"]]
    cluster.batches(run_dirs[0], 2)
    before = job_numbers(cluster)
    again = cluster.launch(*sweep, "resume=true")
    assert (again.code, again.last_json["points"]) == (0, {"ok": 2}), again.err
    assert [Path(record["run_dir"]) for record in again.last_json["records"]] == run_dirs
    assert job_numbers(cluster) == before, "one runs, one is queued"
    assert [len(read_json(path / "record.json")["attempts"]) for path in run_dirs] == [1, 1]


def test_what_sbatch_refuses_is_one_line(cluster: Cluster) -> None:
    done = cluster.launch("cluster.partition=nowhere")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("sbatch refuses: invalid partition specified: nowhere; ")


def test_interrupted_follower_leaves_the_job(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "launcher", *DUMMY, *FILE, *SLOW]
    env = environment(**cluster.env)
    with subprocess.Popen(
        command, cwd=cluster.folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        before = next(line for line in process.stderr if "RUNNING" in line)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    job = before.split()[1].rstrip(":")
    assert process.returncode == 130
    assert f"job {job} goes on. See it: python -m launcher.status --follow " in said
    assert f"End it: scancel {job}" in said
    assert cluster.slurm.job(job)["JobState"] == "RUNNING"
    [run_dir] = (cluster.folder / "runs").iterdir()
    again = launcher(
        "resume=true", f"run_dir='{run_dir.relative_to(cluster.folder)}'", cwd=cluster.folder, **cluster.env
    )
    assert (again.code, again.err.count(f"is in job {job}, which is RUNNING. HINT: wait for its end")) == (2, 1)


ENGINES = ("accelerator=cpu", "sampling.max_new_tokens=8", "measure.repeats=1", "measure.warmup=0")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_engines_over_two_nodes_answer_as_one_process_does(cluster: Cluster) -> None:
    sweeps = (
        ("backend=deepspeed", "devices=2"),
        ("backend=fsdp,transformers", "devices=1"),
    )
    run_dirs = []
    for sweep in sweeps:
        begun = cluster.launch("-m", *sweep, "num_nodes=2", *ENGINES, "launch.wait=false")
        assert begun.code == 0, begun.err
        run_dirs += [record["run_dir"] for record in begun.last_json["records"]]
    plain = launcher("backend=transformers", *ENGINES, cwd=cluster.folder)
    assert plain.code == 0, plain.err
    seen = cluster.status("--follow", *run_dirs, timeout=200)
    assert (seen.code, seen.last_json["points"]) == (0, {"ok": 3}), "".join(log(Path(path)) for path in run_dirs)
    expected = tokens(Path(plain.last_json["run_dir"]))
    assert [tokens(Path(path)) for path in run_dirs] == [expected] * 3
    records = [read_json(Path(path) / "record.json") for path in run_dirs]
    hosts = [" ".join(rank["host"] for rank in record["ranks"]) for record in records]
    assert hosts[:2] == ["n1 n1 n2 n2", "n1 n2"]
    assert hosts[2] in ("n1", "n2"), "plain transformers is one process, on whichever node"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_run_of_a_node_that_is_cut_off_goes_on_elsewhere(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    with SlurmCluster("netns", nodes=3, node_timeout_s=5) as slurm:
        assert slurm.run("srun", "-w", "n2", "hostname", "-i").stdout == "10.77.0.12\n"
        cluster = Cluster(slurm, tmp_path)
        job, run_dir = cluster.submit(*FILE, *SLOW, "num_nodes=2", "measure.repeats=2")
        cluster.batches(run_dir, 3)
        lost = read_json(run_dir / "attempt.json"), slurm.job(job)["BatchHost"]
        other = slurm.sbatch("#!/bin/sh\nexec sleep 60\n", "-w", "n2", "--no-requeue", cwd=tmp_path)
        slurm.wait_state(other, "RUNNING")
        slurm.cut("n2")
        slurm.wait_state(other, "NODE_FAIL", timeout_s=30)
        assert slurm.node_states()["n2"] == "down*"
        seen = cluster.status("--follow", str(run_dir), timeout=150)
        slurm.mend("n2")
        wait_until(lambda: slurm.node_states()["n2"] == "idle", 40, "return of n2", slurm.node_states)
        assert (lost[0]["attempt"], lost[1]) == (1, "n1")
        assert (seen.code, seen.last_json["points"]) == (0, {"ok": 1}), log(run_dir)
        record = read_json(run_dir / "record.json")
        assert [rank["host"] for rank in record["ranks"]] == ["n1", "n3"]
        assert tokens(run_dir) == undisturbed(cluster.folder, *FILE, *SLOW[1:])


@pytest.mark.slow
def test_time_limit_is_gone_past(limited: Submitted) -> None:
    cluster, job, run_dir = limited
    seen = cluster.status("--follow", str(run_dir), timeout=140)
    assert (seen.code, seen.last_json["points"]) == (0, {"ok": 1}), log(run_dir)
    assert int(cluster.slurm.job(job)["Restarts"]) >= 1
    assert tokens(run_dir) == undisturbed(cluster.folder, *FILE, *SLOW[1:])
