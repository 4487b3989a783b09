"""First check of a machine with GPUs: doctor, probe, tests, and runs of each engine compared with plain generate.

`check_gpu.py [OUT] [--within SECONDS] [--rehearse]`, called by scripts/check_gpu.sh, which explains the arguments. Each
step is a separate process that writes OUT/STEP.json and OUT/STEP.log. To add a check, add a `Step` in `steps`.
Exit code 0: every step succeeded or was refused; 1: a step failed after all tries; 2: no GPU; 3: steps are left, call
again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

try:
    from check_gpu_table import Point, write_table

    from shards.machine.cards import cuda_devices
    from shards.machine.orphans import before_exec
except ModuleNotFoundError as error:
    print(f"{error} for {sys.executable}. HINT: {sys.executable} -m launcher.doctor", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[2]
PAIR = Path(__file__).with_name("check_gpu_pair.py")
WITHIN_S = 570.0  # for environments that limit a call to ten minutes
TRIES = 3
REFUSED, AGAIN = 2, 3
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 128, 3
BATCHES = (1, 8, 32)
MODELS = ("falcon_7b", "falcon_40b", "llama_30b", "llama_7b")
VLLM_CACHE = 8 << 30  # KV cache in bytes; vLLM's default would leave no memory for the plain model


@dataclass(frozen=True, slots=True)
class Step:
    """A command, which is ended after `limit_s` and not started if a call has less than `needs_s` left.

    With a `point` it is a run of the launcher, whose figures go into the table.
    """

    name: str
    command: tuple[str, ...]
    needs_s: float = 30
    limit_s: float = 560
    words: int = 1  # lines to keep from the end of its log
    point: Point | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a step: open | ok | refused | failed | cut off; the last two are final after TRIES tries."""

    state: str
    tries: int = 0
    seconds: float = 0.0
    code: int | None = None
    last: str = ""

    @property
    def is_final(self) -> bool:
        return self.state in ("ok", "refused") or (self.state in ("failed", "cut off") and self.tries >= TRIES)


def steps(out: Path, rehearse: bool, cards: int) -> list[Step]:
    """All steps for a machine with `cards` GPUs, in order."""
    doctor, accelerator = ("-m", "launcher.doctor", "--json"), "cuda"
    if rehearse:
        doctor, accelerator = (*doctor, "--timeout", "5"), "cpu"
    tests = ("-m", "pytest", "-q", "-o", "addopts=-ra", "-p", "no:cacheprovider")
    tests = (*tests, "tests/engines/test_gpu.py", "tests/engines/test_gpu_quantized.py")
    todo = [Step("doctor", (sys.executable, *doctor), needs_s=60)]
    for count in (1, 2)[: max(cards, 1)]:  # GPUs share links, so a run needs the rates measured on as many as it uses
        probe = (sys.executable, "-m", "launcher.probe", f"accelerator={accelerator}", f"devices={count}")
        todo.append(Step(f"probe_x{count}", probe, 60, words=4))
    if importlib.util.find_spec("pytest"):
        todo.append(Step("tests", (sys.executable, *tests), needs_s=300))
    return [*todo, *(_run(point, out, rehearse) for point in points(rehearse, cards))]


def points(rehearse: bool, cards: int) -> list[Point]:
    """The runs, the most informative first. The planner refuses those that do not fit in memory."""
    if rehearse:
        return [Point("transformers", "tiny_falcon", 1), Point("fsdp", "tiny_llama", 2, devices=2)]
    vllm = tuple(name for name in ("vllm",) if importlib.util.find_spec(name))
    ways = [Point("transformers", model, 1, compile=way) for way in ("cudagraph", "none") for model in MODELS[1:3]]
    alone = [Point(engine, model, batch) for batch in BATCHES for model in MODELS for engine in ("transformers", *vllm)]
    alone = ways + alone + [Point("transformers", model, 1, compile="inductor") for model in MODELS[1:3]]
    packed = [("transformers", name) for name in ("int8_wo", "int4_wo", "nf4")] + [(name, "fp8") for name in vllm]
    alone += [Point(engine, "llama_7b", 8, quantization=name) for engine, name in packed]
    together = [Point("tensor_parallel", model, 1, devices=2, compile="cudagraph") for model in MODELS] + [
        Point(engine, model, batch, devices=2)
        for batch in (1, 8)
        for model in MODELS
        for engine in ("tensor_parallel", "fsdp", *vllm)
    ]
    alone.append(Point("fsdp", "falcon_7b", 8))
    if cards > 1:
        return alone + together
    return alone


