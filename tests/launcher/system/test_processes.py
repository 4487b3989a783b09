"""Finds the files that a run leaves in shared memory, and no others."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import uuid
from multiprocessing import shared_memory

import pytest
from running import environment

from launcher.system.processes import MARK, end_run, of_run
from shards.machine.shared_memory import SharedMemoryWatch, shared_memory_files, shared_memory_of


def test_segments_and_semaphores_of_a_process_are_found() -> None:
    before = shared_memory_files()
    segment = shared_memory.SharedMemory(create=True, size=4096)
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    try:
        own = shared_memory_files() - before
        assert any(path.name == segment.name for path in own)
        assert {path.name for path in shared_memory_of([os.getpid()])} >= {segment.name}
        assert any(path.name.startswith("sem.") for path in shared_memory_of([os.getpid()]))
    finally:
        segment.close()
        segment.unlink()
        del semaphore


def test_what_was_there_before_is_never_removed() -> None:
    segment = shared_memory.SharedMemory(create=True, size=4096)
    try:
        watch = SharedMemoryWatch()
        watch.look([os.getpid()])
        watch.remove()
        assert any(path.name == segment.name for path in shared_memory_files())
    finally:
        segment.close()
        segment.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    "program", ["import time; time.sleep(60)", "import signal,time; signal.signal(15, 1); time.sleep(60)"]
)
def test_the_processes_of_a_run_end_even_if_they_ignore_sigterm(program: str) -> None:
    mark = uuid.uuid4().hex
    process = subprocess.Popen([sys.executable, "-c", program], env=environment(**{MARK: mark}), start_new_session=True)
    other = subprocess.Popen([sys.executable, "-c", "input()"], env=environment(), stdin=subprocess.PIPE)
    try:
        assert [item.pid for item in of_run(mark)] == [process.pid]
        assert end_run(mark) == 1
        assert of_run(mark) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()
