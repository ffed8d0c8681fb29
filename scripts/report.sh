#!/usr/bin/env bash
# What this machine has for samba.cu, a line each, with what to do about what it lacks. `make report` sets the variables.
set -u

yes() { printf '  \033[32m✓\033[0m %-14s %s\n' "$1" "${2:-}"; }
no()  { printf '  \033[31m✗\033[0m %-14s %s\n' "$1" "$2"; }
has_header()  { echo "#include <$1>" | ${CXX:-g++} -std=c++20 ${CPPFLAGS:-} -x c++ -fsyntax-only - 2>/dev/null; }
has_library() { echo 'int main() {}' | ${CXX:-g++} -x c++ - ${LDFLAGS:-} "$1" -o /dev/null 2>/dev/null; }

if [ -n "${NVCC:-}" ]; then yes nvcc "$("$NVCC" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')"
else no nvcc "CPU build; for a GPU build install the CUDA Toolkit and put nvcc on PATH"; fi
if [ -n "${ARCH:-}" ]; then yes GPU "$GPU, sm_$ARCH"
else no GPU "none visible: GPU programs compile here but run elsewhere; make CPU=1 runs here"; fi
if has_library -lnccl || [ -e "$(dirname "${NVCC:-/none/none}")/../lib64/libnccl.so" ]; then yes NCCL
else no NCCL "needed only for several GPUs: apt-get install libnccl-dev"; fi
if command -v mpirun >/dev/null; then yes MPI "$(mpirun --version 2>/dev/null | sed -n '1s/.*) //p')"
else no MPI "needed only for several processes: make setup, or apt-get install libopenmpi-dev openmpi-bin"; fi
if has_header sentencepiece_processor.h; then yes SentencePiece
else no SentencePiece "train_samba cannot read or write text: make setup, or apt-get install libsentencepiece-dev"; fi
if has_header cblas.h; then yes OpenBLAS
else no OpenBLAS "the CPU build is slow without it: make setup, or apt-get install libopenblas-dev"; fi
if has_header nlohmann/json.hpp; then yes nlohmann-json
else no nlohmann-json "required: make setup, or apt-get install nlohmann-json3-dev"; fi
if has_header CLI/CLI.hpp; then yes CLI11
else no CLI11 "required: make setup, or apt-get install libcli11-dev"; fi
