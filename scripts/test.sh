#!/usr/bin/env bash
# Runs lint, type checks and all tests; with arguments, only pytest: scripts/test.sh tests/shards/test_plan.py -k fits
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

has_all() {
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || return 1
    done
}

# Some tests need programs that pip does not install: SLURM's daemons, and a browser for HTML pages. Without them these
# tests are skipped with a message.
add_packages() {
    local packages=()
    has_all slurmctld slurmd srun munged ip || packages+=(slurmctld slurmd slurm-client munge iproute2)
    has_all chromium chromedriver || packages+=(chromium chromium-driver)
    [[ ${#packages[@]} -gt 0 && $(id -u) == 0 ]] && command -v apt-get >/dev/null || return 0
    echo "test: installing ${packages[*]} ..." >&2
    export DEBIAN_FRONTEND=noninteractive
    {
        timeout 300 apt-get install -qq -y --no-install-recommends "${packages[@]}" ||
            { timeout 300 apt-get update -qq &&
                timeout 300 apt-get install -qq -y --no-install-recommends "${packages[@]}"; }
    } >/dev/null 2>&1 </dev/null || echo "test: ${packages[*]} could not be installed" >&2
}

failed=()
part() {
    echo "== $*"
    "$@" || failed+=("$1 $2")
}

# No more workers than cores: ranks on a CPU busy-wait for each other, and slow each other down if they outnumber the
# cores. Tests that fail here are run once more, sequentially and without --warm.
run_tests() {
    local cores
    cores=$(nproc)
    pytest --warm -n "$((cores < 5 ? cores : 5))" --dist loadfile --no-loadscope-reorder --durations=25 "$@" && return
    echo "== once more, one at a time, what has failed"
    pytest --last-failed --last-failed-no-failures none "$@"
}

select=()
if [[ ${1:-} == --fast ]]; then
    select=(-m "not slow and not slurm and not gpu")
elif [[ $# -gt 0 ]]; then
    add_packages
    exec python -m pytest "$@"
else
    add_packages
fi
part ruff check .
part ruff format --check .
part mypy --no-error-summary
part run_tests "${select[@]}"
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'test: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
