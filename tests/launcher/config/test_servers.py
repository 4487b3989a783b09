"""The command lines of `server=`, as text, since most of these servers cannot be started on every machine."""

from __future__ import annotations

import shlex
import sys

import pytest

from launcher.backends.endpoint.engine import EndpointConfig
from launcher.composition.compose import compose_run
from launcher.composition.presets import options

CPU = "OMP_NUM_THREADS=1"
VLLM_CPU = f"VLLM_CPU_OMP_THREADS_BIND=nobind TORCH_COMPILE_DISABLE=1 {CPU}"
COMMANDS = {
    "vllm": (
        "SPT_NOENV=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1",
        "python -m vllm.entrypoints.openai.api_server --model '/m/a model' --served-model-name llama --host 127.0.0.1 "
        "--port 8000 --dtype bfloat16 --seed 7 --tensor-parallel-size 2",
        VLLM_CPU,
        "--enforce-eager --kv-cache-memory-bytes 268435456",
    ),
    "transformers": (
        "HF_HUB_OFFLINE=1",
        "python -m transformers.cli.transformers serve '/m/a model' --host 127.0.0.1 --port 8000 --dtype bfloat16 "
        "--device DEVICE",
        CPU,
        "",
    ),
    "sglang": (
        "",
        "python -m sglang.launch_server --model-path '/m/a model' --served-model-name llama --host 127.0.0.1 "
        "--port 8000 --dtype bfloat16 --tp-size 2 --random-seed 7 --enable-metrics",
        "",
        "--device cpu",
    ),
    "tgi_docker": (
        "",
        "docker run --rm --name MARK --gpus all --shm-size 1g --publish 127.0.0.1:8000:80 "
        "--volume '/m/a model:/model:ro' ghcr.io/huggingface/text-generation-inference:3.3.7 --model-id /model "
        "--num-shard 2 --dtype bfloat16",
        "",
        "",
    ),
    "mii": (
        "",
        "python -m mii.entrypoints.openai_api_server --model '/m/a model' --host 127.0.0.1 --port 8000 "
        "--tensor-parallel 2",
        "",
        "",
    ),
    "openllm": ("", "openllm serve llama --port 8000", "", ""),
    "litserve": ("", "python app.py", CPU, ""),
}
"""Environment and command of each server, and the additions to both on a CPU."""


def command(name: str, on_cuda: bool, *overrides: str) -> tuple[str, tuple[str, ...]]:
    """A server's command line, and the words of the command that ends it."""
    model = ("model.name=llama", "model.path=/m/a model", "devices=2", "precision=bf16", "seed=7")
    config = compose_run(["backend=endpoint", f"server={name}", *model, *overrides])
    assert isinstance(config.backend, EndpointConfig)
    made = config.backend.command(config, "8000", "MARK", on_cuda)
    return str(made).replace(sys.executable, "python"), made.after


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_of_a_server(name: str) -> None:
    own = ["server.command=python app.py"] if name == "litserve" else []
    environment, words, cpu_environment, cpu_words = COMMANDS[name]
    after = ("docker", "rm", "--force", "MARK") if name == "tgi_docker" else ()
    for on_cuda, device in ((True, "cuda"), (False, "cpu")):
        parts = [environment, words] if on_cuda else [environment, cpu_environment, words, cpu_words]
        text = " ".join(part for part in parts if part).replace("DEVICE", device)
        assert command(name, on_cuda, *own) == (text, after)


@pytest.mark.parametrize(("on_cuda", "device"), [(True, "cuda"), (False, "cpu")])
def test_the_program_that_starts_ray(on_cuda: bool, device: str) -> None:
    text, after = command("ray", on_cuda)
    words = [word for word in shlex.split(text) if "=" not in word or " " in word]
    python, option, program, *values = words
    assert (python, option, after) == ("python", "-c", ())
    assert values == ["/m/a model", "llama", "8000", "bfloat16", "2", device]
    compile(program, "ray", "exec")


def test_every_server_has_a_command_here() -> None:
    assert {*COMMANDS, "ray", "none"} == set(options("server"))


def test_further_arguments_and_another_interpreter() -> None:
    text, _ = command("vllm", True, "server.arguments=[--max-num-seqs,'64']", "server.python=/other/bin/python")
    assert text.endswith("--tensor-parallel-size 2 --max-num-seqs 64")
    assert " /other/bin/python -m vllm" in text
