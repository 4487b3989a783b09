#!/usr/bin/env bash
# Lint, types and the whole suite; with arguments only pytest, with these: scripts/test.sh tests/shards/test_plan.py -k fits
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

# Some tests need programs that pip does not bring: SLURM's daemons, and a browser for pages. Where they cannot be had
# these tests skip and say so.
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

# A worker more than there are cores, since tests of faults and of SLURM mostly wait. What fails beside other tests is
# tried once more, alone and without --warm: some tests wait for processes that a busy machine holds up.
run_tests() {
    local workers=$(($(nproc) + spare))
    pytest --warm -n "$((workers < 5 ? workers : 5))" --dist loadfile --no-loadscope-reorder --durations=25 "$@" && return
    echo "== once more, one at a time, what has failed"
    pytest --last-failed --last-failed-no-failures none "$@"
}

select=()
spare=1
if [[ ${1:-} == --fast ]]; then
    spare=0 # nothing waits there, and each worker takes seconds to collect
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
