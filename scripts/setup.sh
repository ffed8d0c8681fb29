#!/usr/bin/env bash
# Installs what this machine lacks to build, test and feed samba.cu, and says for each thing what it is and why.
#
#   scripts/setup.sh            install what is missing (asks sudo if needed); a second run finds nothing to do
#   scripts/setup.sh --check    only report; exit status 0 = all there, 1 = something is missing
#
# Debian and Ubuntu packages come from apt, the Python packages of scripts/requirements.txt go into .venv in the
# repository. CUDA is not installed: the CPU build needs none, and for the GPU build the script says what to get.
set -euo pipefail
export LC_ALL=C

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
requirements=$root/scripts/requirements.txt
venv=$root/.venv
stamp=$venv/.requirements.sha256
lists_max_age_days=7

# package | how to see it where there is no dpkg (c: a command, h: a C++ header) | why
packages='
g++                  | c:g++                        | compiles the CPU build and the host side of the GPU build
make                 | c:make                       | runs every task: make, make train, make test
libopenblas-dev      | h:cblas.h                    | matrix multiplication of the CPU build
libcli11-dev         | h:CLI/CLI.hpp                | command line options
nlohmann-json3-dev   | h:nlohmann/json.hpp          | log, configuration and checkpoint headers
libsentencepiece-dev | h:sentencepiece_processor.h  | tokenizer of generate and score
libgtest-dev         | h:gtest/gtest.h              | tests
libopenmpi-dev       | c:mpicxx                     | several processes: launch, bootstrap, CPU collectives
openmpi-bin          | c:mpirun                     | mpirun
python3-venv         | c:python3                    | Python environment for data preparation and plots
'

usage() { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
say()   { printf '%s\n' "$*"; }
die()   { printf 'setup.sh: %s\n' "$*" >&2; exit 1; }
row()   { printf '  %s %-21s %s\n' "$1" "$2" "$3"; }

check_only=false
for argument in "$@"; do
    case $argument in
        --check)   check_only=true ;;
        -h|--help) usage; exit 0 ;;
        *)         die "unknown option '$argument'; use --check, --help or nothing" ;;
    esac
done

# ---------------------------------------------------------------------------------------------------- what is missing

has_apt() { command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; }

venv_works() { command -v python3 >/dev/null && python3 -c 'import ensurepip, venv' 2>/dev/null; }

has_header() {
    command -v g++ >/dev/null &&
        printf '#if !__has_include(<%s>)\n#error missing\n#endif\n' "$1" | g++ -E -x c++ - >/dev/null 2>&1
}

probe() {   # $1 = c:COMMAND or h:HEADER
    case $1 in
        c:*) command -v "${1#c:}" >/dev/null ;;
        h:*) has_header "${1#h:}" ;;
    esac
}

# One dpkg-query for all of them, then one line per package: ✓ there, ✗ missing.
find_missing() {
    missing=()
    local installed='' name how why
    if has_apt; then
        # shellcheck disable=SC2046  # the names are meant to be separate words
        installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' \
            $(printf '%s\n' "$packages" | cut -d'|' -f1) 2>/dev/null | sed -n 's/ installed$//p') || true
    fi
    while IFS='|' read -r name how why; do
        read -r name <<<"$name"; read -r how <<<"$how"; read -r why <<<"$why"
        [[ -n $name ]] || continue
        if [[ $name == python3-venv ]] && venv_works; then row ✓ "$name" "$why"
        elif has_apt && grep -qxF -- "$name" <<<"$installed"; then row ✓ "$name" "$why"
        elif ! has_apt && [[ $name != python3-venv ]] && probe "$how"; then row ✓ "$name" "$why"
        else row ✗ "$name" "$why"; missing+=("$name"); fi
    done <<<"$packages"
}

