"""Every configuration file composes, lists every field, and survives serialization to a rank and back."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import pytest
import yaml

from launcher.__main__ import main
from launcher.composition.compose import compose_run
from launcher.composition.presets import conf_dir, options
from launcher.composition.sweeps import expand_sweep
from launcher.config.bounds import BOUNDS
from launcher.config.engines import BUILT_IN, load_engine
from launcher.config.options import BOUND
from launcher.config.parts.storage import Precision
from launcher.config.schema import ConfigError, ModelConfig, PromptsConfig, RunConfig
from launcher.config.values import from_dict, to_dict

if TYPE_CHECKING:
    from pathlib import Path

SCHEMAS = {"model": ModelConfig, "prompts": PromptsConfig}
CHOICES = [(group, option) for group in ("backend", "model", "prompts") for option in options(group)]


def test_every_engine_has_its_file() -> None:
    assert options("backend") == sorted(BUILT_IN)


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_a_file_composes_and_goes_to_a_rank_and_back(group: str, option: str) -> None:
    config = compose_run([f"{group}={option}"])
    assert getattr(config, group).name == option
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_a_file_spells_out_every_field(group: str, option: str) -> None:
    text = (conf_dir() / group / f"{option}.yaml").read_text()
    schema = load_engine(option) if group == "backend" else SCHEMAS[group]
    assert set(yaml.safe_load(text)) - {"defaults"} == {field.name for field in dataclasses.fields(schema)}
    assert text.startswith("# ")


def test_the_backend_is_typed_by_its_engine() -> None:
    config = compose_run(["backend=vllm", "backend.extra.seed=3", "precision=bf16"])
    assert type(config.backend) is load_engine("vllm")
    assert config.backend.extra == {"seed": 3}
    assert config.precision is Precision.bf16


def test_a_folder_of_ones_own_is_searched_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("my conf")
    (folder / "prompts").mkdir()
    preset = {**to_dict(compose_run([]).prompts), "name": "mine", "texts": ["Hello"]}
    (folder / "prompts" / "mine.yaml").write_text(yaml.safe_dump(preset))
    config = compose_run(["prompts=mine"], (str(folder),))
    assert config.prompts == PromptsConfig(name="mine", texts=["Hello"])


def test_a_folder_of_ones_own_is_in_what_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text("name: mine\npartition: [a\nqos: b\n")
    with pytest.raises(ConfigError, match=r"cluster=nimbus is not one of default, .*mine\. HINT: "):
        compose_run(["cluster=nimbus"], (str(tmp_path),))
    assert main(["--help", f"--config-dir={tmp_path}"]) == 0
    assert " | mine" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"cluster/mine.yaml:3 is not YAML: "):
        compose_run(["cluster=mine"], (str(tmp_path),))


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--config-dir=/nope"], "/nope is not a folder. HINT: "),
        (["--help", "--config-dir", "/nope"], "/nope is not a folder. HINT: "),
        (["--config-dir"], "argument --config-dir: expected one argument. HINT: "),
    ],
)
def test_a_folder_that_is_none_is_refused(words: list[str], fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backend=dummy", "dry_run=true", *words]) == 2
    assert fact in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "tiny_falcon"),
        (["model.path=/models/my-llama/"], "my-llama"),
        (["model=llama_7b", "model.path=tiiuae/falcon-7b"], "falcon-7b"),
        (["model.path=embedded:tiny_llama"], "tiny_llama"),
        (["model.path=/models/my-llama", "model.name=it"], "it"),
        (["model=tiny_llama"], "tiny_llama"),
    ],
)
def test_a_model_has_the_name_of_its_path(overrides: list[str], name: str) -> None:
    assert compose_run(overrides).model.name == name


def test_the_home_folder_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = compose_run(["output_dir=~/runs", "prompts=file", "prompts.path=~/a.txt", "model.path=~/llama"])
    found = (config.output_dir, config.prompts.path, config.model.path, config.model.name)
    assert found == ("/home/me/runs", "/home/me/a.txt", "/home/me/llama", "llama")


@pytest.mark.parametrize(
    ("overrides", "points"),
    [
        (["devices=1"], [["devices=1"]]),
        (
            ["backend=fsdp,vllm", "seed=7", "devices=1,2"],
            [
                ["backend=fsdp", "seed=7", "devices=1"],
                ["backend=fsdp", "seed=7", "devices=2"],
                ["backend=vllm", "seed=7", "devices=1"],
                ["backend=vllm", "seed=7", "devices=2"],
            ],
        ),
        (["seed=range(0,3)"], [["seed=0"], ["seed=1"], ["seed=2"]]),
        (["sampling.temperature=range(0,1,0.5)"], [["sampling.temperature=0.0"], ["sampling.temperature=0.5"]]),
        (["seed=range(3,0,-2)"], [["seed=3"], ["seed=1"]]),
    ],
)
def test_a_sweep_is_the_product_of_its_axes(overrides: list[str], points: list[list[str]]) -> None:
    assert expand_sweep(overrides) == points


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["seed=range(0,3000000)"], "That is a sweep of 3,000,000 points, more than 10,000. HINT: "),
        (["seed=range(0,200)", "devices=range(1,52)"], "That is a sweep of 10,200 points, more than 10,000. HINT: "),
        (["seed=range(0,inf)"], "seed=range(0,inf) has no points, or no end. HINT: seed=1,2"),
        (["seed=shuffle(range(0,inf))"], "seed=shuffle(range(0,inf)) has no points, or no end. HINT: "),
        (["seed=range(1,10,0)"], "seed=range(1,10,0) has no points, or no end. HINT: "),
        (["seed=range(1,10,-1)"], "seed=range(1,10,-1) has no points, or no end. HINT: "),
        (["seed=range(0,1,1e-320)"], "seed=range(0,1,1e-320) has no points, or no end. HINT: "),
        (["seed=range(nan,3)"], "seed=range(nan,3) has no points, or no end. HINT: "),
        (["seed=interval(0,1)"], "seed=interval(0,1) has no points: an interval is for a search. HINT: "),
        (
            ["model=glob(tiny*)"],
            "model=glob(tiny*) is not used: a sweep names its points. HINT: model=tiny_draft,tiny_falcon,tiny_llama",
        ),
    ],
)
def test_a_sweep_that_does_not_end_or_begin_is_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand_sweep(overrides)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    "override",
    [
        "prompts.count=1000000000", "prompts.input_tokens=1000000000", "measure.repeats=1000000000",
        "measure.warmup=1000000000", "sampling.max_new_tokens=1000000000", "prompts.count=20000",
    ],
)  # fmt: skip
def test_what_would_take_for_ever_is_refused(override: str) -> None:
    """The last case is refused for the total of its prompts: 20,000 of 100,000 tokens each."""
    with pytest.raises(ConfigError, match=r"(more than|not a number) .*HINT: "):
        compose_run(["prompts=synthetic", "prompts.input_tokens=100000", override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("precision=fp8", ["precision=fp8 is not one of fp32, fp16, bf16, fp16_mixed, bf16_mixed. HINT: precision="]),
        ("devices=abc", ["devices=abc is not a whole number. HINT: devices=1"]),
        ("devices=null", ["devices=null is not a value. HINT: leave devices out"]),
        ("sampling.temperature=hot", ["sampling.temperature=hot is not a number. HINT: sampling.temperature=1"]),
        ("dry_run=maybe", ["dry_run=maybe is not true or false. HINT: dry_run=true"]),
        ("cluster.extra=--exclusive", ["cluster.extra=--exclusive is not a list. HINT: cluster.extra=[a,b]"]),
        ("seed=a=b", ["seed=a=b is not a whole number. HINT: seed=1"]),
        (
            "model.name=a=b",
            ["model.name=a=b cannot be read: mismatched input '='. HINT: \"model.name='a=b'\", in these"],
        ),
        ("=3", ["=3 has no key"]),
        ("model=null", ["model=null is not one of bloom_176b, ", "HINT: model=tiny_falcon"]),
        ("backend=", ["backend= is not one of deepspeed, ", "HINT: backend=fsdp"]),
        ("cluster=null", ["cluster=null is not one of default, ", "HINT: cluster=default"]),
        ("model.config.vocab_size=3", ["model.config has no entries"]),
        ("sampling.temprature=1", ["sampling.temprature", "HINT: sampling.temperature"]),
        ("+nothing=1", ["nothing is not a key"]),
        ("a b", ["a b"]),
        ("backend.kernel_inject={a:8}", ["kernel_inject"]),
    ],
)
def test_a_wrong_override_is_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run([override])
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


def number_keys(kind: Any, prefix: str = "") -> set[str]:
    """The keys of a configuration that can hold a number."""
    keys = set()
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            keys |= number_keys(hint, f"{prefix}{name}.")
        elif {int, float} & {hint, *get_args(hint)}:
            keys.add(prefix + name)
    return keys


def test_every_number_has_its_bounds() -> None:
    assert number_keys(RunConfig) == BOUNDS.keys()
    for name in BUILT_IN:
        bounded = {item.name for item in dataclasses.fields(load_engine(name)) if BOUND in item.metadata}
        assert number_keys(load_engine(name)) == bounded, name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["prompts=synthetic", "prompts.output_tokens=0"],
            "prompts.output_tokens=0 is not a number of 1 or more. HINT: ",
        ),
        (
            ["prompts=synthetic", "prompts.count=0"],
            "prompts.count=0 is not a number of 1 or more. HINT: prompts.count=1",
        ),
        (["launch.poll_s=-1"], "launch.poll_s=-1.0 is not a number above 0. HINT: launch.poll_s=1"),
        (["launch.poll_s=0"], "launch.poll_s=0.0 is not a number above 0. HINT: "),
        (
            ["backend=vllm", "backend.gpu_memory_utilization=7"],
            "backend.gpu_memory_utilization=7.0 is not a number above 0 and at most 1. ",
        ),
        (
            ["backend=dummy", "backend.step_s=-1"],
            "backend.step_s=-1.0 is not a number of 0 or more. HINT: backend.step_s=0",
        ),
        (["seed=99999999999"], "seed=99999999999 is not a number from 0 to 4294967295. HINT: seed=4294967295"),
        (["seed=-1"], "seed=-1 is not a number of 0 or more. HINT: seed=0"),
        (["hang_timeout_s=nan"], "hang_timeout_s=nan is not a number of 0 or more. HINT: hang_timeout_s=0"),
        (["timeout_s=inf"], "timeout_s=inf is not a number from 0 to 1000000000. HINT: "),
        (["cluster.array_limit=0"], "cluster.array_limit=0 is not a number of 1 or more. HINT: cluster.array_limit=1"),
        (
            ["prompts.path=mine.txt"],
            "prompts=seed has its own prompts, and does not use prompts.path=mine.txt. "
            "HINT: prompts=file prompts.path=mine.txt",
        ),
        (["prompts=synthetic", "prompts.path=a.txt"], "prompts=synthetic has its own prompts, and does not use "),
        (
            ["backend=transformers", "backend.device_map=foo"],
            "backend.device_map=foo is not one of auto, balanced, balanced_low_0, sequential. HINT: ",
        ),
        (["backend=dummy", "backend.fail_at=foo"], "backend.fail_at=foo is not one of load, generate, hang. HINT: "),
        (["prompts.count=2"], "prompts.count=2 is the number of random prompts, and prompts=seed has others. HINT: "),
        (["prompts=file", "prompts.path=a.txt", "prompts.count=2"], "prompts.count=2 is the number of random prompts"),
        (
            ["prompts.input_tokens=16"],
            "prompts.input_tokens=16 is the length of random prompts, and prompts=seed has others. "
            "HINT: prompts=synthetic prompts.input_tokens=16",
        ),
        (["prompts=file", "prompts.input_tokens=16"], "prompts.input_tokens=16 is the length of random prompts"),
    ],
)
def test_what_no_run_can_have_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    assert str(caught.value).startswith(message)


def test_the_largest_seed_samples() -> None:
    torch = pytest.importorskip("torch")
    largest = compose_run([f"seed={BOUNDS['seed'].most}"]).seed
    torch.Generator().manual_seed((largest << 32) + 2**32 - 1)
