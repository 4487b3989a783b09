"""The command line: refusals before any process starts, in one line each, with no files left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from driver import A6000, nvml
from running import ROOT, Ended, command_line, launcher, run
from slurm_config import free_ports

from launcher.__main__ import main
from launcher.api import load_record
from launcher.composition.compose import compose_run
from launcher.composition.presets import options
from launcher.config.engines import BUILT_IN
from launcher.models import EMBEDDED
from launcher.prepare.prepare import prepare
from shards.machine.world import World


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line on stderr with which a command is refused."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    [line] = said.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["backend=fspd"],
            f"backend=fspd is not one of {', '.join(sorted(BUILT_IN))}. HINT: backend=fsdp",
        ),
        (
            ["model=tiny_falkon"],
            f"model=tiny_falkon is not one of {', '.join(options('model'))}. HINT: model=tiny_falcon",
        ),
        (["devices=0"], "devices=0 is not a number from 1 to 4096. HINT: devices=1"),
        (
            ["devices=1000000000", "dry_run=true"],
            "devices=1000000000 is not a number from 1 to 4096. HINT: devices=4096",
        ),
        (["devices=64", "num_nodes=65"], "devices x num_nodes is 4160, more than 4096. HINT: devices=63"),
        (
            ["batch_size=3"],
            "batch_size is not a key of the configuration. HINT: measure.batch_size=3",
        ),
        (
            ["backend.kernel_inject=true"],
            "backend.kernel_inject is not an option of backend=fsdp. "
            "HINT: backend=deepspeed backend.kernel_inject=true",
        ),
        (["--nproc=2"], "--nproc=2 is not an option. HINT: python -m launcher --help"),
        (["accelerator=cuda"], "accelerator=cuda, and no CUDA device can be seen. HINT: accelerator=cpu"),
        (["prompts=file"], "prompts=file needs a file. HINT: prompts.path=questions.txt"),
        (
            ["prompts=file", "prompts.path=missing.txt"],
            "Cannot read the prompts in missing.txt: No such file or directory. "
            "HINT: prompts=seed prompts.path=null, or prompts.path= a file of texts",
        ),
        (
            ["sampling.max_new_tokens=2000"],
            "Prompt 0 has 7 tokens; with 2000 new ones that is 2007, and the context of the model is 1024. "
            "HINT: sampling.max_new_tokens=1017, or a shorter prompt",
        ),
        (["sampling.top_p=0"], "sampling.top_p=0.0 is not a number above 0 and at most 1. HINT: sampling.top_p=1"),
        (["measure.repeats=0"], "measure.repeats=0 is not a number of 1 or more. HINT: measure.repeats=1"),
        (
            ["output_dir=/etc/passwd/runs"],
            f"Cannot write in output_dir=/etc/passwd/runs: Not a directory. HINT: output_dir={Path.home()}/runs",
        ),
        (
            ["-m", "launch=slurm", "backend=dummy", "seed=1,2", "output_dir=/etc/passwd/runs"],
            f"Cannot write in output_dir=/etc/passwd/runs: Not a directory. HINT: output_dir={Path.home()}/runs",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert refused(arguments, capsys) == expected
    assert list(tmp_path.iterdir()) == []


def ranks_of_torchrun(*arguments: str) -> list[Ended]:
    """Run the launcher as both ranks of a world that another launcher has started."""
    alone = World(world_size=2, local_world_size=2, master_port=free_ports(1)[0])
    command = [sys.executable, "-m", "launcher", "backend=dummy", "accelerator=cpu", *arguments]
    environs = [replace(alone, rank=rank, local_rank=rank).environ() for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda environ: run(command, 60, TORCHELASTIC_RUN_ID="none", **environ), environs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["-m", "seed=1,2"],
            "-m starts the ranks of each point itself, and torchrun has started 2. "
            "HINT: leave -m out, or start the sweep alone: python -m launcher -m",
        ),
        (["launch=slurm"], "launch=slurm submits a job, and torchrun has started the ranks. HINT: launch=local"),
        (
            ["output_dir=/dev/null/x"],
            f"Cannot write in output_dir=/dev/null/x: Not a directory. HINT: output_dir={Path.home()}/runs",
        ),
    ],
)
def test_a_refusal_under_torchrun_is_said_once_and_ends_all_ranks(
    arguments: list[str], line: str, tmp_path: Path
) -> None:
    first, second = ranks_of_torchrun(f"output_dir={tmp_path}", *arguments)
    assert first == Ended(2, "", f"{line}\n")
    assert second == Ended(2, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_node_that_lacks_what_others_have_says_so() -> None:
    world = World(rank=2, world_size=4, local_world_size=2, node_rank=1, num_nodes=2)
    for local_rank, said in ((0, "accelerator=cuda, and no CUDA device can be seen. HINT: accelerator=cpu\n"), (1, "")):
        here = replace(world, rank=2 + local_rank, local_rank=local_rank)
        ended = run([sys.executable, "-m", "launcher", "backend=dummy", "accelerator=cuda"], **here.environ())
        assert ended == Ended(2, "", said)


@pytest.mark.slow
def test_a_dry_run_under_torchrun_starts_nothing(tmp_path: Path) -> None:
    first, second = ranks_of_torchrun("dry_run=true", f"output_dir={tmp_path}")
    assert "-m launcher.launch.forks 2 launcher.rank.worker RUN_DIR" in first.out
    assert (first.code, second) == (0, Ended(0, "", ""))
    first, second = ranks_of_torchrun("--cfg", f"output_dir={tmp_path}")
    assert (yaml.safe_load(first.out)["devices"], first.code, second) == (2, 0, Ended(0, "", ""))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cards", "overrides", "expected"),
    [
        (0, [], "cpu"),
        (1, [], "cuda"),
        (1, ["accelerator=cpu"], "cpu"),
        (0, ["launch=slurm"], "cuda"),
        (0, ["launch=slurm", "cluster.gpus_flag=none"], "cpu"),
        (0, ["launch=slurm", "cluster.gpus_flag=none", "accelerator=cuda"], "cuda"),
        (1, ["launch=slurm", "accelerator=cpu"], "cpu"),
    ],
)
def test_where_a_run_is_to_be_is_settled_once(
    cards: int, overrides: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("shards.machine.nvml.pynvml", nvml([A6000] * cards))
    run = prepare(compose_run(["backend=dummy", "devices=1", *overrides]), ())
    assert (run.config.accelerator.name, run.on_cuda) == (expected, expected == "cuda")
    card = "NVIDIA RTX A6000" if cards else "a GPU of the cluster"
    assert run.plan.device_name == ("CPU" if expected == "cpu" else card)


@pytest.mark.parametrize("nodes", [1, 2])
def test_every_rank_of_a_node_needs_a_card(
    nodes: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("shards.machine.nvml.pynvml", nvml([A6000]))
    said = refused(["devices=2", f"num_nodes={nodes}", "dry_run=true"], capsys)
    assert said.startswith("devices=2, and this machine shows 1 CUDA devices. HINT: devices=1, or accelerator=cpu;")
    assert "srun --gpus-per-node" in said


def test_an_order_of_unlike_cards_that_plans_do_not_know_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    cards = [A6000, A6000 | {"name": "NVIDIA H200", "uuid": "GPU-b"}]
    expected = ["CUDA_DEVICE_ORDER=FASTEST_FIRST: the plan takes the cards in the order of NVML (PCI_BUS_ID)"]
    for driver, notes in ((nvml(cards), expected), (nvml([A6000, A6000]), [])):
        monkeypatch.setattr("shards.machine.nvml.pynvml", driver)
        assert list(prepare(compose_run(["backend=dummy"]), ()).notes) == notes


def test_several_values_without_multirun_name_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["devices=1,2"], capsys).endswith("HINT: -m devices=1,2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "The prompt set is empty"),
        ('{"prompt": "a"}\n{"prompt"\n', "prompts.jsonl:2 is not valid JSON"),
        ('{"prompt": "a"}\n\n{"text": "b"}\n', 'prompts.jsonl:3 has no text under "prompt".'),
        ('{"prompt": "a"}\n{"prompt": "\\ud800 x"}\n', "Prompt 1 has an unpaired surrogate"),
    ],
)
def test_a_prompt_file_is_refused_with_its_line(
    text: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text(text)
    assert expected in refused(["prompts=file", "prompts.path=prompts.jsonl"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def _without_a_shard(folder: Path) -> None:
    next(folder.glob("model-00002*")).unlink()


def _truncated(folder: Path) -> None:
    shard = next(folder.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1000])


def _index_of_another(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["transformer.h.99.mlp.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(value))


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _unreadable_config(folder: Path) -> None:
    _no_config(folder)
    (folder / "config.json").mkdir()


def _listed_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def _of_other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 64}))


def _of_more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))


def _link_to_nowhere(folder: Path) -> None:
    shard = next(folder.glob("model-00002*"))
    shard.unlink()
    shard.symlink_to("blobs/gone")


DAMAGES = (
    _without_a_shard, _truncated, _index_of_another, _no_config, _of_other_sizes, _of_more_layers, _link_to_nowhere,
    _unreadable_config, _listed_config,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(
    damage: object, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED / "tiny_falcon", folder)
    damage(folder)  # type: ignore[operator]
    line = refused([f"model.path={folder}"], capsys)
    assert str(folder) in line
    assert "HINT:" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_dry_run_needs_no_weights_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["model=falcon_40b", "machine=4xa6000", "precision=bf16", "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert "41,303,293,952 parameters" in said
    assert "-m launcher.launch.forks 4 launcher.rank.worker RUN_DIR" in said
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_ranks_the_engines_that_could_run_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["model=llama_30b", "devices=8", "precision=bf16", "launch=slurm", "cluster.device=a100_80g"]
    assert main([*asked, "dry_run=true"]) == 0
    said = dict(line.strip().split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    paces = dict(
        part.rsplit(" ", 1)
        for part in said["ceiling by engine, 4 prompts at a time"].removesuffix(" tokens/s").split(", ")
    )
    assert {"fsdp", "transformers"} <= set(paces)
    assert not {"deepspeed", "vllm", "dummy"} & set(paces), "52 heads over 8 devices"
    values = [float(pace) for pace in paces.values()]
    assert values == sorted(values, reverse=True)
    assert said["decode ceiling"].startswith(f"{paces['fsdp']} tokens/s")
    assert said["decode ceiling"].endswith("if every answer has its full length")


def test_help_names_every_option_and_six_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for group in ("backend", "model", "prompts"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert path.stem in said
    assert said.count("\n  python -m launcher") == 6


@pytest.mark.parametrize(
    "words", [["launcher", "--help"], ["launcher.plan", "model=falcon_40b"], ["launcher", "dry_run=true"]]
)
def test_a_reader_that_has_seen_enough_causes_no_traceback(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", *words]
    ended = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (ended.returncode in (-signal.SIGPIPE, 128 + signal.SIGPIPE), ended.stderr) == (True, "")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dummy", "fsdp"])
def test_the_process_that_launches_a_run_imports_no_torch(backend: str, tmp_path: Path) -> None:
    program = (
        "import sys; from launcher.__main__ import main;"
        "assert main(['backend=' + sys.argv[1], 'devices=1', 'measure.repeats=1', 'output_dir=' + sys.argv[2]]) == 0;"
        "assert not {'torch', 'transformers', 'lightning'} & set(sys.modules)"
    )
    ended = run([sys.executable, "-c", program, backend, str(tmp_path)])
    assert ended.code == 0, ended.err


@pytest.mark.slow
def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "backend=dummy", "devices=1", f"output_dir={tmp_path}"]
    with ThreadPoolExecutor(4) as pool:
        assert [ended.code for ended in pool.map(run, [command] * 4)] == [0, 0, 0, 0]
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*/record.json")]
    assert [record["status"] for record in records] == ["ok"] * 4


@pytest.mark.slow
def test_a_sweep_ends_with_a_row_for_each_point(tmp_path: Path) -> None:
    ended = launcher(
        "-m",
        "backend=dummy",
        "devices=1,2",
        "backend.fail_at='',load",
        "measure.repeats=1",
        f"output_dir={tmp_path}/a=b",
    )
    assert ended.code == 1
    assert "output_dir" not in ended.out, "it varies not, though it is quoted in each point"
    assert ended.last_json["points"] == {"ok": 2, "failed": 2}
    rows = ended.last_json["records"]
    assert [(row["world_size"], row["status"]) for row in rows] == [(1, "ok"), (1, "failed"), (2, "ok"), (2, "failed")]
    assert rows[3]["error"]["rank"] == 1
    assert rows[3]["error"]["stage"] == "load"


@pytest.mark.slow
def test_a_sweep_goes_on_past_a_point_that_is_refused(tmp_path: Path) -> None:
    ended = launcher("-m", "backend=dummy", "devices=1", "sampling.max_new_tokens=5000,8", f"output_dir={tmp_path}")
    assert ended.code == 1
    assert [row["status"] for row in ended.last_json["records"]] == ["refused", "ok"]
    run_dirs = [Path(row["run_dir"]) for row in ended.last_json["records"]]
    refused, done = (load_record(run_dir) for run_dir in run_dirs)
    assert (done.status, done.world_size) == ("ok", 1)
    assert (refused.world_size, refused.num_devices, refused.batch_size, refused.metrics) == (1, 1, 4, None)
    assert refused.error is not None
    assert refused.error.stage == "plan"


@pytest.mark.slow
def test_another_interpreter_runs_the_engine(tmp_path: Path) -> None:
    other = tmp_path / "other" / "bin" / "python"
    venv.create(tmp_path / "other", with_pip=False, symlinks=True)
    [site_packages] = (tmp_path / "other" / "lib").glob("*/site-packages")
    bare = launcher("backend=dummy", "devices=1", f"backend.python={other}", f"output_dir={tmp_path / 'runs'}")
    assert bare.code == 2
    missing = "msgspec, psutil, tokenizers, pynvml"
    assert bare.err.startswith(f"backend=dummy needs {missing}, which is not installed for {other}.")
    (site_packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
    ended = launcher("backend=dummy", "devices=1", f"backend.python={other}", f"output_dir={tmp_path / 'runs'}")
    assert ended.code == 0, ended.err
    record = json.loads(Path(ended.last_json["run_dir"], "record.json").read_text())
    assert record["environment"]["executable"] == str(other)


@pytest.mark.parametrize(
    ("python", "why"),
    [("/dev/null", "Permission denied"), ("/bin/false", "exit code 1, no message")],
)
def test_an_interpreter_that_does_not_run_is_refused(python: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["backend=dummy", f"backend.python={python}"], capsys)
    assert line == f"backend.python={python} does not run here: {why}. HINT: backend.python={sys.executable}"


@pytest.mark.parametrize("size", ["abc", "null", "0"])
def test_a_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["model=falcon_40b", f"model.config.vocab_size={size}", "dry_run=true"], capsys)
    assert line.startswith("The model's config gives vocab_size=")


def test_what_composed_is_shown_a_document_for_each_point(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "-m", "seed=1,2", "devices=3"]) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [(document["seed"], document["devices"]) for document in documents] == [(1, 3), (2, 3)]
    assert main(["--cfg", "seed=1", "devices=3"]) == 0
    assert [*yaml.safe_load_all(capsys.readouterr().out)] == documents[:1]


def test_an_engine_that_is_not_installed_names_its_extra(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    ended = command_line("backend=vllm", f"backend.python={python}", f"output_dir={tmp_path / 'runs'}")
    assert ended.code == 2
    assert "backend=vllm needs torch, vllm," in ended.err
    assert 'HINT: pip install -e ".[vllm]"' in ended.err
    assert not (tmp_path / "runs").exists()
