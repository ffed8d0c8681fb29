#!/usr/bin/env bash
# What `make train` runs after the build: trains a small Samba on the built-in corpus, samples from it and draws its log.
#   scripts/quickstart.sh TRAIN_SAMBA DATA_DIR OUT_DIR [options of train_samba, which win over those below]
set -euo pipefail
cd "$(dirname "$0")/.."
program=$1 data=$2 out=$3
shift 3

# On two CPU cores the tiny model sees a million and a half tokens in about three minutes. A GPU has time for a larger one,
# which sees the corpus four times.
if "$program" info --device | grep -q '^gpu'; then
    recipe=(--model small --micro-batch 32 --steps 400 --lr 2e-3 --warmup-steps 40
            --val-every 100 --val-batches 1 --checkpoint-every 200 --log-every 10)
else
    recipe=(--model tiny --micro-batch 4 --steps 1500 --lr 3e-3 --warmup-steps 50
            --val-every 250 --val-batches 8 --checkpoint-every 500 --log-every 10)
fi

"$program" --data "$data/train_*.bin" --val "$data/val_*.bin" --out "$out" --resume --decay matrices --keep 1 "${recipe[@]}" "$@"

echo
echo "A sample:"
echo "----------------------------------------------------------------------"
"$program" generate --checkpoint "$out" --prompt $'import os\nimport sys\n\ndef ' --max-tokens 250 --temperature 0.5 --top-p 0.9 --seed 1
echo "----------------------------------------------------------------------"
.venv/bin/python scripts/plot_log.py "$out/log.jsonl" --out "$out"
.venv/bin/python - "$out/log.jsonl" "$data/meta.json" <<'PYTHON'
import json, sys
validations = [r for r in map(json.loads, open(sys.argv[1])) if r["type"] == "val"]
loss = next(r["loss"] for r in validations if r["step"] == validations[-1]["step"])
unigram = json.load(open(sys.argv[2]))["val_unigram_cross_entropy"]
print(f"validation loss {loss:.3f} nats a token; knowing only how frequent each token is gives {unigram:.3f}")
PYTHON
echo "checkpoint    $out/$(readlink "$out/latest")"
echo "log           $out/log.jsonl"
echo "loss picture  $out/overview.png"
