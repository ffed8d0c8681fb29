#!/usr/bin/env bash
# Samba-1.3B on 100 billion tokens with 8 machines of 8 GPUs: the reference's recipe, 47,683 steps of 2,097,152 tokens.
#
#   HOSTS=hosts DATA='data/slim/train_*.bin' VAL='data/slim/val_*.bin' scripts/run_1.3b_64gpu.sh [options of train_samba]
#
# HOSTS is MPI's host file, a line "node1 slots=8" for each machine. This directory, the data and OUT are in a file system that
# all machines share. mpirun reaches the others by ssh; without that see scripts/slurm.sbatch, which needs no MPI.
#
# Cost: 447 GPU hours (7.0 hours on 64 H200) at the measured 62.1k tokens/s of one (dev/results/2026-11-27_h200_step); of many: dev/scaling.md
# Memory: 7.7 GiB of parameters and optimizer a GPU with --zero 1, and activations for what is left (--recompute auto).
#
# Starts again from the newest checkpoint when it fails. RANKS, PROGRAM, OUT: other than 64, ./train_samba, out/1.3b.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/1.3b}
: "${HOSTS:?say which machines: HOSTS=hosts, a host file of MPI}"

exec scripts/restart.sh "$out" mpirun --allow-run-as-root --hostfile "$HOSTS" -np "${RANKS:-64}" ${MPI_OPTIONS:-} "${PROGRAM:-$PWD/train_samba}" \
    --model samba-1.3b --preset 100b --micro-batch 8 --data "${DATA:?say where the training shards are}" ${VAL:+--val "$VAL"} --out "$out" --resume \
    --val-every 1000 --checkpoint-every 500 --keep 3 --log-every 10 "$@"
