"""Prompts and paths with every special character of shells, YAML and Hydra: none of them is interpreted by accident."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from running import launcher, run

from launcher.composition.compose import command_of, compose_run
from launcher.composition.overrides import readable
from launcher.composition.quoting import quoted
from launcher.composition.sweeps import expand_sweep
from launcher.config.schema import ConfigError
from launcher.config.values import from_dict, to_dict
from launcher.models import EMBEDDED
from launcher.prompts.prompts import load_prompts, read_prompts, write_prompts
from launcher.system.files import read_lines

PWNED = "pwned"
NAME = f'it\'s a "model" $(touch {PWNED}) `touch {PWNED}`; a=b,c {{d: ${{e}}}} [f] %s %j \\ é\u2028\n~#&|<>*?! end\\'
PROMPTS = [
    NAME,
    f"$(touch {PWNED})",
    f"`touch {PWNED}`",
    f"'; touch {PWNED}; '",
    f'"; touch {PWNED}; "',
    "a=b,c=d",
    "${oc.env:HOME}",
    "${hydra:run.dir}",
    "null",
    "two\nlines\r\nand\u2028more\x85",
    "--help",
    "é 漢字 🙂 \\ % \t tab",
    "[bold]markup[/]",
    "???",
]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["model.path", "prompts.path", "output_dir"])
def test_a_path_is_taken_as_it_is_written(key: str) -> None:
    name, _, field = key.partition(".")
    for value in (NAME, "/a=b", "/it's", "/é", "/$(x)", "/[x]", "/a;b", "/~/x", "/a#b", "/x\\'", "/${x}'"):
        composed = getattr(compose_run(["backend=dummy", "prompts=file", f"{key}={value}"]), name)
        assert (getattr(composed, field) if field else composed) == value


def test_what_hydra_can_read_is_read() -> None:
    assert compose_run(["model.path='/a b'"]).model.path == "/a b"
    assert expand_sweep(["prompts.path=/a,/b"]) == [["prompts.path=/a"], ["prompts.path=/b"]]


def test_quoted_stands_for_itself() -> None:
    draw = random.Random(7)
    for _ in range(300):
        text = "".join(draw.choice("ab'\"\\${}[]=,:; \n\té~()`") for _ in range(draw.randrange(1, 12)))
        value = OverridesParser.create().parse_override(f"model.path={quoted(text)}").value()
        assert OmegaConf.create({"path": value}).path == text, text
    assert compose_run([f"model.path={quoted(text)}"]).model.path == text


def test_another_value_is_refused_with_its_quotes() -> None:
    with pytest.raises(ConfigError) as caught:
        readable(["model.name=x;y"])
    assert caught.value.fact.startswith("model.name=x;y cannot be read: ")
    assert caught.value.hint == "\"model.name='x;y'\", in these quotes"


def test_the_whole_configuration_survives_a_folder_of_nasty_files(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    (folder / "prompts").mkdir(parents=True)
    prompts = [text for text in PROMPTS if "${" not in text and text != "???"]  # in YAML, OmegaConf interprets these
    preset = dict.fromkeys(("path", "count", "input_tokens", "output_tokens")) | {"name": "mine", "texts": prompts}
    (folder / "prompts" / "mine.yaml").write_text(yaml.safe_dump(preset))
    config = compose_run(["prompts=mine"], (str(folder),))
    assert config.prompts.texts == prompts
    assert from_dict(to_dict(config)) == config
    assert command_of(["prompts=mine"], [str(folder)])[-1] == f"--config-dir={folder}"


def test_prompts_survive_their_files(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in PROMPTS))
    config = compose_run(["prompts=file", f"prompts.path={source}"])
    prompts = load_prompts(config, EMBEDDED / "tiny_falcon", 1000)
    assert [prompt.text for prompt in prompts] == PROMPTS
    write_prompts(tmp_path / "written.jsonl", prompts)
    assert read_prompts(tmp_path / "written.jsonl") == prompts


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a nasty name that contains only a model and prompts."""
    folder = tmp_path_factory.mktemp("nasty") / NAME
    shutil.copytree(EMBEDDED / "tiny_falcon", folder / NAME)
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in PROMPTS]
    (folder / f"{NAME}.jsonl").write_text("".join(lines))
    return folder


def overrides(out: str) -> list[str]:
    return [
        "backend=dummy", f"model.path={NAME}", f"model.name={quoted('../' + NAME)}", "prompts=file",
        f"prompts.path={NAME}.jsonl", f"output_dir={out}", "measure.repeats=1", "devices=2",
    ]  # fmt: skip


def record_in(out: Path) -> tuple[Path, dict[str, Any]]:
    [path] = out.glob("*/record.json")
    return path.parent, json.loads(path.read_text())


def check(nasty: Path, out: str) -> Path:
    run_dir, record = record_in(nasty / out)
    assert record["status"] == "ok"
    assert [row["prompt"] for row in read_lines(run_dir / "completions.jsonl")] == PROMPTS
    assert list(nasty.parent.rglob(PWNED)) == []
    assert run_dir.parent == nasty / out
    return run_dir


@pytest.mark.slow
def test_nasty_values_through_the_local_launcher_and_back(nasty: Path) -> None:
    ended = launcher(*overrides(f"out {NAME}"), cwd=nasty)
    assert ended.code == 0, ended.err
    run_dir = check(nasty, f"out {NAME}")
    assert ended.last_json["run_dir"] == str(run_dir)
    again = launcher(*overrides(f"out {NAME}"), "resume=true", cwd=nasty)
    assert again.last_json == ended.last_json
    shutil.move(run_dir, nasty / "first")
    repeated = run(["sh", str(nasty / "first" / "command.sh")], cwd=nasty.parent)
    assert repeated.code == 0, repeated.err
    check(nasty, f"out {NAME}")


@pytest.mark.slow
def test_nasty_values_through_torchrun(nasty: Path) -> None:
    arguments = overrides("torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "launcher"]
    ended = run([*command, *arguments], cwd=nasty)
    assert ended.code == 0, ended.err
    check(nasty, "torchrun")


@pytest.mark.slow
def test_code_of_a_checkpoint_is_not_run_unless_asked(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED / "tiny_falcon", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / PWNED)!r}, 'w')\nclass Mine: pass\nclass Model: pass\n")
    ended = launcher("backend=transformers", "devices=1", f"model.path={folder}", f"output_dir={tmp_path / 'out'}")
    assert ended.code == 2, ended.err
    assert "trust_remote_code" in ended.err
    asking, *lines = ended.err.strip().splitlines()
    assert asking == "model_type mine: asking transformers for its shapes, which takes seconds"
    assert len(lines) <= 2
    assert not (tmp_path / PWNED).exists()
