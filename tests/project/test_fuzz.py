"""Fuzzing with fixed seeds: every mutated input ends with exit code 0, 1 or 2, errors are one line, and time and memory
are bounded."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import resource
import shutil
import signal
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

import launcher.__main__
import launcher.compare
import launcher.experiments
import launcher.history
import launcher.plan
import launcher.report.__main__
import launcher.status
import launcher.verify
from launcher.composition.compose import compose_run
from launcher.config.bounds import BOUNDS
from launcher.config.schema import PromptsConfig
from launcher.models import EMBEDDED
from launcher.prepare import shapes
from launcher.prepare.prepare import prepare
from launcher.prompts.files import read_arrivals
from launcher.prompts.prompts import read_texts
from launcher.run_dir.gathering import finish
from launcher.run_dir.lifecycle import create_run_dir
from launcher.run_dir.run_dir import RunDir
from launcher.system.terminal import run_command
from shards.checkpoint.checkpoint import Checkpoint
from shards.errors import PlanError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECONDS = 5
MEMORY_KIB = 1 << 20
NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 3, 10**6, 10**9, 10**17, 10**30, -(10**30), 0.5, -1e300, 1e308, "", "x", "1", "\ud800",
    "\x1b[2J\n", "x" * 2000, "../x", "/dev/zero", "null", [], [[]], [None], {}, {"a": 1}, {"": []}, [1] * 300, ["x", 1],
]  # fmt: skip
SPLICES = [b"NaN", b"1e999", b"-Infinity", b"9" * 5000, b"[" * 3000, b"\xff", b"\0", b"{", b"}", b'"', b",", b"\n", b""]


def fuzz(number: int, examples: int) -> Callable[[Any], Any]:
    """Runs a test on `examples` cases, the same each time; all tests together have 2,000."""
    chosen = settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return lambda test: seed(number)(chosen(test))


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails if the body takes more than SECONDS of CPU time or too much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def expire(*_: object) -> None:
        raise AssertionError(f"over {SECONDS} s")

    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, expire)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # CPU time of this process, independent of the machine's load
    signal.alarm(12 * SECONDS)  # wall-clock time, for code that waits and so uses no CPU time
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after <= max(before, MEMORY_KIB), f"{after >> 10} MiB"


def command(main: Callable[[list[str]], int], words: list[str]) -> None:
    """Check that a command ends with 0, 1 or 2, and that a refusal is one line."""
    out, err = io.StringIO(), io.StringIO()
    with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_command(lambda: main(words))
        except SystemExit as ended:  # argparse exits after it has shown its help
            code = int(ended.code or 0)
    event(f"exit code {code}")
    assert code in (0, 1, 2)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    if code == 2:
        lines = [
            line
            for line in err.getvalue().splitlines()
            if not ("asking transformers" in line or line.startswith("note: "))
        ]
        assert len(lines) == 1, err.getvalue()


def refused_or_right(call: Callable[[], Any]) -> Any:
    """The result of a call; None if it raises a UserError, which must be one line."""
    with bounded():
        try:
            return call()
        except UserError as error:
            line = str(error)
    assert "\n" not in line
    return None


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) pair in a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def spliced(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with a range replaced by a splice or removed, or with everything after an offset cut off."""
    begin = draw(st.integers(0, len(content)))
    end = draw(st.sampled_from([begin, begin + 1, begin + 20, len(content)]))
    return content[:begin] + draw(st.sampled_from(SPLICES)) + content[end:]


