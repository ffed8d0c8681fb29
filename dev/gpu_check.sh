#!/usr/bin/env bash
# Builds both GPU variants with all cores and runs what only a GPU can show, in one go:
#   dev/gpu_check.sh [tests] [sanitize] [ops] [attention] [parallel]        default: tests ops
# Logs go to $OUT (default build/gpu_check); a short summary is printed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu_check}
mkdir -p "$out"
what=${*:-tests ops}
has() { [[ " $what " == *" $1 "* ]]; }

bf16=(build/gpu-bf16/train_samba)
fp32=()
if has tests || has sanitize; then bf16+=(build/gpu-bf16/test_samba); fp32+=(build/gpu-fp32/test_samba); fi
if has parallel; then fp32+=(build/gpu-fp32/train_samba); fi
if has ops; then bf16+=(build/gpu-bf16/bench_ops); fi
if has attention; then bf16+=(build/gpu-bf16/bench_attention); fi
started=$SECONDS
make -k -j"$(nproc)" "${bf16[@]}" >"$out/build_bf16.log" 2>&1 &
if [ ${#fp32[@]} -gt 0 ]; then make -k -j"$(nproc)" PRECISION=FP32 "${fp32[@]}" >"$out/build_fp32.log" 2>&1 & fi
wait
echo "built in $((SECONDS - started)) s"
grep -hE "error|\*\*\*" "$out"/build_*.log | head -n 20

if has tests; then
    for variant in gpu-bf16 gpu-fp32; do
        timeout 300 build/$variant/test_samba >"$out/test_$variant.log" 2>&1
        echo "== $variant: status $?"
        grep -E "^golden|FAILED|PASSED|ran\.|terminate" "$out/test_$variant.log" | head -n 40
    done
fi
if has sanitize; then
    for tool in memcheck racecheck; do
        timeout 500 compute-sanitizer --tool $tool --error-exitcode 1 \
            build/gpu-bf16/test_samba --gtest_filter='*Gpu*' --gtest_brief=1 >"$out/$tool.log" 2>&1
        echo "== $tool: status $?"
        tail -n 3 "$out/$tool.log"
    done
fi
if has ops; then timeout 200 build/gpu-bf16/bench_ops 2>&1 | tee "$out/bench_ops.log"; fi
if has attention; then timeout 200 build/gpu-bf16/bench_attention 2>&1 | tee "$out/bench_attention.log"; fi
if has parallel; then PROGRAM=build/gpu-fp32/train_samba dev/parallel_check.sh 2>&1 | tee "$out/parallel.log"; fi
