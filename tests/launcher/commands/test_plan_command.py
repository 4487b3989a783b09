"""`python -m launcher.plan`, and the tables in the docs that were made by it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from running import ROOT

from launcher.plan import main
from shards.plan.plan import Plan

SECTION = re.compile(r"```\npython -m launcher\.plan ([^\n]*)\n```\n\n(.*?)(?=\n##+ |\Z)", re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "models"),
    [
        ("plans.md", ["falcon_40b", "llama_30b", "falcon_40b"]),
        ("gpu.md", ["falcon_7b", "llama_7b", "falcon_40b", "llama_30b"]),
    ],
)
def test_docs_are_what_the_command_prints(page: str, models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sections = SECTION.findall((ROOT / "docs" / page).read_text())
    assert [arguments.split()[0] for arguments, _ in sections] == [f"model={model}" for model in models]
    for arguments, table in sections:
        assert main(arguments.split()) == 0
        assert capsys.readouterr().out.strip() == table.strip()


def test_the_falcon_table_holds_the_published_pace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=falcon_40b", "machines=2xa6000", "backend=fsdp", "--markdown"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2xa6000"))
    assert row.split(" | ")[2:4] + row.split(" | ")[7:8] == ["38.47 GiB", "75.00 MiB", "**0.613**"]


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=llama_30b", "devices=1,8", "device=a100_40g", "backend=vllm,fsdp"]) == 0
    out = capsys.readouterr().out
    assert "llama_30b: 32,528,943,616 parameters" in out
    assert re.findall(r"(\dxa100_40g) +│ (\w+) ", out) == [
        ("1xa100_40g", "vllm"),
        ("1xa100_40g", "fsdp"),
        ("8xa100_40g", "vllm"),
        ("8xa100_40g", "fsdp"),
    ]
    assert "8xa100_40g vllm: 52 attention heads cannot be divided by 8 devices" in out


def test_the_plans_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama_30b", "device=a100_40g", "devices=8", "backend=fsdp,vllm"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["num_parameters"]) == ("llama_30b", 32528943616)
    fsdp, vllm = found["plans"]
    assert [fsdp["machine"], fsdp["backend"], fsdp["problem"]] == ["8xa100_40g", "fsdp", None]
    assert Plan.from_dict(fsdp["plan"]).num_parameters == found["num_parameters"]
    assert (vllm["plan"], vllm["problem"][:37]) == (None, "52 attention heads cannot be divided ")


def test_parameters_by_module_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=falcon_40b", "--modules"]) == 0
    cells = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    rows = {name.strip(): [cell.strip() for cell in rest] for name, *rest in cells}
    assert rows["transformer.h.*.mlp.dense_h_to_4h.weight"][:3] == ["32768 x 8192", "60", "16,106,127,360"]
    assert sum(int(row[2].replace(",", "")) for row in rows.values()) == 41_303_293_952


def test_embedded_models_and_folders_are_read_from_their_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=tiny_llama", "device=cpu", "--markdown"]) == 0
    table = capsys.readouterr().out.partition("\n")[2]
    folder = ROOT / "launcher/models/tiny_llama"
    assert main([f"model={folder}", "device=cpu", "--markdown"]) == 0
    assert capsys.readouterr().out.partition("\n")[2] == table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: No model was named: one of bloom_176b, f"),
        (["model=falcon_4b"], "error: model=falcon_4b is neither a folder, nor a hub id, nor one of bloom_176b, f"),
        (
            ["model=falcon_7b", "gpus=2"],
            "error: gpus=2 is not an argument of the plan. HINT: devices=2",
        ),
        (["model=falcon_7b", "devices=0"], "error: devices=0 is not a whole number above 0. HINT: devices=2"),
        (
            ["model=falcon_7b", "machines=a6000"],
            "error: machines=a6000 has no number of devices. HINT: machines=2xa6000",
        ),
        (
            ["model=falcon_7b", "machines=999999999xa6000"],
            "error: 999999999 devices are more than 4096. HINT: machines=4096xa6000",
        ),
        (
            ["model=falcon_7b", "devices=4096", "num_nodes=2"],
            "error: 8192 devices are more than 4096. HINT: devices=2048",
        ),
        (["model=falcon_7b", "machines=2xb300"], "error: machines=2xb300: b300 is not one of the devices t4, l4, "),
        (["model=falcon_7b", "link=string"], "error: string is not one of the links pcie3, "),
        (
            ["model=falcon_7b", "backend=tgi"],
            "error: backend=tgi cannot be planned. HINT: backend=fsdp,deepspeed,tensor_parallel,",
        ),
        (
            ["model=falcon_7b", "precision=int3"],
            "error: precision=int3 is not one of fp32, fp16, bf16, fp16_mixed, bf16_mixed. HINT: precision=",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err[: len(message)], err.count("\n")) == ("", message, 1)


@pytest.mark.parametrize(
    ("machines", "expected"),
    [
        ("2xa6000", "machines=4xa6000, or batch_size=24, or backend=vllm"),
        ("2xrtx5090", "machines=10xrtx5090"),
    ],
)
def test_hints_are_arguments_of_the_command(machines: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"model": "falcon_40b", "machines": machines, "backend": "fsdp", "batch_size": "100"}
    assert main([*map("=".join, asked.items()), "--markdown"]) == 0
    hint = capsys.readouterr().out.rpartition("HINT: ")[2].strip().rstrip(".")
    assert hint == expected
    for changed in hint.split(", or "):
        key, _, value = changed.partition("=")
        assert main([*map("=".join, (asked | {key: value}).items()), "--markdown"]) == 0
        assert "impossible" not in capsys.readouterr().out


def test_what_joins_nodes_is_not_what_joins_devices(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=llama2_70b", "machines=2xa100_80g", "num_nodes=2", "backend=vllm", "--markdown"]
    assert main(arguments) == 0
    unknown = capsys.readouterr().out
    assert main([*arguments, "link=infiniband_hdr"]) == 0
    known = capsys.readouterr().out
    rows = [next(line for line in out.splitlines() if line.startswith("| 2 x")) for out in (unknown, known)]
    assert [row.split(" | ")[0] for row in rows] == ["| 2 x 2xa100_80g"] * 2
    assert rows[0].endswith("| - | - | - |")
    assert "What joins the nodes is not known, and so no ceiling: link=NAME." in unknown
    assert "Links: 2 x 2xa100_80g InfiniBand HDR." in known


def test_no_torch_is_imported() -> None:
    code = "import sys, launcher.plan; print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
