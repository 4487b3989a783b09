"""Decide from the progress of the ranks whether a run hangs, and write the stacks of ranks that hang."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.results.verdict import Outcome
from launcher.system.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from launcher.config.schema import RunConfig
    from launcher.run_dir.progress import Progress
    from launcher.run_dir.run_dir import RunDir

COLLECTIVE = re.compile(r"distributed_c10d|shards/parallel/collectives")
"""Matches the stack of a rank that waits for other ranks, in the process group or in shared memory."""
MAIN = re.compile(r'\brun \([^)]*launcher/rank/rank\.py|launcher/rank/rank\.py", line \d+ in run$')
"""Matches the frame that every rank's main thread has, in the format of py-spy or of faulthandler."""
ON_DEVICE = re.compile(
    r"torch/(?:cuda|nn|autograd|_ops|_tensor|functional)\b|transformers/|launcher/backends/(?:decode|slots)"
)
"""Matches frames that only launch GPU work and fetch its results: a rank that hangs in one waits for the GPU."""

DUMP_S = 20.0  # seconds for the stacks of all ranks together, at most
FALLBACK_S = 2.0


class Watchdog:
    """Decides from the progress of the ranks when the run must end. A limit of 0 s is off.

    Since ranks wait for each other, the run hangs only if no rank has made a step for `hang_timeout_s`. The rank to
    blame is the one with the oldest last step, or one that has not begun. `timeout_s` counts from the creation of the
    watchdog.
    """

    def __init__(self, config: RunConfig, now: Callable[[], float] = time.monotonic) -> None:
        self.hang_timeout_s, self.timeout_s, self.now = config.hang_timeout_s, config.timeout_s, now
        self.started = self.last_step = now()
        self.ticks: tuple[int, ...] = ()

    @property
    def look_s(self) -> float:
        """Seconds between two checks: 1 % of the shortest limit, but at least 0.5."""
        return max(min(filter(None, (self.hang_timeout_s, self.timeout_s)), default=100.0) / 100, 0.5)

    def look(self, ranks: Sequence[Progress | None]) -> Outcome | None:
        """The outcome if the run must end now, else None."""
        moment = self.now()
        ticks = tuple(rank.ticks if rank else 0 for rank in ranks)
        if ticks != self.ticks:
            self.ticks, self.last_step = ticks, moment
        if self.timeout_s and moment - self.started > self.timeout_s:
            outcome = Outcome("timeout", f"the run took longer than timeout_s={self.timeout_s:g}")
            return _blaming(ranks, outcome, range(len(ranks)))
        if self.hang_timeout_s and moment - self.last_step > self.hang_timeout_s:
            message = f"no rank has made a step for hang_timeout_s={self.hang_timeout_s:g}"
            return _blaming(ranks, Outcome("hang", message), range(len(ranks)))
        return None


def _blaming(ranks: Sequence[Progress | None], outcome: Outcome, suspects: Sequence[int]) -> Outcome:
    """`outcome` with the rank among `suspects` whose last step is the oldest, and its stage."""
    last_steps: dict[int, float] = {}
    stages: dict[int, str] = {}
    for number in suspects:
        last_steps[number], stages[number] = 0.0, "start"
        if (progress := ranks[number]) is not None:
            last_steps[number], stages[number] = progress.time, progress.stage
        if stages[number] == "end":
            last_steps[number] = float("inf")
    late = min(suspects, key=last_steps.__getitem__)
    return replace(outcome, rank=late, stage=stages[late])


def blame(
    outcome: Outcome, ranks: Sequence[Progress | None], stacks: Mapping[int, str], on_cuda: bool = False
) -> Outcome:
    """`outcome` with the rank to blame corrected by the stacks: ranks inside a collective wait for one that is not.

    The last steps of ranks in lockstep are too close in time to tell which rank stopped first.
    """
    free = [number for number, text in stacks.items() if not waits(text, on_cuda)]
    if outcome.status != "hang" or outcome.rank not in stacks or outcome.rank in free or not free:
        return outcome
    return _blaming(ranks, outcome, free)


def waits(stack: str, on_cuda: bool = False) -> bool:
    """True if a rank with this stack waits for other ranks.

    An NCCL collective is only queued on the GPU; the rank blocks where it next needs a result from the GPU.
    """
    return COLLECTIVE.search(stack) is not None or (on_cuda and ON_DEVICE.search(_innermost_frame(stack)) is not None)


def _innermost_frame(stack: str) -> str:
    """The innermost frame of a rank's main thread in the output of py-spy or faulthandler; empty if it is not found."""
    frames: list[str] = []
    for line in [*stack.splitlines(), ""]:
        if line.startswith(" "):
            frames.append(line)
            continue
        if any(MAIN.search(frame) for frame in frames):
            return frames[0]
        frames = []
    return ""


def write_stacks(run_dir: RunDir, pids: Mapping[int, int]) -> dict[int, str]:
    """Write the stacks of each rank in `pids` (rank -> process id) into the run directory, and return them.

    py-spy shows all threads and child processes; if that is not permitted (a container without ptrace), the rank writes
    the stacks of its own threads.
    """
    spy = shutil.which("py-spy", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    dumps = {}
    if spy is not None:
        for number, pid in pids.items():
            dumps[number] = subprocess.Popen(
                [spy, "dump", "--subprocesses", "--pid", str(pid)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
    deadline = time.monotonic() + DUMP_S
    written = {}
    for number, pid in pids.items():
        text = ""
        if number in dumps:
            try:
                out, _ = dumps[number].communicate(timeout=max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                dumps[number].kill()
                out, _ = dumps[number].communicate()
            if b"Thread" in out:
                text = out.decode(errors="replace")
        written[number] = text or _own_stacks(pid, run_dir.rank(number).log)
        write_text(run_dir.rank(number).stacks, written[number])
    return written


def _own_stacks(pid: int, log: Path) -> str:
    """The stacks that the rank itself appends to its log on SIGUSR2; faulthandler's handler does not need the GIL."""
    size = 0
    if log.exists():
        size = log.stat().st_size
    try:
        os.kill(pid, signal.SIGUSR2)
    except OSError as error:
        return f"no stacks: {error}\n"
    deadline = time.monotonic() + FALLBACK_S
    text = ""
    while time.monotonic() < deadline and "most recent call first" not in text:
        time.sleep(0.1)
        if log.exists():
            text = log.read_bytes()[size:].decode(errors="replace")
    return text or "no stacks: py-spy cannot look at the process, and it does not answer SIGUSR2\n"
