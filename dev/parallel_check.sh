#!/usr/bin/env bash
# What several processes do with one GPU, without pytest or MPI: NCCL with one rank changes no bit, also with delays before every
# collective, and two ranks that share the GPU train as one does.   PROGRAM=build/gpu-fp32/train_samba dev/parallel_check.sh
set -uo pipefail
cd "$(dirname "$0")/.."
program=${PROGRAM:-build/gpu-fp32/train_samba} collectives=${COLLECTIVES:-nccl}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
say() { if [ "$1" = 0 ]; then echo "ok      $2"; else echo "FAILED  $2"; failed=1; fi; }

python3 - "$work" <<'PYTHON'
import json, random, struct, sys
rng, tokens = random.Random(1), []
while len(tokens) < 40000:
    start = rng.randrange(512)
    tokens += [(start + i) % 512 for i in range(10)]
open(sys.argv[1] + "/train.bin", "wb").write(struct.pack("<256i", 20240520, 1, len(tokens), 512, 3, *[0] * 251) + struct.pack(f"<{len(tokens)}H", *tokens))
json.dump({"name": "parallel", "blocks": "MSMS", "n_embd": 128, "n_head": 4, "n_query_groups": 2, "head_size": 32, "intermediate_size": 256, "local_window": 33, "block_size": 64,
           "padded_vocab_size": 512}, open(sys.argv[1] + "/model.json", "w"))
PYTHON

train() {   # OUT options...
    local out=$1; shift
    "$program" --model "$work/model.json" --data "$work/train.bin" --out "$work/$out" --micro-batch 2 --global-batch 768 --steps 30 --lr 2e-3 --warmup-steps 0 --schedule constant "$@" >"$work/$out.log" 2>&1
}
same() { cmp "$work/plain/step_00000030/model.safetensors" "$work/$1/step_00000030/model.safetensors" && cmp "$work/plain/step_00000030/optimizer.safetensors" "$work/$1/step_00000030/optimizer.safetensors"; }

train plain; say $? "one process"
for zero in 0 1; do
    for delay in 0 2000; do
        name=one_rank_zero${zero}_delay$delay
        SAMBA_TEST_DELAY=$delay train "$name" --collectives "$collectives" --zero $zero --bucket 100k && same "$name"
        say $? "$collectives with one rank, --zero $zero, delays of $delay us: the same bits"
        grep -E "ranks  |error" "$work/$name.log"
    done
    name=two_ranks_zero$zero
    for rank in 1 0; do
        RANK=$rank LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29653 CUDA_VISIBLE_DEVICES=0 train "$name" --zero $zero --bucket 100k &
    done
    wait; cat "$work/$name.log" | grep -E "ranks  |error"
    python3 - "$work/plain/log.jsonl" "$work/$name/log.jsonl" <<'PYTHON'
import json, sys
a, b = ([r["loss"] for r in map(json.loads, open(p)) if r["type"] == "train"] for p in sys.argv[1:])
worst = max(abs(x - y) for x, y in zip(a, b))
print(f"        losses of two ranks: {len(b)} steps, at most {worst:.2e} from those of one; {a[0]:.4f} -> {a[-1]:.4f}")
sys.exit(not (len(a) == len(b) == 30 and worst < 1e-3))
PYTHON
    say $? "two ranks that share the GPU, --zero $zero"
done
exit $failed
