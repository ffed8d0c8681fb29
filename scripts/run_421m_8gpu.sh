#!/usr/bin/env bash
# Samba-421M on 20 billion tokens with one machine of 8 GPUs: the reference's recipe, 9,536 steps of 2,097,152 tokens.
#
#   DATA='data/slim/train_*.bin' VAL='data/slim/val_*.bin' scripts/run_421m_8gpu.sh [options of train_samba]
#
# Cost: 30 GPU hours (3.7 hours on 8 H200) at the measured 185.8k tokens/s of one (dev/results/2026-11-27_h200_step); of many: dev/scaling.md
# Memory: 2.9 GiB of parameters and optimizer a GPU with --zero 1, and activations for what is left (--recompute auto).
#
# Starts again from the newest checkpoint when it fails. RANKS, PROGRAM, OUT: other than 8, ./train_samba, out/421m.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/421m}

exec scripts/restart.sh "$out" mpirun --allow-run-as-root --oversubscribe -np "${RANKS:-8}" "${PROGRAM:-./train_samba}" \
    --model samba-421m --preset 20b --micro-batch 8 --data "${DATA:?say where the training shards are}" ${VAL:+--val "$VAL"} --out "$out" --resume \
    --val-every 1000 --checkpoint-every 250 --keep 3 --log-every 10 "$@"