@st.composite
def mutated(draw: st.DrawFn, given_value: Any) -> bytes:
    """The text of a JSON value with one to three parts replaced or removed; sometimes the text is broken instead."""
    value = copy.deepcopy(given_value)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := places(value)):
            break
        container, key = draw(st.sampled_from(found))
        if draw(st.integers(0, 4)) == 0:
            del container[key]
        else:
            container[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
    content = json.dumps(value).encode()
    return spliced(draw, content) if draw(st.integers(0, 5)) == 0 else content


GIVEN = json.loads((EMBEDDED / "tiny_llama" / "config.json").read_text())
QUANTIZED = (
    {"quant_method": "gptq", "bits": 4, "group_size": 8, "dynamic": {"-:x": {}}, "modules_in_block_to_quantize": ["x"]},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["x"]},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["x"], "activation_scheme": "static"},
    {"load_in_4bit": True, "llm_int8_skip_modules": ["x"], "bnb_4bit_use_double_quant": True},
    {
        "quant_method": "compressed-tensors", "ignore": ["re:x.*"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": {"dynamic": True, "symmetric": True},
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
        }},
    },
)  # fmt: skip
FAMILIES = ("falcon", "llama", "mistral", "qwen2", "qwen3", "gpt2")
WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": ["x"] * 4}
CONFIGS = st.tuples(st.sampled_from(FAMILIES), st.sampled_from((None, *QUANTIZED)), st.booleans()).flatmap(
    lambda chosen: mutated(
        {**GIVEN, "model_type": chosen[0], **(WINDOWS if chosen[2] else {})}
        | ({"quantization_config": chosen[1]} if chosen[1] else {})
    )
)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Disables the process that asks transformers and the hub, and changes to an empty folder, which it returns."""

    def unknown(*_: object) -> Any:
        raise PlanError("transformers is not asked here.", "a family that is known")

    monkeypatch.setattr(shapes, "ask_transformers", unknown)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the time of the disk does not count
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@fuzz(1, 300)
@given(content=CONFIGS, engine=st.sampled_from(["fsdp", "vllm", "transformers", "deepspeed"]))
def test_configs(offline: Path, content: bytes, engine: str) -> None:
    (offline / "config.json").write_bytes(content)
    command(launcher.plan.main, [f"model={offline}", "machines=2xa6000", f"backend={engine}"])


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I8", "shape": [], "data_offsets": [32, 33]},
}


@pytest.mark.slow
@fuzz(2, 400)
@given(
    content=mutated(HEADER),
    wrong=st.sampled_from([0, 0, 0, 0, 1, -1, 1 << 40]),
    tail=st.sampled_from([33, 33, 33, 32, 40]),
)
def test_headers_are_read_as_the_safetensors_library_reads_them(
    offline: Path, content: bytes, wrong: int, tail: int
) -> None:
    """Every file that our reader accepts is also accepted by the safetensors library, with the same shapes."""
    path = offline / "model.safetensors"
    path.write_bytes(struct.pack("<Q", max(len(content) + wrong, 0)) + content + bytes(tail))
    checkpoint = refused_or_right(lambda: Checkpoint.open(offline))
    if checkpoint is not None:
        with safe_open(path, framework="np") as theirs:
            assert {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.offset_keys()} == {
                name: entry.shape for name, entry in checkpoint.tensors.items()
            }
    else:
        with contextlib.suppress(SafetensorError), safe_open(path, framework="np"):
            pass


@pytest.mark.slow
@fuzz(3, 200)
@given(content=mutated({"metadata": {"total_size": 9}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
def test_indexes(offline: Path, content: bytes) -> None:
    (offline / "model.safetensors.index.json").write_bytes(content)
    refused_or_right(lambda: Checkpoint.open(offline))


TURNS = [{"from": "human", "value": "b"}, {"role": "user", "content": "c"}]
TABLE = b'id,prompt,arrival_s\n1,"a, ""b""",0\n2,c,1.5\n'


