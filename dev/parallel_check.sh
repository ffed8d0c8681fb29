#!/usr/bin/env bash
# What several processes do with one GPU, without pytest or MPI: NCCL with one rank changes no bit, also where either stream comes
# late, and does where an event is missing; two ranks that share the GPU train as one does, started by hand and by torchrun.
#   PROGRAM=build/gpu-fp32/train_samba dev/parallel_check.sh
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
header = struct.pack("<256i", 20240520, 1, len(tokens), 512, 3, *[0] * 251)
open(sys.argv[1] + "/train.bin", "wb").write(header + struct.pack(f"<{len(tokens)}H", *tokens))
json.dump({"name": "parallel", "blocks": "MSMS", "n_embd": 128, "n_head": 4, "n_query_groups": 2, "head_size": 32, "intermediate_size": 256,
           "local_window": 33, "block_size": 64, "padded_vocab_size": 512}, open(sys.argv[1] + "/model.json", "w"))
PYTHON

recipe=(--model "$work/model.json" --data "$work/train.bin" --micro-batch 2 --global-batch 768 --steps 30
        --lr 2e-3 --warmup-steps 0 --schedule constant)
train() {   # OUT options...
    local out=$1; shift
    "$program" "${recipe[@]}" --out "$work/$out" "$@" >"$work/$out.log" 2>&1
}
same() {   # A B
    local a=$work/$1/step_00000030 b=$work/$2/step_00000030
    cmp "$b/model.safetensors" "$a/model.safetensors" && cmp "$b/optimizer.safetensors" "$a/optimizer.safetensors"
}
compare_losses() {   # A B TOLERANCE
    python3 - "$work/$1/log.jsonl" "$work/$2/log.jsonl" "$3" <<'PYTHON'
import json, sys
a, b = ([r["loss"] for r in map(json.loads, open(p)) if r["type"] == "train"] for p in sys.argv[1:3])
worst = max(abs(x - y) for x, y in zip(a, b))
print(f"        losses: {len(b)} steps, at most {worst:.2e} from those of one process; {a[0]:.4f} -> {a[-1]:.4f}")
sys.exit(not (len(a) == len(b) == 30 and worst < float(sys.argv[3])))
PYTHON
}

# All runs of one rank at once; then what came of them
events=("gradients:1 2000" "own numbers:1 2000" "own weights:1 2000" "summed gradients:2000 0" "everybody's numbers:2000 0" "new weights:2000 0")
train plain &
for reduce in fp32 bf16; do for zero in 0 1; do for delays in "0 0" "2000 0" "1 2000"; do
    SAMBA_TEST_DELAY=${delays% *} SAMBA_TEST_DELAY_COMPUTE=${delays#* } \
        train "$reduce $zero $delays" --collectives "$collectives" --zero $zero --reduce $reduce --bucket 100k &
done; done; done
for event in "${events[@]}"; do
    delays=${event#*:}
    SAMBA_TEST_DROP=${event%:*} SAMBA_TEST_DELAY=${delays% *} SAMBA_TEST_DELAY_COMPUTE=${delays#* } \
        train "without ${event%:*}" --collectives "$collectives" --bucket 100k &
done
wait
for reduce in fp32 bf16; do for zero in 0 1; do for delays in "0 0" "2000 0" "1 2000"; do
    [ $reduce = fp32 ] && other=plain || other="bf16 0 0 0"
    same "$reduce $zero $delays" "$other"
    ok=$? what="$collectives with one rank, $reduce, --zero $zero"
    say $ok "$what, delays of ${delays% *} us of the collectives and ${delays#* } of computing: the bits of '$other'"
    grep -E "ranks  |error" "$work/$reduce $zero $delays.log"
done; done; done
compare_losses plain "bf16 0 0 0" 0.02; say $? "rounded to bf16"
! same "bf16 0 0 0" plain >/dev/null 2>&1; say $? "and rounded indeed"
for event in "${events[@]}"; do
    ! same "without ${event%:*}" plain >/dev/null 2>&1; say $? "without the event of the ${event%:*} and with the other stream late: other bits"
done

for zero in 0 1; do
    name=two_ranks_zero$zero
    for rank in 1 0; do
        RANK=$rank LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29653 CUDA_VISIBLE_DEVICES=0 train "$name" --zero $zero --bucket 100k &
    done
    wait; cat "$work/$name.log" | grep -E "ranks  |error"
    compare_losses plain "$name" 1e-3
    say $? "two ranks that share the GPU, --zero $zero"
done
if command -v torchrun >/dev/null; then
    name=torchrun
    OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=0 \
        torchrun --nproc-per-node 2 --no-python "$program" "${recipe[@]}" --out "$work/$name" >"$work/$name.log" 2>&1
    say $? "torchrun --nproc-per-node 2"; grep -E "ranks  |error" "$work/$name.log"
    compare_losses plain "$name" 1e-3; say $? "the same training"
else
    echo "skipped torchrun, which is not installed"
fi
exit $failed
