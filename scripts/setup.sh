#!/usr/bin/env bash
# Installs the committed lock into .venv; does nothing if it is installed already. All messages go to stderr.
# LAUNCHER_FLAVOR=cpu|cuda chooses the lock; by default it is cuda if nvidia-smi lists a GPU, else cpu.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
unfinished=$venv/.unfinished # exists while an installation is in progress
stamp=$venv/.stamp           # written last: `base` and `wanted` of the finished environment
installed=$venv/.lock        # copy of the installed lock
beside=$root/scripts/lock/beside.txt

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
    printf 'setup: %s\nHINT: %s\n' "$1" "$2" >&2
    exit 1
}

find_flavor() {
    local gpus
    case ${LAUNCHER_FLAVOR:-} in
        cpu | cuda) echo "$LAUNCHER_FLAVOR" ;;
        '')
            gpus=$(timeout 30 nvidia-smi -L 2>/dev/null) || gpus=
            if [[ $'\n'$gpus == *$'\n'"GPU "[0-9]* ]]; then echo cuda; else echo cpu; fi
            ;;
        *) fail "LAUNCHER_FLAVOR=$LAUNCHER_FLAVOR is no flavour" "cpu, cuda, or leave it unset" ;;
    esac
}

find_python() {
    local name path
    for name in python3.11 python3.12 python3.13 python3; do
        path=$(command -v "$name") || continue
        if "$path" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$path"
            return
        fi
    done
    fail "no Python 3.11 or newer that has venv and ensurepip" "apt-get install python3.11 python3.11-venv python3.11-dev"
}

# The CUDA packages are several gigabytes, and useless with a driver that is too old. LAUNCHER_FLAVOR=cuda installs them
# anyway.
check_driver() {
    local cuda least driver
    [[ $flavor == cuda ]] || return 0
    cuda=$(sed -n 's/^nvidia-cuda-runtime==\([0-9]*\).*/\1/p' "$lock")
    least=$(case $cuda in 12) echo 525 ;; 13) echo 580 ;; *) echo 0 ;; esac)
    driver=$(timeout 30 nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || driver=
    [[ ${driver%%.*} =~ ^[0-9]+$ && ${driver%%.*} -lt $least ]] || return 0
    local fact="driver $driver is too old for CUDA $cuda, which needs $least or newer"
    [[ -z ${LAUNCHER_FLAVOR:-} ]] || { say "$fact" && return; }
    fail "$fact" "a newer driver (apt-get install nvidia-driver-$least-server), or LAUNCHER_FLAVOR=cpu bash scripts/setup.sh"
}

# Only warns: this script compiles nothing for CUDA, but vLLM does at run time.
check_compiler() {
    local missing=() headers
    [[ $flavor == cuda ]] || return 0
    command -v gcc >/dev/null || command -v clang >/dev/null || missing+=(gcc)
    headers=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [[ -f $headers/Python.h ]] || missing+=("${headers##*/}-dev")
    [[ ${#missing[@]} == 0 ]] || say "backend=vllm compiles on CUDA, and will lack: apt-get install ${missing[*]}"
}

# The stamp has two lines: if `base` changes, the environment is made anew; if `wanted` changes, it is updated.
base() { echo "$("$venv/bin/python" -V 2>&1) $flavor $root"; }
wanted() { cat "$lock" "$beside" "$root/pyproject.toml" "${BASH_SOURCE[0]}" | sha256sum; }
is_ready() { [[ -f $stamp && ! -e $unfinished && $(<"$stamp") == "$(base)"$'\n'"$(wanted)" ]]; }

# Removes an environment that cannot be updated; fails if it was not made by this script.
clear_environment() {
    [[ -e $venv/pyvenv.cfg || -e $unfinished ]] || return 0
    if [[ -e $unfinished ]]; then
        say "the last installation did not finish: starting again"
    elif [[ ! -f $stamp ]]; then
        fail "$venv was not made by this script" "move it away, or use it: .venv/bin/python -m launcher"
    elif [[ $(head -n 1 "$stamp") == "$(base)" ]]; then
        return 0
    else
        say "another interpreter, flavour or folder than last time: starting again"
    fi
    rm -rf "$venv"
}

make_environment() {
    local python
    python=$(find_python)
    mkdir -p "$venv"
    : >"$unfinished"
    "$python" -m venv "$venv" >&2
}

run_pip() {
    local log=$venv/pip.log
    if ! "$venv/bin/python" -m pip --quiet --no-input --disable-pip-version-check "$@" >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        fail "pip $1 failed" "the lines above say why; the next call starts again"
    fi
}

# One package name per line, normalized as pip compares names.
names_in() { sed -E 's/[=; ].*//; s/[-_.]+/-/g' "$1" | tr '[:upper:]' '[:lower:]' | sort; }

remove_dropped() {
    local dropped
    [[ -f $installed ]] || return 0
    mapfile -t dropped < <(comm -23 <(names_in "$installed") <(names_in "$lock"))
    [[ ${#dropped[@]} == 0 ]] || run_pip uninstall --yes "${dropped[@]}"
}

# Compiling on all cores takes half the time of pip's own compiling. Files in the syntax of other Python versions do not
# compile; this is not an error.
compile_all() { "$venv/bin/python" -m compileall -qq -j 0 "$venv/lib" >/dev/null 2>&1 </dev/null || true; }

# torch is installed first and by name, so that pip can choose a CPU build if it is configured for one. setuptools,
# wheel and hatchling build the source distributions. All other packages are in the lock: pip has nothing to resolve.
install_all() {
    say "installing $(wc -l <"$lock") packages ($flavor) into .venv ..."
    remove_dropped
    run_pip install --no-compile --constraint "$lock" setuptools wheel hatchling torch
    # DeepSpeed's setup looks for nvcc if it sees a GPU, even with DS_BUILD_OPS=0.
    DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1 run_pip install --no-compile --no-deps --no-build-isolation --requirement "$lock"
    run_pip install --no-deps --no-build-isolation --editable "$root"
    # For tests only, which add this folder to their path: transformers imports torchao wherever it is installed.
    run_pip install --no-compile --no-deps --upgrade --target "$venv/beside" "$(<"$beside")"
    compile_all
}

set_up() {
    check_driver
    clear_environment
    [[ -e $venv/bin/python ]] || make_environment
    check_compiler
    : >"$unfinished"
    rm -f "$stamp"
    install_all
    cp "$lock" "$installed"
    { base && wanted; } >"$stamp"
    rm "$unfinished"
    say "ready after $SECONDS s"
}

flavor=$(find_flavor)
lock=$root/scripts/lock/$flavor.txt
is_ready && exit

exec 9>"$root/.venv.lock"
flock --nonblock 9 || { say "waiting for another installation" && flock 9; }
is_ready || set_up
