"""DeepSpeed's all-reduce through shared memory on a CPU: compiled once, enabled or disabled on all ranks, its files
removed.

By default DeepSpeed uses it wherever it compiles, crashes with SIGSEGV unless LOCAL_SIZE says that all ranks share this
machine, and leaves a file for each rank in /dev/shm.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import deepspeed
from deepspeed.accelerator import get_accelerator

from launcher.backends.deepspeed.requirements import (
    OPERATION,
    extensions_folder,
    missing_compiler,
    missing_shared_memory,
)
from shards.machine.process_group import any_rank
from shards.parallel.collectives import unlink_segment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shards.machine.world import World

ABANDONED_S = 60  # age of a lock file that counts as abandoned; a build takes about 20 s


def compile_operation() -> str | None:
    """Compile the operation, or reuse the compiled one. Returns the reason why it is not available, None if it is.
    Ranks take turns."""
    folder = extensions_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # torch looks for ninja on the PATH, which may lack the folder of this interpreter if that was called by its path.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_by_one(folder):
            get_accelerator().create_op_builder("ShareMemCommBuilder").load()
    except (RuntimeError, ImportError, OSError) as error:
        return missing_compiler() or (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


@contextlib.contextmanager
def _one_by_one(folder: Path) -> Iterator[None]:
    """Hold a lock that the kernel releases when this process ends, and remove torch's own lock file, which outlives a
    killed process."""
    with (folder / f"{OPERATION}.flock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lock = folder / OPERATION / "lock"
        while lock.exists() and not _abandoned(lock):
            time.sleep(0.2)
        lock.unlink(missing_ok=True)
        yield


def _abandoned(lock: Path) -> bool:
    """True if the process that created a lock file has ended: it keeps the file open while it builds."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samefile(link, lock):
                return False
    with contextlib.suppress(OSError):
        return time.time() - lock.stat().st_mtime > ABANDONED_S
    return True


def choose(world: World, obstacle: str | None) -> str | None:
    """Make all ranks reduce through shared memory, or all through gloo. Returns the reason against shared memory, None
    if it is used.

    Every rank must call it before DeepSpeed joins the process group. `obstacle` is the result of `compile_operation`.
    """
    if world.local_world_size != world.world_size:
        obstacle = f"the ranks are on {world.num_nodes} nodes"
    obstacle = obstacle or missing_shared_memory(world.local_world_size)
    if any_rank(obstacle is not None):
        deepspeed.ops.__compatible_ops__[OPERATION] = False
        os.environ["LOCAL_SIZE"] = "0"
        return obstacle or "another rank cannot"
    os.environ["LOCAL_SIZE"] = str(world.world_size)
    return None


def forget_segment(world: World) -> None:
    """Remove the name of this rank's shared memory once every rank has it mapped."""
    unlink_segment(f"deepspeed_allreduce_buffer_{os.getuid()}_{world.master_addr}_{world.master_port}_{world.rank}")
