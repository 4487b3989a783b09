"""Unknown keys are refused wherever they are written, and the hint is the key that was meant."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import yaml
from running import command_line, torchrun

from launcher.__main__ import main
from launcher.backends.vllm.extra import accepted_arguments, installed_package
from launcher.composition.compose import compose_run
from launcher.composition.presets import groups, options
from launcher.config.engines import BUILT_IN
from launcher.config.keys import run_keys
from launcher.config.schema import ConfigError
from launcher.config.values import from_dict, to_dict
from launcher.prepare.prepare import prepare

if TYPE_CHECKING:
    from pathlib import Path

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
SHARE = 0.9


def keys() -> list[tuple[str, str]]:
    """Every (engine, key) of a run; keys that all engines have are listed once."""
    common = set.intersection(*(set(run_keys(engine)) for engine in BUILT_IN))
    own = [(engine, key) for engine in sorted(BUILT_IN) for key in sorted(set(run_keys(engine)) - common)]
    return [*(("fsdp", key) for key in sorted(common)), *own]


def misspelt(key: str, draw: random.Random) -> list[str]:
    """Misspellings of a key's last word: a letter dropped, doubled or replaced, two letters swapped, or dashes in place
    of underscores."""
    parent, dot, leaf = key.rpartition(".")
    at = draw.randrange(1, len(leaf))
    words = [
        leaf[:at] + leaf[at + 1 :],
        leaf[:at] + leaf[at - 1] + leaf[at:],
        leaf[:at] + draw.choice("aeiou") + leaf[at + 1 :],
        leaf[: at - 1] + leaf[at] + leaf[at - 1] + leaf[at + 1 :],
        leaf.replace("_", "-"),
    ]
    return [parent + dot + word for word in words if word != leaf]


def neighbours() -> list[tuple[str, str, str]]:
    """Every (engine, key, misspelling) whose misspelling is not a key of any engine."""
    draw = random.Random(7)
    known = {key for engine in BUILT_IN for key in run_keys(engine)}
    return [(engine, key, word) for engine, key in keys() for word in misspelt(key, draw) if word not in known]


def is_hint_for(text: str, key: str) -> bool:
    return text.partition(" HINT: ")[2].split("=")[0] == key


def refusal(*overrides: str, config_dirs: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_run(list(overrides), config_dirs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_misspelt_key_is_refused_with_the_one_that_was_meant(prefix: str) -> None:
    cases = neighbours()
    right = 0
    for engine, key, word in cases:
        text = refusal(f"backend={engine}", f"{prefix}{word}=1")
        assert text.startswith(f"{word} is not "), text
        right += is_hint_for(text, key)
    assert right >= SHARE * len(cases), f"{right} of {len(cases)}"


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_an_unknown_key_is_refused_beside_every_key(prefix: str) -> None:
    for engine, key in keys():
        for word in (f"{key}.zqxj", f"{key.rpartition('.')[0]}.zqxj".lstrip(".")):
            if not key.endswith(
                (
                    "extra", "environment", "arguments", "config", "setup", "srun", "modules", "container", "texts",
                    "adapter.paths",
                )
            ):  # fmt: skip
                assert refusal(f"backend={engine}", f"{prefix}{word}=1").startswith(f"{word} is not ")


@pytest.mark.parametrize("group", groups())
def test_a_misspelt_option_is_refused_with_the_one_that_was_meant(group: str) -> None:
    draw = random.Random(11)
    words = [
        (option, word) for option in options(group) for word in misspelt(option, draw) if word not in options(group)
    ]
    right = sum(refusal(f"{group}={word}").endswith(f" HINT: {group}={option}") for option, word in words)
    assert right >= SHARE * len(words)


def file_with(folder: Path, engine: str, key: str) -> tuple[str, ...]:
    """An override and a folder with the file that it selects, which sets a key to 1. The file is an option of the key's
    group, otherwise one of `cluster` that sets keys of the whole configuration."""
    group, dot, leaf = key.rpartition(".")
    inner = group if group in groups() else "cluster"
    content: dict[str, object] = {leaf: 1} if group in groups() else {group: {leaf: 1}} if dot else {leaf: 1}
    based_on = {"backend": [f"/schema/backend/{engine}@_here_"]}.get(inner, [])
    header = "" if group in groups() else "# @package _global_\n"
    (folder / inner).mkdir(exist_ok=True)
    text = header + yaml.safe_dump({"defaults": [*based_on, "_self_"], **content})
    (folder / inner / "mine.yaml").write_text(text)
    return (f"{inner}=mine", str(folder))


@pytest.mark.slow
def test_a_misspelt_key_in_a_file_is_refused_with_the_one_that_was_meant(tmp_path: Path) -> None:
    """Two keys of each group and of each engine are enough: keys are recognized as on the command line."""
    draw = random.Random(13)
    known: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for engine, key, word in neighbours():
        known.setdefault((engine, key.rpartition(".")[0]), []).append((key, word))
    cases = [(engine, *case) for (engine, _), words in known.items() for case in draw.sample(words, 2)]
    right = 0
    for engine, key, word in cases:
        override, folder = file_with(tmp_path, engine, word)
        text = refusal(override, config_dirs=(folder,))
        assert f"{word} is not " in text, text
        assert text.startswith(str(tmp_path)), text
        right += is_hint_for(text, key)
    assert right >= SHARE * len(cases), f"{right} of {len(cases)}"


@pytest.mark.slow
def test_an_unknown_key_in_a_file_is_refused_in_every_group(tmp_path: Path) -> None:
    for engine, key in sorted({("vllm", key.rpartition(".")[0]) for _, key in keys()}):
        word = f"{key}.zqxj".lstrip(".")
        override, folder = file_with(tmp_path, engine, word)
        assert f"{word} is not " in refusal(override, config_dirs=(folder,))


@pytest.mark.slow
def test_a_sweep_and_torchrun_refuse_it_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for engine, _, word in neighbours():
        assert main(["-m", f"backend={engine}", f"+{word}=1,2"]) == 2
        assert main(["-m", f"backend={engine}", "seed=1,2", f"{word}=1"]) == 2
        err = capsys.readouterr().err.splitlines()
        assert [line.partition(" is not ")[0] for line in err] == [word, word]
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29400")
    for engine, _, word in neighbours():
        assert main([f"backend={engine}", f"++{word}=1"]) == 2
        assert capsys.readouterr().err.startswith(f"{word} is not ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_in_processes_of_their_own(tmp_path: Path) -> None:
    out = f"output_dir={tmp_path / 'out'}"
    ended = command_line("backend=dummy", out, "+sampling.num_beams=4")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("sampling.num_beams is not a key of the configuration. HINT: python -m launcher --cfg")
    ended = torchrun(2, "-m", "launcher", "backend=dummy", out, "+sampling.temprature=1")
    assert ended.code != 0
    assert ended.err.count("HINT: sampling.temperature=1") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+backend.load_in_8bit=true"], "backend.load_in_8bit is not an option of backend=fsdp. HINT: python -m "),
        (["+model.quantization=int8"], "model.quantization is not a key of the configuration. HINT: quantization=int8"),
        (["backend=vllm", "+backend.quantization=fp8"], "backend.quantization is not an option of backend=vllm. "),
        (
            ["backend=transformers", "backend.extra.load_in_8bit=true"],
            "backend.extra.load_in_8bit is not an option of backend=transformers. "
            "HINT: python -m launcher backend=transformers --cfg",
        ),
        (["backend.kernel_inject=true"], "backend.kernel_inject is not an option of backend=fsdp. HINT: "
         "backend=deepspeed backend.kernel_inject=true"),
        (["sampling={top_k:3,top_pp:1}"], "sampling.top_pp is not a key of the configuration. HINT: sampling.top_p="),
        (["+model@draft=tiny_draft"], "model@draft is not a key"),
        (["+backend/other=fsdp"], "backend/other is not a key"),
        (["hydra.verbose=true"], "hydra.verbose is not a key"),
        (["~sampling"], "~sampling would remove sampling, which every run needs. HINT: leave ~sampling out"),
        (["~cluster=default"], "~cluster=default would remove cluster"),
        (["model=[tiny_llama,tiny_falcon]"], "model=[tiny_llama,tiny_falcon] is not one of "),
        (["seed=1,2"], "seed=1,2 has several values, which are a sweep. HINT: -m seed=1,2"),
        (["dry-run=true"], "dry-run is not a key of the configuration. HINT: dry_run=true"),
        (["plan"], "plan is a separate command. HINT: python -m launcher.plan"),
        (["dry_run"], "dry_run has no value. HINT: dry_run=true"),
        (["falcon_40b"], "falcon_40b has no value. HINT: model=falcon_40b"),
        (["accelerator=gpu"], "accelerator=gpu is not one of auto, cpu, cuda. HINT: accelerator=cuda"),
        (["precision=bfloat16"], "precision=bfloat16 is not one of fp32, fp16, bf16, fp16_mixed, bf16_mixed."),
        (["model=/models/mine"], "HINT: model.path=/models/mine"),
        (["model=mistralai/Mixtral-8x7B-v0.1"], "HINT: model.path=mistralai/Mixtral-8x7B-v0.1"),
        (["prompts=questions.txt"], "HINT: prompts=file prompts.path=questions.txt"),
        (["batch_size=8"], "HINT: measure.batch_size=8"),
        (["gpus=8"], "HINT: devices=8"),
    ],
)  # fmt: skip
def test_what_a_new_user_writes(overrides: list[str], message: str) -> None:
    text = refusal(*overrides)
    assert text.startswith(message) or (message.startswith("HINT: ") and text.endswith(message)), text


def test_a_plus_before_a_key_that_is_there_changes_it() -> None:
    assert compose_run(["+measure.repeats=3", "++seed=5", "+model=tiny_llama"]) == compose_run(
        ["measure.repeats=3", "seed=5", "model=tiny_llama"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_entries_that_are_the_users_to_name_need_no_plus(prefix: str) -> None:
    for override in ("backend.extra.block_size=32", "backend.extra={block_size: 32}"):
        assert compose_run(["backend=vllm", prefix + override]).backend.extra == {"block_size": 32}
    for override in ("cluster.environment.A=b", "cluster.environment={A: b}"):
        assert compose_run(["launch=slurm", prefix + override]).cluster.environment == {"A": "b"}
    assert compose_run(["launch=slurm", f"{prefix}cluster.extra=[--nice]"]).cluster.extra == ["--nice"]


def test_what_vllm_does_not_take_is_named_before_a_process_starts() -> None:
    if installed_package(None) is None:
        pytest.skip("vllm is not installed")
    config = compose_run(["backend=vllm", "backend.extra.max_num_seq=2"])
    with pytest.raises(ConfigError, match=r"no argument 'max_num_seq' .* HINT: backend.max_num_seqs=2"):
        prepare(config, ("python",))
    config = compose_run(["backend=vllm", "backend.extra.load_in_8bit=true"])
    with pytest.raises(ConfigError, match="vLLM has no argument 'load_in_8bit'"):
        prepare(config, ("python",))


def test_the_arguments_of_vllm_are_read_from_its_source(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "entrypoints").mkdir()
    (tmp_path / "engine" / "arg_utils.py").write_text(
        "class EngineArgs:\n    model: str = ''\n    block_size: int = 1\n"
    )
    (tmp_path / "entrypoints" / "llm.py").write_text(
        "class LLM:\n    def __init__(self, model, *, seed=0, **more): 1\n"
    )
    assert accepted_arguments(tmp_path) == {"model", "block_size", "seed"}


def test_a_configuration_with_keys_of_another_version_is_not_read() -> None:
    written = to_dict(compose_run(["backend=dummy"]))
    assert from_dict(written) == compose_run(["backend=dummy"])
    for group in ("sampling", "backend"):
        with pytest.raises(ConfigError, match=f"{group}.num_beams is not "):
            from_dict(written | {group: written[group] | {"num_beams": 4}})
