"""The wheel works outside the checkout and without engines: it contains its configuration, models and pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, Ended, environment, run

NO_ENGINES = """
from importlib.machinery import PathFinder

ENGINES = ("torch", "transformers", "accelerate", "lightning", "deepspeed", "vllm")
find = PathFinder.find_spec

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in ENGINES else find(name, path, target)

PathFinder.find_spec = classmethod(find_spec)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel, and nothing from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "site"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True, timeout=120)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True, timeout=120)
    (target / "sitecustomize.py").write_text(NO_ENGINES)
    return target


def command(site: Path, *words: str) -> Ended:
    return run([sys.executable, "-m", *words], cwd=site.parent, **environment(PYTHONPATH=str(site)))


@pytest.mark.slow
def test_it_runs_plans_and_lists_without_any_engine(installed: Path) -> None:
    where = run([sys.executable, "-c", "import launcher; print(launcher.__file__)"], cwd=installed.parent,
                **environment(PYTHONPATH=str(installed)))  # fmt: skip
    assert where.out.strip().startswith(str(installed))
    ended = command(installed, "launcher", "backend=dummy", "devices=1", "measure.repeats=1")
    assert (ended.code, ended.last_json["status"]) == (0, "ok"), ended.err
    assert command(installed, "launcher.status", ended.last_json["run_dir"]).code == 0
    assert command(installed, "launcher.plan", "model=falcon_40b", "machines=2xa6000").code == 0
    assert command(installed, "launcher.experiments").code == 0
    assert (installed / "launcher" / "models" / "tiny_llama_adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            ["backend=dummy", "devices=2"],
            "needs torch, which is not installed here. HINT: pip install torch",
        ),
        (["backend=fsdp"], 'HINT: pip install "multi-gpu-launcher[fsdp]"'),
    ],
)
def test_what_is_missing_is_named_with_what_installs_it(asked: list[str], message: str, installed: Path) -> None:
    ended = command(installed, "launcher", *asked)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert message in ended.err
