"""Start the ranks of this machine as forks of one process, which imports their packages once for all of them.

`python -m launcher.launch.forks RANKS MODULE ARGUMENT`: each rank calls MODULE's `main(ARGUMENT)`, like
`python -m MODULE ARGUMENT` in its own process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed import TCPStore
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from launcher.config.engines import resolve
from launcher.run_dir.run_dir import RunDir
from shards.machine.world import World

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn


def has_cuda_context() -> bool:
    """True if the CUDA driver is initialized in this process: its forks can then not use CUDA."""
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) == "/dev/nvidia-uvm":
                return True
    return False


def run_as_rank(rank: int, module: str, argument: str, environ: Mapping[str, str], server: socket.socket) -> NoReturn:
    """Run a rank in this fork, or in a new interpreter if the imports have initialized CUDA."""
    server.close()  # an open copy here would hide the store's end from the ranks
    os.environ.update(environ, RANK=str(rank), LOCAL_RANK=str(rank))
    if has_cuda_context():
        os.execv(sys.executable, [sys.executable, "-m", module, argument])
    importlib.import_module(module).main(argument)
    sys.exit(0)


def main() -> int:
    """Import MODULE, and the engine if ARGUMENT is the directory of a run; fork the ranks and wait for them.

    The first failing rank ends the others. This process runs the store through which the ranks connect and keeps its
    socket open from the start, so that no other process can take the port. Returns 0, or 1 with the failed rank on
    stderr.
    """
    count, module, argument = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # check for GPUs without initializing CUDA
    with contextlib.suppress(Exception):  # each rank repeats the import and reports the error
        importlib.import_module(module)
        resolve(RunDir(Path(argument)).read_run().run_config.backend.implementation)
    gc.freeze()  # garbage collection would write to the imported objects, and so copy their shared pages

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        world = World(world_size=count, local_world_size=count, master_port=port)
        environ = world.environ() | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": f"port_{port}"}
        ranks = start_processes(run_as_rank, (module, argument, environ, server), count, False, start_method="fork")
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())
    try:
        while not ranks.join():
            pass
    except ProcessExitedException as error:
        print(f"rank {error.error_index} ended with exit code {error.exit_code}", file=sys.stderr)
        return 1
    except ProcessRaisedException as error:
        print(error, file=sys.stderr)
        return 1
    del store
    return 0


if __name__ == "__main__":
    sys.exit(main())
