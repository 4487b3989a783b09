#!/usr/bin/env bash
# Checks this machine's GPUs, and runs the engines on them, with random weights in the shapes of real models, compared
# with transformers' plain generate:
#
#     scripts/check_gpu.sh [OUT] [--within SECONDS] [--rehearse]
#
# OUT (default check_gpu) gets a file for each step, the run directories, and table.md. A call ends before SECONDS
# (default 570; 0: no limit) are over, with exit code 3 if steps are left: the next call continues with those, and
# retries failed ones. --rehearse: the same steps on a CPU, with tiny models.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$root/scripts/gpu/check_gpu.py" "$@"
