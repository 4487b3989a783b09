"""A first look at a machine with cards: doctor, probe, tests, and runs of each engine beside plain generate.

`check_gpu.py [OUT]`, called by scripts/check_gpu.sh. Each step is a process of its own and leaves OUT/STEP.json, and
the next call goes on where one was cut off; OUT/table.md has the figures. `--rehearse` runs the same list on a CPU with
tiny models, for the tests; `--plain MODEL BATCH` is one measurement of transformers' own generate.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shards.machine.cards import cuda_devices

ROOT = Path(__file__).resolve().parents[1]
STEP_S = 590  # a call may be limited to ten minutes
PROMPT_TOKENS, NEW_TOKENS = 128, 128
SIZES = {"falcon_7b": 14, "llama_7b": 14, "falcon_40b": 83, "llama_30b": 66}  # GB in bf16


@dataclass(frozen=True, slots=True)
class Point:
    """One run of an engine, and the batch that it answers at once."""

    engine: str
    model: str
    batch: int
    devices: int = 1

    @property
    def name(self) -> str:
        return f"{self.model}_{self.engine}_x{self.devices}_b{self.batch}"


def points(rehearse: bool, cards: int, capacity: int) -> list[Point]:
    """The runs that are possible here: all engines where there are two cards, models where they fit one."""
    if rehearse:
        return [Point("transformers", "tiny_llama", 1), Point("transformers", "tiny_llama", 2)]
    engines = ["transformers", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
    fitting = [model for model, size in SIZES.items() if size * 1.1e9 < capacity]
    found = [Point(engine, model, batch) for model in fitting for engine in engines for batch in (1, 8, 32)]
    several = [Point(engine, "falcon_7b", 8, 2) for engine in ("tensor_parallel", "fsdp", *engines[1:])]
    return found + (several if cards > 1 else [])


def words(point: Point, rehearse: bool, out: Path) -> list[str]:
    """The command of a run."""
    place = ["accelerator=cpu", "precision=fp32"] if rehearse else ["accelerator=cuda", "precision=bf16"]
    new = 4 if rehearse else NEW_TOKENS
    return [
        sys.executable, "-m", "launcher", f"backend={point.engine}", f"model={point.model}", "model.weights=random",
        *place, f"devices={point.devices}", "prompts=synthetic", f"prompts.count={point.batch}",
        f"prompts.input_tokens={8 if rehearse else PROMPT_TOKENS}", f"prompts.output_tokens={new}",
        f"measure.batch_size={point.batch}", "measure.repeats=3", f"output_dir={out / 'runs'}",
    ]  # fmt: skip


def plain(model: str, batch: int, rehearse: bool) -> dict[str, Any]:
    """Tokens/s of transformers' own generate over random weights of the same shape, the best of three."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    preset = yaml.safe_load((ROOT / "conf" / "model" / f"{model}.yaml").read_text())
    folder = ROOT / "launcher" / "models" / model
    values = preset["config"] or json.loads((folder / "config.json").read_text())
    config = transformers.AutoConfig.for_model(**values)
    device, dtype = ("cpu", torch.float32) if rehearse else ("cuda", torch.bfloat16)
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    new = 4 if rehearse else NEW_TOKENS
    ids = torch.randint(2, config.vocab_size, (batch, 8 if rehearse else PROMPT_TOKENS), device=device)
    rates = []
    for _ in range(4):
        began = time.perf_counter()
        out = made.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        out.cpu()
        rates.append(batch * new / (time.perf_counter() - began))
    return {"new_tokens_per_s": max(rates[1:])}


def step(out: Path, name: str, command: list[str]) -> dict[str, Any]:
    """What a command ended with, by its file where an earlier call has come so far."""
    path = out / f"{name}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    print(f"check: {name}", flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_S, cwd=ROOT, check=False)
        lines = done.stdout.strip().splitlines()
        result = {"code": done.returncode, "last": lines[-1] if lines else "", "error": done.stderr[-2000:]}
    except subprocess.TimeoutExpired:
        result = {"code": None, "last": "", "error": f"took more than {STEP_S} s"}
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result | {"command": command}, indent=2) + "\n")
    temporary.replace(path)
    return result


def row(point: Point, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The figures of a run as a row of the table; a dash for what is not known."""
    record: dict[str, Any] = {}
    if ours["last"].startswith("{"):
        line = json.loads(ours["last"])
        path = Path(line.get("run_dir") or "") / "record.json"
        record = json.loads(path.read_text()) if path.is_file() else {}
    other = json.loads(theirs["last"])["new_tokens_per_s"] if theirs["last"].startswith("{") else None
    rate = record.get("new_tokens_per_s")
    device, plan = (record.get("devices") or [{}])[0], ((record.get("plan") or {}).get("devices") or [{}])[0]
    gib = [value and value / 2**30 for value in (plan.get("parameter_bytes"), device.get("parameter_bytes"))]
    shares = [(record.get(name) or {}).get("share") for name in ("mbu", "ceiling")]
    ratio = rate / other if rate and other else None
    figures = [rate, other, ratio, *shares, *gib]
    return " | ".join([f"| {point.name}", *("-" if one is None else f"{one:.3f}" for one in figures)]) + " |"


def main(argv: list[str]) -> int:
    """0 where every step went well, 1 where one did not, 2 without a card."""
    rehearse = "--rehearse" in argv
    names = [word for word in argv if not word.startswith("--")]
    if "--plain" in argv:
        print(json.dumps(plain(names[0], int(names[1]), rehearse)))
        return 0
    cards = () if rehearse else cuda_devices(os.environ)
    if not cards and not rehearse:
        print("No CUDA device can be seen. HINT: scripts/check_gpu.sh --rehearse", file=sys.stderr)
        return 2
    out = Path(names[0] if names else "check_gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = []
    if not rehearse:
        results.append(step(out, "doctor", [sys.executable, "-m", "launcher.doctor", "--json"]))
        results.append(step(out, "probe", [sys.executable, "-m", "launcher.probe"]))
        results.append(step(out, "tests", [sys.executable, "-m", "pytest", "-q", "tests/engines/test_gpu.py"]))
    head = "| run | tokens/s | plain generate | ratio | MBU | of the ceiling | weights planned, GiB | measured, GiB |"
    table = [head, "| --- |" + " ---: |" * 7]
    for point in points(rehearse, len(cards), (cards[0].capacity_bytes or 0) if cards else 0):
        mode = ["--rehearse"] if rehearse else []
        beside = [sys.executable, __file__, "--plain", *mode, point.model, str(point.batch)]
        ours = step(out, point.name, words(point, rehearse, out))
        theirs = step(out, f"{point.model}_plain_b{point.batch}", beside)
        results += [ours, theirs]
        table.append(row(point, ours, theirs))
        (out / "table.md").write_text("\n".join(table) + "\n")
    print(out / "table.md")
    return 0 if all(result["code"] == 0 for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
