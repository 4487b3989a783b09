"""The Python API: the snippet of the README runs unchanged, and importing the package is cheap."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from running import ROOT, environment, run

import launcher
from launcher import UserError, compose, load_record, make_plan, sweep
from launcher.results.record import Record

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
[SNIPPET] = [block for block in BLOCKS if "from launcher import" in block]


@pytest.mark.slow
def test_the_snippet_of_the_readme_runs(tmp_path: Path) -> None:
    ended = run([sys.executable, "-c", SNIPPET], cwd=tmp_path)
    assert ended.code == 0, ended.err
    planned, result = ended.out.splitlines()
    status, speed, cache = result.split()
    assert (status, float(speed) > 0, int(cache) > 0) == ("ok", True, True)
    [run_dir] = (tmp_path / "runs").iterdir()
    record = load_record(run_dir)
    assert [device.parameter_bytes for device in record.devices] == [int(planned)] * 2
    assert record.command == ()
    assert not (run_dir / "command.sh").exists(), "no command composes the same"


def test_importing_the_package_imports_nothing_else() -> None:
    program = "import sys, launcher; print(sorted(name for name in sys.modules if name.partition('.')[0] in sys.argv))"
    others = ("launcher", "hydra", "omegaconf", "torch", "yaml", "rich", "msgspec", "shards")
    done = subprocess.run(
        [sys.executable, "-c", program, *others],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "['launcher', 'launcher.version']\n"


def test_every_name_of_the_package_is_there() -> None:
    assert [name for name in launcher.__all__ if not hasattr(launcher, name)] == []
    with pytest.raises(AttributeError, match="has no attribute 'trackers'"):
        _ = launcher.trackers


@pytest.mark.slow
def test_a_sweep_gives_its_records_in_any_thread(tmp_path: Path) -> None:
    records: list[Record] = []
    words = ("backend=dummy", "devices=1,2", "measure.repeats=1", "accelerator=cpu", f"output_dir={tmp_path}")
    thread = threading.Thread(target=lambda: records.extend(sweep(*words)))
    thread.start()
    thread.join(timeout=120)
    assert [(record.status, record.num_devices, record.world_size) for record in records] == [
        ("ok", 1, 1),
        ("ok", 2, 2),
    ]
    assert records[0].run_dir is not None
    assert load_record(records[0].run_dir) == records[0]


def test_what_a_user_can_mend_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="HINT: backend=fsdp"):
        compose("backend=fspd")
    with pytest.raises(UserError, match=r"has no record\.json\. HINT:"):
        load_record(tmp_path)
    with pytest.raises(UserError, match="heads cannot be divided"):
        make_plan(compose("backend=deepspeed", "devices=3"))
