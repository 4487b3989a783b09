#!/usr/bin/env bash
# Checks this machine's cards, and runs the engines on them with random weights of true shapes, beside plain generate:
#
#     scripts/check_gpu.sh [OUT] [--within SECONDS] [--rehearse]
#
# OUT (check_gpu) is given a file for each step, the run directories, and table.md. A call ends by itself before the
# seconds (570; 0: no limit) are over, with exit code 3 where steps are left: the next call goes on with those, and once
# more with what has failed. --rehearse: the same steps on a CPU, with tiny models.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$root/scripts/gpu/check_gpu.py" "$@"
