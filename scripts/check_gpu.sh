#!/usr/bin/env bash
# Checks this machine's cards, and runs the engines on them with random weights of true shapes: scripts/check_gpu.sh [OUT]
# Every step leaves a file in OUT, and a later call goes on behind it. --rehearse: the same list on a CPU with tiny models.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$root/scripts/check_gpu.py" "$@"
