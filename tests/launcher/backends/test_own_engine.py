"""A new engine, made by the README's steps: in a copy of the project, and in a package with an entry point."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hydra.core.config_store import ConfigStore
from running import ROOT, Ended, run

from launcher.__main__ import main
from launcher.composition.compose import compose_run
from launcher.composition.presets import options
from launcher.config import engines
from launcher.config.engines import NO_PLAN
from launcher.config.schema import ConfigError
from launcher.doctor import trials
from launcher.plan import main as plan_main
from launcher.run_dir.run_dir import RunDir

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTION = (ROOT / "README.md").read_text().partition("## Your own engine\n")[2].partition("\n## ")[0]
ENGINE, YAML, LINE = re.findall(r"```(?:python|yaml)\n(.*?)```", SECTION, re.DOTALL)
QUICK = ("accelerator=cpu", "sampling.max_new_tokens=4", "measure.repeats=1", "measure.warmup=0")


def python(folder: Path, *arguments: str) -> Ended:
    """Run a Python module with the packages of a folder."""
    return run([sys.executable, "-m", *arguments], cwd=folder, PYTHONPATH=str(folder))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with an engine added as in the README."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("conf", "launcher", "shards"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "models"))
    (folder / "launcher" / "models").symlink_to(ROOT / "launcher" / "models")
    (folder / "launcher" / "backends" / "echo.py").write_text(ENGINE)
    (folder / "conf" / "backend" / "echo.yaml").write_text(YAML)
    registry = folder / "launcher" / "config" / "engines.py"
    registry.write_text(registry.read_text().replace("BUILT_IN = {\n", f"BUILT_IN = {{\n{LINE}"))
    return folder


@pytest.mark.slow
def test_it_sweeps_and_compares_beside_others(tree: Path) -> None:
    ended = python(tree, "launcher", "-m", "backend=echo,dummy", "devices=2", *QUICK)
    assert ended.code == 0, ended.err
    rows = ended.last_json["records"]
    ways = [(row["backend"], row["status"], row["world_size"]) for row in rows]
    assert ways == [("echo", "ok", 2), ("dummy", "ok", 2)]
    record = RunDir(tree / rows[0]["run_dir"]).read_record()
    assert record is not None
    assert record.metrics is not None
    assert (record.plan, record.notes) == (None, (NO_PLAN,))
    assert record.mbu is not None
    assert record.mbu.reason == NO_PLAN
    assert "echo x2 (base)" in ended.out
    found = python(tree, "launcher.compare", *(str(tree / row["run_dir"]) for row in rows))
    assert found.code == 0, found.err


@pytest.mark.slow
def test_dry_runs_and_plans_say_that_there_is_no_plan(tree: Path) -> None:
    dry = python(tree, "launcher", "backend=echo", "dry_run=true", *QUICK)
    assert dry.code == 0, dry.err
    assert f"note: {NO_PLAN}" in dry.out
    assert "launcher.rank.worker RUN_DIR" in dry.out
    planned = python(tree, "launcher.plan", "model=falcon_7b", "device=a6000", "backend=echo,fsdp", "--markdown")
    assert planned.code == 0, planned.err
    assert f"- 1xa6000 echo: {NO_PLAN}\n" in planned.out
    assert "| 1xa6000 | **fsdp** | 12." in planned.out
    wrong = python(tree, "launcher", "backend=echo", "backend.step_s=-1")
    assert (wrong.code, wrong.err) == (2, "backend.step_s=-1.0 is not a number of 0 or more. HINT: backend.step_s=0\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, one of which provides `backend=echo`."""
    add_package(tmp_path, "my_package", "echo = my_package.echo:EchoConfig", ENGINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield tmp_path
    forget()


def add_package(site: Path, name: str, entry: str, engine: str) -> None:
    """Install a package with one entry point, in the form in which pip installs it."""
    (site / name).mkdir()
    (site / name / "__init__.py").touch()
    (site / name / "echo.py").write_text(engine.replace("launcher.backends.echo:", f"{name}.echo:"))
    information = site / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[launcher.backends]\n{entry}\n")


def forget() -> None:
    """Make this process search for engines again."""
    engines.brought.cache_clear()
    engines.load_engine.cache_clear()
    ConfigStore.instance().repo.get("backend", {}).pop("echo.yaml", None)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("my_package", "other", "broken")]:
        del sys.modules[name]


@pytest.mark.slow
def test_an_installed_package_brings_an_engine(site: Path) -> None:
    command = [sys.executable, "-m", "launcher", "backend=echo", "devices=2", *QUICK]
    ended = run(command, cwd=site, PYTHONPATH=f"{ROOT}:{site}")
    assert ended.code == 0, ended.err
    assert (ended.last_json["backend"], ended.last_json["status"]) == ("echo", "ok")


def test_its_options_come_from_its_class_or_from_its_own_folder(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "echo" in options("backend")
    assert compose_run(["backend=echo"]).backend.step_s == 0.001  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"step is not an option of backend=echo\. HINT: backend.step_s=2"):
        compose_run(["backend=echo", "backend.step=2"])
    forget()
    (site / "my_package" / "conf" / "backend").mkdir(parents=True)
    (site / "my_package" / "conf" / "backend" / "echo.yaml").write_text(YAML.replace("0.001", "0.25"))
    assert compose_run(["backend=echo"]).backend.step_s == 0.25  # type: ignore[attr-defined]
    assert plan_main(["model=falcon_7b", "device=a6000", "backend=echo"]) == 0
    assert f"1xa6000 echo: {NO_PLAN}" in capsys.readouterr().out


def test_a_name_that_two_have_is_one_line(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_package(site, "other", "fsdp = other.echo:EchoConfig", ENGINE)
    forget()
    assert main(["backend=dummy", "dry_run=true"]) == 2
    line = "other brings an engine 'fsdp', and so does the launcher itself. HINT: pip uninstall other\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        ("import nothing_of_that_name\n", "cannot be imported: ModuleNotFoundError: No module named 'nothing_of"),
        ("EchoConfig = 3\n", "is no subclass of launcher.config.schema.BackendConfig. HINT: "),
        (ENGINE.replace('"echo"', '"other"'), "has name='other' and implementation='broken.echo:EchoBackend'. HINT: "),
    ],
)
def test_an_engine_that_is_of_no_use_is_one_line(
    engine: str, why: str, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_package(site, "broken", "broken = broken.echo:EchoConfig", engine)
    forget()
    assert main(["backend=broken", "dry_run=true"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"broken brings backend=broken as broken.echo:EchoConfig, which {why}")
    assert err.count("\n") == 1
    assert main(["backend=dummy", "dry_run=true"]) == 0
    assert trials.engine("broken", 5.0).error == err.partition(" HINT: ")[0]