def _run(point: Point, out: Path, rehearse: bool) -> Step:
    """The step of a point."""
    device, lengths, needs_s = ("accelerator=cuda", "precision=bf16"), (PROMPT_TOKENS, NEW_TOKENS), 150
    if rehearse:
        device, lengths, needs_s = ("accelerator=cpu", "precision=fp32"), (8, 4), 10
    overrides = [
        f"backend={point.engine}", f"model={point.model}", "model.weights=random", *device, f"devices={point.devices}",
        "prompts=synthetic", f"prompts.count={point.batch}", f"prompts.input_tokens={lengths[0]}",
        f"prompts.output_tokens={lengths[1]}", f"measure.repeats={REPEATS}",
        f"output_dir={out / 'runs'}",
    ]  # fmt: skip
    if point.compile:
        overrides.append(f"measure.compile={point.compile}")
    if point.quantization:
        overrides.append(f"quantization={point.quantization}")
    if point.engine != "vllm":
        overrides.append(f"measure.batch_size={point.batch}")
    else:
        overrides.append(f"backend.kv_cache_memory_bytes={VLLM_CACHE}")
    command = [sys.executable, str(PAIR), *overrides]
    if point.devices > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.devices}"]
    return Step(point.name, tuple(command), needs_s=needs_s, point=point)


def read(out: Path, step: Step) -> Result:
    """The outcome of a step in earlier calls."""
    try:
        values = json.loads((out / f"{step.name}.json").read_text())
    except FileNotFoundError:
        return Result("open")
    return Result(**values["result"])


def write(out: Path, step: Step, result: Result) -> None:
    path = out / f"{step.name}.json"
    values = {"command": step.command, "result": asdict(result)}
    path.with_suffix(".part").write_text(json.dumps(values, indent=2) + "\n")
    path.with_suffix(".part").replace(path)


def make(out: Path, step: Step, before: Result, limit_s: float, environ: dict[str, str]) -> Result:
    """Try a step once more. It is recorded as cut off until it ends, since this process may be killed meanwhile."""
    print(f"check: {step.name}", flush=True)
    began, result = time.monotonic(), replace(before, state="cut off", tries=before.tries + 1, last="")
    write(out, step, result)
    log = out / f"{step.name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=before_exec(signal.SIGTERM),  # noqa: PLW1509 - two system calls
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    state = {None: "cut off", 0: "ok"}.get(code, "failed")
    if code == REFUSED and step.point:
        state = "refused"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""]
    seconds = time.monotonic() - began
    last = f"did not end within {limit_s:.0f} s"
    if code is not None:
        last = "; ".join(lines[-step.words :])
    result = replace(result, state=state, code=code, seconds=seconds, last=last)
    write(out, step, result)
    return result


def end(process: subprocess.Popen[bytes]) -> None:
    """End a step and its child processes: first by SIGTERM, so that ranks can write their last messages, then by
    SIGKILL."""
    for number, patience_s in ((signal.SIGTERM, 8), (signal.SIGKILL, None)):
        if process.poll() is not None and number == signal.SIGTERM:
            continue
        try:
            os.killpg(process.pid, number)
            process.wait(patience_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def check(out: Path, todo: list[Step], within_s: float, rehearse: bool) -> int:
    """Run the remaining steps while there is time; returns the exit code."""
    deadline = time.monotonic() + (within_s or float("inf"))
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if rehearse:  # do not overwrite the measured rates in this machine's cache
        environ |= {"XDG_CACHE_HOME": str(out / "cache"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    results = {step: read(out, step) for step in todo}
    left = [step for step in todo if not results[step].is_final]
    for number, step in enumerate(left):
        seconds = deadline - time.monotonic()
        if number and seconds < step.needs_s:
            break
        results[step] = make(out, step, results[step], min(step.limit_s, seconds), environ)
        write_table(out, [(one.name, one.point, asdict(results[one])) for one in todo])
    write_table(out, [(one.name, one.point, asdict(results[one])) for one in todo])
    print(out / "table.md")
    open_steps = [step.name for step in todo if not results[step].is_final]
    if open_steps:
        print(f"{len(open_steps)} steps are left: {', '.join(open_steps)}. HINT: the same command", file=sys.stderr)
        return AGAIN
    if any(result.state not in ("ok", "refused") for result in results.values()):
        return 1
    return 0


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="Check this machine's cards, and run the engines on them.")
    parser.add_argument("out", nargs="?", default="check_gpu", type=Path)
    parser.add_argument("--within", type=float, default=WITHIN_S, metavar="SECONDS", help="end before (0: no limit)")
    parser.add_argument("--rehearse", action="store_true", help="the same steps on a CPU, with tiny models")
    arguments = parser.parse_args()
    num_cards = 0
    if not arguments.rehearse:
        num_cards = len(cuda_devices(os.environ))
        if not num_cards:
            print("No CUDA device can be seen. HINT: scripts/check_gpu.sh --rehearse", file=sys.stderr)
            return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    return check(out, steps(out, arguments.rehearse, num_cards), arguments.within, arguments.rehearse)


if __name__ == "__main__":
    sys.exit(main())