# The environment is whole when this very path was stamped with these very requirements and its Python still runs.
wanted_stamp() { printf '%s %s\n' "$(sha256sum <"$requirements" | cut -c1-64)" "$venv"; }
venv_ready()   { [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$(wanted_stamp)" ]]; }

requirement_names() { sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$requirements" | tr '\n' ' '; }

has_nvidia_gpu() {
    [[ -e /dev/nvidia0 ]] && return
    local device
    for device in /sys/bus/pci/devices/*; do   # 0x10de = NVIDIA, class 0x03.... = display or 3D controller
        [[ -r $device/vendor && $(<"$device/vendor") == 0x10de && $(<"$device/class") == 0x03* ]] && return
    done
    return 1
}

report_cuda() {
    local nvcc
    for nvcc in "$(command -v nvcc || true)" "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" /usr/local/cuda/bin/nvcc; do
        if [[ -n $nvcc && -x $nvcc ]]; then row ✓ nvcc "GPU build ($nvcc)"; return; fi
    done
    if has_nvidia_gpu; then
        row ! nvcc "not found, but an NVIDIA GPU is there. For the GPU build install NVIDIA's CUDA toolkit 12 or newer"
        row ' ' '' "(package cuda-toolkit: nvcc, cuBLASLt, CUB) and NCCL (package libnccl-dev) and put nvcc on PATH."
        row ' ' '' "Until then make gives the CPU build."
    else
        row - nvcc "not found and no NVIDIA GPU either: make gives the CPU build, which needs no CUDA"
    fi
}

# ------------------------------------------------------------------------------------------------------------ install

lists_stale() {   # no package lists, or the newest of them is older than lists_max_age_days
    [[ -z $(find /var/lib/apt/lists -maxdepth 1 -name '*_Packages*' -mtime "-$lists_max_age_days" -print -quit 2>/dev/null) ]]
}

apt() {           # as root or through sudo
    if (( EUID == 0 )); then DEBIAN_FRONTEND=noninteractive apt-get -q "$@"
    else sudo DEBIAN_FRONTEND=noninteractive apt-get -q "$@"; fi
}

may_install() {   # root, or sudo that needs no password, or a person at a terminal who can type one
    (( EUID == 0 )) && return
    command -v sudo >/dev/null || return 1
    sudo -n true 2>/dev/null || [[ -t 0 && -t 2 ]]
}

install_packages() {
    (( ${#missing[@]} )) || return 0
    if ! has_apt; then
        die "no apt here: install these, or what your system calls them, then run this again: ${missing[*]}"
    fi
    if ! may_install; then
        say "setup.sh: may not install packages here (not root, no usable sudo). Run this one command, then this script again:" >&2
        say "sudo sh -c 'apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ${missing[*]}'" >&2
        exit 1
    fi
    say "Installing with apt: ${missing[*]}"
    if lists_stale; then say "Package lists are missing or older than $lists_max_age_days days: apt-get update"; apt update || true; fi
    apt install -y --no-install-recommends "${missing[@]}" && return
    say "apt-get install failed; refreshing the package lists and trying once more"
    apt update || true
    apt install -y --no-install-recommends "${missing[@]}" ||
        die "apt-get could not install ${missing[*]}; its messages above say why"
}

pip_install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$requirements"; }

make_venv() {
    venv_ready && return
    venv_works || die "python3 with the modules venv and ensurepip is needed for .venv; install python3-venv"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
        die "$(python3 --version) is too old for scripts/requirements.txt; put Python 3.9 or newer first on PATH"
    say "Installing into .venv: $(requirement_names)"
    rm -f "$stamp"
    # --clear starts again where .venv is of another place or another Python; an unchanged one only gets what is new.
    if ! { [[ -x $venv/bin/python ]] && "$venv/bin/python" -m pip --version 2>/dev/null | grep -qF "$venv/"; }; then
        python3 -m venv --clear "$venv" || die "python3 -m venv $venv failed; its messages above say why"
    fi
    if ! pip_install; then
        say "pip failed; trying once more"
        pip_install || die "pip could not install scripts/requirements.txt into .venv; its messages above say why"
    fi
    wanted_stamp >"$stamp"
}

# --------------------------------------------------------------------------------------------------------------- main

say "System packages"
find_missing
report_cuda
say "Python packages (.venv)"
if venv_ready; then row ✓ .venv "$(requirement_names)"; venv_missing=false
else row ✗ .venv "$(requirement_names)"; venv_missing=true; fi

if (( ${#missing[@]} == 0 )) && ! $venv_missing; then say "All there, nothing to do."; exit 0; fi
if $check_only; then say "Something is missing (✗); scripts/setup.sh installs it."; exit 1; fi
install_packages
make_venv
say "Done."
