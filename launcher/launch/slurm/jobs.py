"""SLURM jobs: submit, query, follow. Their results are in their run directories."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.launch.slurm.script import not_found
from launcher.results.verdict import Outcome
from launcher.run_dir.gathering import finish
from launcher.run_dir.run_dir import SLURM_SCRIPT
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from launcher.results.record import Record
    from launcher.run_dir.progress import Progress
    from launcher.run_dir.run_dir import RunDir

KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_DEBUG")  # select the cluster; others belong to a job
ENDS = {  # SLURM state of a job that is over -> status and message of a run without a record
    "COMPLETED": ("failed", "the job ended, and left no record"),
    "FAILED": ("failed", "the job failed before it could write a record"),
    "CANCELLED": ("cancelled", "the job was cancelled"),
    "TIMEOUT": ("timeout", "the time limit of the job"),
    "DEADLINE": ("timeout", "the deadline of the job"),
    "PREEMPTED": ("cancelled", "the job was pre-empted"),
    "OUT_OF_MEMORY": ("oom", "the job used more memory than SLURM gave it"),
    "NODE_FAIL": ("failed", "a node of the job failed"),
    "BOOT_FAIL": ("failed", "a node of the job did not boot"),
    "FORGOTTEN": ("failed", "SLURM has forgotten the job, and it left no record"),
}
ANSWER_S = 30
RECORD_S = 5.0  # seconds until a record is visible on other machines of the cluster, at most
SETTLE_S = 2.0  # seconds between two queries of a job that seems to be over
POSITION_EVERY = 5  # queries of the own jobs for each query of the whole queue


@dataclass(frozen=True, slots=True)
class State:
    """The state of a job as SLURM reports it; `reason` is why a pending job waits."""

    name: str
    reason: str = ""
    restarts: int = 0

    @property
    def is_end(self) -> bool:
        """True if the job is over; False for a requeued job."""
        return self.name in ENDS

    def __str__(self) -> str:
        text = self.name
        if self.name == "PENDING":
            text += f" ({self.reason})"
        if self.restarts:
            text += f", attempt {self.restarts + 1}"
        return text


def submit(folder: Path, script: str = SLURM_SCRIPT) -> str:
    """Submit the batch script in `folder`; returns the number of the job. UserError with SLURM's message if it
    refuses."""
    if shutil.which("sbatch") is None:
        raise not_found("sbatch")
    done = subprocess.run(
        ["sbatch", "--parsable", script], cwd=folder, env=environment(os.environ), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=ANSWER_S * 4, check=False,
    )  # fmt: skip
    if done.returncode:
        words = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines()[-2:])
        raise UserError(
            f"sbatch refuses: {words or done.returncode}.",
            f"sbatch {folder / script}, whose #SBATCH lines the keys of cluster make",
        )
    return done.stdout.strip().split(";")[0]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for SLURM's programs, without the variables of a job that this process itself may run in."""
    return {key: value for key, value in environ.items() if not key.startswith("SLURM_") or key in KEPT}


def look(jobs: Sequence[str]) -> dict[str, State] | None:
    """The state of each job, FORGOTTEN if SLURM no longer knows it; None if SLURM does not answer."""
    form = "JobArrayID:|,State:|,Reason:|,RestartCnt:|"
    answer = _squeue("--array", "-t", "all", f"--jobs={','.join(jobs)}", "-O", form)
    if answer is None:
        return None
    states = dict.fromkeys(jobs, State("FORGOTTEN"))
    for line in answer.splitlines():
        if line.count("|") >= 4:
            job, name, reason, restarts, *_ = (cell.strip() for cell in line.split("|"))
            if job in states:
                states[job] = State(name, reason, int(restarts or 0))
    return states


def settled(jobs: Sequence[str], sure: Collection[str] = ()) -> dict[str, State] | None:
    """The state of each job, or None, like `look`; an end state only counts after two equal answers, because a requeued
    job passes through end states.

    For jobs in `sure` one answer is enough.
    """
    states = look(jobs)
    if states is None:
        return None
    doubtful = [job for job, state in states.items() if state.is_end and job not in sure]
    while doubtful:
        time.sleep(SETTLE_S)
        again = look(doubtful)
        if again is None:
            return None
        doubtful = [job for job, state in again.items() if state.is_end and state != states[job]]
        states |= again
    return states


