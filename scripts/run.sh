#!/usr/bin/env bash
# Sets up .venv if needed, then runs the launcher with the given overrides: scripts/run.sh backend=fsdp devices=2
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/scripts/setup.sh"
export PATH="$root/.venv/bin:$PATH"
exec "$root/.venv/bin/python" -m launcher "$@"
