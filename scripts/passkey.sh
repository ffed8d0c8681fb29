#!/usr/bin/env bash
# Passkey retrieval: trains a model to find a five-digit key in filler, then asks at many lengths and depths.
#
#   scripts/passkey.sh RECIPE OUT START [options of train_samba, which win over the recipe's]
#
#   START    a checkpoint or a run's folder to fine-tune, or a --model to train from nothing (a name or a .json file)
#   RECIPE   paper   500 steps of 2,048 documents of 4,096 tokens, AdamW with weight decay 0.1, 250 steps up to 1e-4 (the paper
#                    does not say what follows; here cosine). 65,536 documents, each seen about 16 times
#            gpu     for a small model from nothing (--model retrieval) on one GPU in two minutes: documents of 80 to 256
#                    tokens until it copies the key, then of 80 to 4,096, then of 4,096
#            cpu     a few steps of the same, to see that everything works
#
# Writes OUT/passkey.json (every answer) and OUT/passkey.png (accuracy by length and depth). Documents and prompts are made
# when they are needed and removed afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
task=passkey
. scripts/retrieval.sh

case $recipe in
paper)
    train tuned "--documents 65536 --length 4096" --seq-len 4096 --micro-batch 8 --global-batch 8388608 --steps 500 --lr 1e-4 --warmup-steps 250 \
        --weight-decay 0.1 --checkpoint-every 50 "$@"
    ask "--lengths 4k,8k,16k,32k,64k,128k,256k --depths 11 --keys 5" --micro-batch 11
    ;;
gpu)
    common=(--seq-len 4096 --micro-batch 16 --warmup-steps 40 --decay matrices --log-every 50)
    train short "--documents 8000 --length 4096 --min-length 80 --max-length 256" "${common[@]}" --steps 500 --lr 2e-3 --schedule constant "$@"
    train mixed "--documents 24000 --length 4096 --min-length 80" "${common[@]}" --steps 1500 --lr 1e-3 --schedule constant "$@"
    train whole "--documents 16000 --length 4096" "${common[@]}" --steps 1000 --lr 1e-3 --schedule linear "$@"
    ask "--lengths 4k,8k,16k,32k,64k,128k,256k --depths 11 --keys 5" --micro-batch 55
    ;;
cpu)
    train short "--documents 64 --length 128 --min-length 80" --seq-len 128 --micro-batch 8 --steps 8 --lr 2e-3 --warmup-steps 2 --decay matrices "$@"
    ask "--lengths 128,256,512 --depths 3 --keys 2" --micro-batch 6
    ;;
esac