@st.composite
def prompt_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name and content of a prompt file."""
    name = draw(st.sampled_from(["a.jsonl", "a.txt", "a.json", "a.csv", "a.tsv"]))
    row = draw(st.sampled_from([{"prompt": "a", "arrival_s": 0}, {"id": 1, "conversations": TURNS}]))
    if name == "a.json":
        return name, draw(mutated(draw(st.sampled_from([[row, row], {"data": [row], "version": 1}]))))
    if name in ("a.csv", "a.tsv"):
        return name, spliced(draw, spliced(draw, TABLE))
    return name, b"\n".join(draw(st.lists(mutated(row), max_size=3)))


@pytest.mark.slow
@fuzz(4, 340)
@given(file=prompt_files(), field=st.sampled_from([None, None, None, "prompt", "id", "x"]))
def test_prompt_files(offline: Path, file: tuple[str, bytes], field: str | None) -> None:
    name, content = file
    (offline / name).write_bytes(content)
    wanted = PromptsConfig(name="file", path=str(offline / name), field=field)
    texts = refused_or_right(lambda: read_texts(wanted))
    refused_or_right(lambda: read_arrivals(wanted))
    assert texts is None or all(isinstance(text, str) and text for text in texts)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a dummy run that has finished successfully."""
    folder = tmp_path_factory.mktemp("finished")
    asked = ["backend=dummy", "devices=1", "prompts.texts=[a,b]", f"output_dir={folder}", "sampling.max_new_tokens=3"]
    run_dir = create_run_dir(prepare(compose_run(asked), ("python", "-m", "launcher", *asked)))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert launcher.__main__.main(["resume=true", f"run_dir={run_dir}"]) == 0
    return run_dir.path


FILES = (
    "run.json", "record.json", "plan.json", "attempt.json", "saved.json", "rank_0.json", "prompts.jsonl",
    "completions.jsonl", "rank_0.repeats.jsonl", "rank_0.completions.jsonl", "rank_0.progress",
)  # fmt: skip


HOW = ("status", "compare", "finish", "resume", "report", "history", "verify")
REPORTS = ("--csv", "--json", "--markdown", "--html=page.html")


@pytest.mark.slow
@fuzz(5, 350)
@given(data=st.data(), name=st.sampled_from(FILES), how=st.sampled_from(HOW))
def test_run_directories(offline: Path, finished: Path, data: st.DataObject, name: str, how: str) -> None:
    run_dir = offline / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(finished, run_dir)
    lines = (run_dir / name).read_text().splitlines() if name.endswith("jsonl") else [(run_dir / name).read_text()]
    place = data.draw(st.integers(0, len(lines) - 1))
    rows = [line.encode() for line in lines]
    rows[place] = data.draw(mutated(json.loads(rows[place])))
    (run_dir / name).write_bytes(b"\n".join(rows) + b"\n")
    if how == "status":
        command(launcher.status.main, [str(run_dir)])
    elif how == "compare":
        command(launcher.compare.main, [str(finished), str(run_dir)])
    elif how == "finish":
        refused_or_right(lambda: finish(RunDir(run_dir)))
    elif how == "report":
        command(launcher.report.__main__.main, [str(run_dir), data.draw(st.sampled_from(REPORTS))])
    elif how == "history":
        command(launcher.history.main, [str(offline)])
    elif how == "verify":
        command(launcher.verify.main, [str(run_dir)])
    elif RunDir(run_dir).is_done():
        command(launcher.__main__.main, ["resume=true", f"run_dir={run_dir}"])


KEYS = (
    *BOUNDS, "backend", "model", "prompts", "cluster", "precision", "prompts.texts", "prompts.path", "model.config",
    "model.weights", "cluster.time", "cluster.extra", "cluster.environment", "output_dir", "resume", "backend.extra",
    "launch", "launch.rendezvous", "accelerator", "nothing", "model.config.vocab_size", "hydra.run.dir", "",
)  # fmt: skip
VALUES = (
    "1", "0", "-1", "1e999", "nan", "inf", "9" * 30, "9" * 5000, "", "null", "true", "a", "a,b", "[]", "[[a]]",
    "[{a:1}]", "{}", "{a:{b:[]}}", "[" * 100, "${x}", "${oc.env:HOME}", "'", '"', "\\", "range(0,inf)", "range(1,10,0)",
    "interval(0,1)", "glob(*)", "choice(1,2)", "range(0,3000000)", "shuffle(a,b)", "\ud800", "\x1b[2J", "a\nb",
    "01:00:00", "dummy", "fsdp", "synthetic", "tiny_llama", "slurm", "/dev/zero", "???", "a=b", "$(id)", "x" * 3000,
)  # fmt: skip
WORDS = st.one_of(
    st.builds("{}{}={}".format, st.sampled_from(["", "", "+", "~"]), st.sampled_from(KEYS), st.sampled_from(VALUES)),
    st.sampled_from(["-m", "--cfg", "--help", "--version", "--nothing", "-x", "=", "a", "", "--config-dir=", "--x=."]),
)  # fmt: skip


