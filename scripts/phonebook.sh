#!/usr/bin/env bash
# Phone-book retrieval: trains a model to answer with the number that stands beside a name, then asks in books of many sizes.
#
#   scripts/phonebook.sh RECIPE OUT START [options of train_samba, which win over the recipe's]
#
#   START    a checkpoint or a run's folder to fine-tune, or a --model to train from nothing (a name or a .json file)
#   RECIPE   paper   100 steps of documents of 4,096 tokens (the rest of the recipe is not published: as passkey.sh's, with 10
#                    steps up to 1e-4); books of 20 to 480 entries
#            gpu     half a minute on one GPU for the small model that scripts/passkey.sh gpu left in OUT/whole, which can copy
#                    digits already: books of 136 to 256 tokens, then of 136 to 4,096
#            cpu     a few steps of the same, to see that everything works
#
# Writes OUT/phonebook.json (every answer) and OUT/phonebook.png (accuracy by entries).
set -euo pipefail
cd "$(dirname "$0")/.."
task=phonebook
. scripts/retrieval.sh

case $recipe in
paper)
    train tuned "--documents 65536 --length 4096" --seq-len 4096 --micro-batch 8 --global-batch 8388608 --steps 100 --lr 1e-4 --warmup-steps 10 \
        --weight-decay 0.1 --checkpoint-every 50 "$@"
    ask "--entries 20,60,100,140,180,220,260,300,340,380,420,460,480 --books 20" --micro-batch 20
    ;;
gpu)
    common=(--seq-len 4096 --micro-batch 16 --warmup-steps 40 --decay matrices --log-every 50)
    train short "--documents 16000 --length 4096 --min-length 136 --max-length 256 --queries 4" "${common[@]}" --steps 1000 --lr 2e-3 \
        --schedule constant "$@"
    train mixed "--documents 10400 --length 4096 --min-length 136 --queries 4" "${common[@]}" --steps 650 --lr 1e-3 --schedule linear "$@"
    ask "--entries 5,10,15,20,30,40,60,80,120,160,240,320,480 --books 20" --micro-batch 20
    ;;
cpu)
    train short "--documents 64 --length 160 --queries 2" --seq-len 160 --micro-batch 8 --steps 8 --lr 2e-3 --warmup-steps 2 --decay matrices "$@"
    ask "--entries 3,6 --books 4" --micro-batch 4
    ;;
esac
