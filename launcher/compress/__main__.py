"""`python -m launcher.compress model=tiny_llama method=magnitude ratio=0.5 out=smaller`: a smaller checkpoint.

    model=NAME     a preset of conf/model, a folder with a checkpoint, or a hub id
    method=        magnitude   the smallest values become zeros; pattern=unstructured, or 2:4
                   structured  inner MLP columns, and heads of a Llama, are cut out; config.json says the new shapes
                   llm_pruner  the same, by gradients of the loss of prompts= (LLM-Pruner's first-order estimate)
                   rtn         rounds to the nearest; scheme=w4a16 (four bits in groups) or w8a8 (a byte, rows)
                   wanda sparsegpt gptq awq   llm-compressor's, calibrated with prompts=
    ratio=0.5      of the values, or of columns and heads, that go
    prompts=FILE   to calibrate with, one prompt a line
    python=PATH    the interpreter of an environment with llmcompressor and transformers
    out=DIR        a new folder; it is there when it is whole, and not before

First it says what it will read, hold and write. Zeros are no faster: engines multiply them like other values.
Structured pruning is, since its matrices are smaller, and so are quantized weights where memory is the limit. What it
costs is shown by runs of both with measure.quality=builtin. Embeddings, norms and the head stay as they are.
"""

from __future__ import annotations

from launcher.system.interrupts import end_quietly_when_interrupted

if __name__ == "__main__":  # first, because the imports below take seconds
    end_quietly_when_interrupted()

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.composition.compose import compose_run
from launcher.compress.request import CALIBRATED, check_shapes, matrices, planned, read_request
from launcher.config.engines import example_with
from launcher.config.schema import ConfigError
from launcher.prepare.prepare import model_folder
from launcher.prepare.shapes import built_of, config_of
from launcher.system.terminal import Parser, run_command
from shards.checkpoint.checkpoint import Checkpoint
from shards.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launcher.compress.request import Request

PROGRAM = Path(__file__).with_name("calibrated.py")
COPIED = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "chat_template*", "*.model")


def main(argv: Sequence[str]) -> int:
    """Make the checkpoint; returns 0, or 2 with one line on stderr for a mistake in the arguments or the model."""
    parser = Parser(prog="python -m launcher.compress", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as above, in any order")
    try:
        arguments, unknown = parser.parse_known_intermixed_args(argv)
        request = read_request([*unknown, *arguments.words])
        folder = Path(request.model)
        if not folder.is_dir():
            choice = f"model={request.model}"
            if "/" in request.model:
                choice = f"model.path={request.model}"
            folder = model_folder(compose_run([choice, example_with("is_reference")])) or folder
        compress(request, folder)
    except UserError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    return 0


def compress(request: Request, folder: Path) -> None:
    """Print the plan for the checkpoint in a folder and compress it; the output gets its final name when it is
    complete."""
    config = config_of(folder)
    if config.get("quantization_config"):
        raise ConfigError("The checkpoint is quantized already.", "model= with the unquantized one")
    checkpoint = Checkpoint.open(folder)
    if checkpoint.legacy:
        raise ConfigError(f"{folder} has no .safetensors.", "save it again with transformers (save_pretrained)")
    chosen = matrices(built_of(config).shape, dict(checkpoint.tensors))
    check_shapes(request, chosen)
    for line in planned(request, chosen, dict(checkpoint.tensors)):
        print(line, flush=True)
    out = request.out.resolve()
    partial = out.with_name(f".{out.name}.partial.{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        if request.method in CALIBRATED:
            assert request.python is not None
            command = [request.python, str(PROGRAM), str(folder), str(partial), request.method]
            command += [str(request.ratio), request.pattern, request.scheme, str(request.prompts)]
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            try:
                ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            except OSError as error:
                fact = f"python={request.python} cannot be run: {error.strerror}."
                raise ConfigError(fact, "python=INTERPRETER") from error
            if ended.returncode:
                last = (ended.stderr.strip().splitlines() or ["no word"])[-1]
                raise ConfigError(f"llm-compressor ended with {last}", f"{request.python} -m pip install llmcompressor")
        else:
            from launcher.compress.streamed import write_compressed  # noqa: PLC0415

            print(write_compressed(request, checkpoint, chosen, dict(config), partial))
        for pattern in COPIED:
            for path in folder.glob(pattern):
                shutil.copy(path, partial / path.name)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"made {out}")
    print(f"try: python -m launcher model.path={out} {example_with('is_reference')} devices=1 measure.quality=builtin")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