def active(run_dirs: Sequence[RunDir]) -> dict[RunDir, tuple[str, State]]:
    """The runs that are in an unfinished job, with the job's number and state.

    UserError if SLURM does not answer: the run may still be in a job, and a second one would end its ranks.
    """
    runs = {job: run_dir for run_dir in run_dirs if (job := run_dir.read_job()) is not None}
    if not runs:
        return {}
    states = settled(list(runs))
    if states is None:
        raise UserError(f"squeue does not answer, and {runs.popitem()[1]} may be in a job still.", "try again later")
    return {runs[job]: (job, state) for job, state in states.items() if not state.is_end}


def _squeue(*options: str) -> str | None:
    """The output of squeue; "" if it knows none of the jobs, None if it does not answer."""
    try:
        done = subprocess.run(
            ["squeue", "-h", *options], env=environment(os.environ), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=ANSWER_S, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise not_found("squeue") from None
    except subprocess.TimeoutExpired:
        return None
    if done.returncode and "Invalid job id" in done.stderr:
        return ""
    if done.returncode:
        return None
    return done.stdout


def position(job: str) -> str:
    """The job's position in its partition's queue, as text; "" if it is not known. SLURM may hide other users' jobs."""
    waiting = (_squeue("-t", "PD", "--array", "--priority", "--sort=-p,i", "-o", "%i|%P") or "").splitlines()
    rows = [tuple(line.split("|", 1)) for line in waiting]
    partition = next((row[1] for row in rows if row[0] == job), None)
    line = [row[0] for row in rows if row[1:] == (partition,)]
    if partition:
        return f", place {line.index(job) + 1} of {len(line)} in the queue"
    return ""


def close(run_dir: RunDir, state: State) -> Record:
    """The record of the run of a job that is over: the one it wrote, or one gathered from the files of its ranks."""
    status, message = ENDS[state.name]
    deadline = time.monotonic()
    if state.name in ("COMPLETED", "FAILED"):
        deadline += RECORD_S
    while (record := run_dir.read_record()) is None and time.monotonic() < deadline:
        time.sleep(0.2)
    if record is None or (record.status, status) == ("cancelled", "timeout"):
        return finish(run_dir, Outcome(status, message))
    return record


class Follower:
    """Polls jobs until all are over. `say(job, text)` reports news, `show(ranks)` the progress of the first running
    job."""

    def __init__(
        self,
        runs: Mapping[str, RunDir],
        say: Callable[[str, str], None],
        show: Callable[[Sequence[Progress | None]], None],
    ) -> None:
        self.runs, self.say, self.show = dict(runs), say, show
        self.states: dict[str, State] = {}
        self.said: dict[str, str] = {}
        self.read = dict.fromkeys(runs, 0)  # bytes of each job's log that were reported
        self.looks = 0

    def follow(self, poll_s: float) -> Iterator[tuple[str, Record]]:
        """Yield each job with its record as soon as it is over."""
        open_jobs = list(self.runs)
        while open_jobs:
            states = look(open_jobs) or {}
            for job, state in states.items():
                before = self.states.get(job)
                self._tell(job, before, state)
                self.states[job] = state
                # A requeued job passes through end states, so one only counts if seen twice or if the run is done.
                if state.is_end and (state == before or self.runs[job].is_done()):
                    open_jobs.remove(job)
                    yield job, close(self.runs[job], state)
            self.looks += 1
            if open_jobs:
                running = [job for job in open_jobs if job in self.states and self.states[job].name == "RUNNING"]
                if running:
                    run_dir = self.runs[running[0]]
                    self.show(run_dir.read_progress(run_dir.read_run().world_size))
                time.sleep(poll_s)

    def _tell(self, job: str, before: State | None, state: State) -> None:
        """Report new complete lines of the job's log, and changes of its state or its position in the queue."""
        with contextlib.suppress(FileNotFoundError), self.runs[job].slurm_log.open("rb") as file:
            file.seek(self.read[job])
            new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self.read[job] += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                self.say(job, line)
        waits, text = state.name == "PENDING", str(state)
        if state == before and not (waits and self.looks % POSITION_EVERY == 0):
            return
        if waits:
            text += position(job)
        if text != self.said.get(job):
            self.said[job] = text
            self.say(job, text)