@pytest.mark.slow
@fuzz(6, 200)
@given(words=st.lists(WORDS, min_size=1, max_size=4))
def test_command_lines(offline: Path, words: list[str]) -> None:
    command(launcher.__main__.main, [*words, "dry_run=true"])
    assert list(offline.iterdir()) == []
    assert os.getcwd() == str(offline)


EXPERIMENT = {
    "prompts": {"name": "published", "texts": ["a"]}, "precision": "bf16", "devices": 2,
    "sampling": {"max_new_tokens": 5, "ignore_eos": True}, "measure": {"batch_size": 1},
    "experiment": {
        "name": "mine", "about": "a", "hardware": "2xa6000", "source": "b", "location": "c", "unknown": ["d"],
        "needs": [], "notes": ["e"],
        "figures": [
            {"name": "new_tokens_per_s", "value": 0.6, "unit": "tokens/s"},
            {"name": "peak_memory_gb", "value": 46.1, "unit": "GB"},
            {"name": "generation_s", "value": 83.4, "unit": "s"},
        ],
    },
}  # fmt: skip


@pytest.mark.slow
@fuzz(7, 30)
@given(content=mutated(EXPERIMENT))
def test_experiments(offline: Path, content: bytes) -> None:
    """A preset in the user's own folder, in the list of experiments and in a run."""
    folder = offline / "conf" / "experiment"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.yaml").write_bytes(b"# @package _global_\n" + content)
    config_dir = str(offline / "conf")
    config = refused_or_right(lambda: compose_run(["experiment=mine", "model=falcon_40b"], (config_dir,)))
    if config is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            refused_or_right(lambda: launcher.experiments.markdown([config]))
            refused_or_right(lambda: launcher.experiments.show([config], ["a6000", "a6000"]))
    asked = ["experiment=mine", f"--config-dir={config_dir}", "model=tiny_llama", "backend=dummy", "dry_run=true"]
    command(launcher.__main__.main, asked)


@fuzz(8, 80)
@given(rows=mutated([{"run_dir": "run", "overrides": "a", "status": "ok"}, {"run_dir": None}]))
def test_rows_of_a_sweep(offline: Path, rows: bytes) -> None:
    (offline / "sweep.json").write_bytes(rows)
    command(launcher.report.__main__.main, [str(offline), "--csv"])
    command(launcher.status.main, [str(offline)])


COMMANDS: dict[Callable[[list[str]], int], tuple[str, ...]] = {
    launcher.report.__main__.main: (*REPORTS, "--format=gif", "--figures=figures", "--format="),
    launcher.compare.main: ("--min-match=0", "--min-match=x", "--min-speed-ratio=nan", "--fail-if=a<b", "--json"),
    launcher.experiments.main: ("--json", "--markdown"),
    launcher.status.main: ("--json", "--help"),
    launcher.history.main: ("--json", "--csv"),
    launcher.verify.main: ("--json", "--reference=."),
}


@fuzz(9, 100)
@given(data=st.data(), main=st.sampled_from(list(COMMANDS)))
def test_words_of_the_other_commands(offline: Path, finished: Path, data: st.DataObject, main: Any) -> None:
    paths = [str(finished), str(finished.parent), ".", "", "/dev/null", "nowhere", "\udcff", "a\nb", "x" * 3000, "-"]
    words = st.sampled_from([*paths, *COMMANDS[main], "--nothing", "--help", "-x", "=", "--"])
    rest = ["--nothing"] if main is launcher.experiments.main else []  # an unknown option; a real list takes seconds
    command(main, [*data.draw(st.lists(words, min_size=1, max_size=3)), *rest])
