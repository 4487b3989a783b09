"""Resumes a run directory with forged marks in run.json, as init of a PID namespace: `lying_run_dirs.py FOLDER`.

Prints which of the other processes are alive after each forged mark, and after the true one, with which only the run's
own process may end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher.__main__ import main
from launcher.composition.compose import compose_run
from launcher.prepare.prepare import prepare
from launcher.run_dir.lifecycle import create_run_dir
from launcher.system.processes import MARK

NOBODY = 65534
OTHER_MARK = "0" * 32
LIES: tuple[dict[str, Any], ...] = (
    {"mark": None}, {"mark": ""}, {"mark": 0}, {"mark": "*"}, {"mark": [OTHER_MARK]}, {"mark": OTHER_MARK[:-1]},
    {"mark": f"{OTHER_MARK}-1"}, {"mark": OTHER_MARK + "\n"},
)  # fmt: skip


def start(mark: str | None, **how: Any) -> subprocess.Popen[bytes]:
    own = {name: value for name, value in os.environ.items() if name != MARK} | ({MARK: mark} if mark else {})
    return subprocess.Popen(["sleep", "600"], env=own, stdin=subprocess.DEVNULL, **how)


def resume(run_dir: Path, values: Any) -> int:
    (run_dir / "run.json").write_text(json.dumps(values))
    return main(["resume=true", f"run_dir={run_dir}"])


def observe(folder: Path) -> list[dict[str, Any]]:
    asked = ["backend=dummy", "devices=1", "prompts.texts=[a]", f"output_dir={folder}"]
    run_dir = create_run_dir(prepare(compose_run(asked), ("python", "-m", "launcher", *asked)))
    others = {"unmarked": start(None), "of another run": start(OTHER_MARK), "of this run": start(run_dir.mark)}
    if os.getuid() == 0:
        others["of another user"] = start(run_dir.mark, user=NOBODY)
    truth = json.loads((run_dir.path / "run.json").read_text())
    seen = []
    for values in (*({**truth, **lie} for lie in LIES), truth):
        code = resume(run_dir.path, values)
        living = [name for name, process in others.items() if process.poll() is None]
        seen.append({"mark": values["mark"], "code": code, "living": living})
    for process in others.values():
        process.kill()
    return seen


if __name__ == "__main__":
    observed = observe(Path(sys.argv[1]))
    print(json.dumps(observed))
