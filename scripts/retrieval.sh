# What scripts/passkey.sh and scripts/phonebook.sh share: read by them, not run. They set `task`; their arguments become `recipe`, `out`,
# `start_from`, and what is left in "$@" are options of train_samba.
# PROGRAM, PYTHON: other than ./train_samba and .venv/bin/python.
[ $# -ge 3 ] || { echo "usage: scripts/$task.sh paper|gpu|cpu OUT CHECKPOINT_OR_MODEL [options of train_samba]" >&2; exit 1; }
recipe=$1 out=$2 start_from=$3
shift 3
case $recipe in paper | gpu | cpu) ;; *) echo "error: recipe $recipe: choose paper, gpu or cpu" >&2; exit 1 ;; esac
program=${PROGRAM:-./train_samba}
python=${PYTHON:-.venv/bin/python}
model=$start_from
vocabulary=words
checkpoint=
mkdir -p "$out"

# A checkpoint to go on from brings its configuration and its tokenizer; anything else is a --model to train from nothing.
if [ -d "$start_from" ]; then
    [ ! -e "$start_from/latest" ] || start_from=$start_from/latest
    checkpoint=$start_from
    model=$out/model.json
    "$python" - "$start_from/model.safetensors" > "$model" <<'PYTHON'
import json, struct, sys
with open(sys.argv[1], "rb") as file:
    print(json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))["__metadata__"]["config"])
PYTHON
    [ ! -e "$start_from/tokenizer.model" ] || vocabulary=$start_from/tokenizer.model
fi

# train STAGE "options of data.retrieval" [options of train_samba]: documents made for this stage, gone after it. Starts from
# the stage before; stopped and started again, it goes on where it was.
train() {
    local folder=$out/$1 documents=$2
    shift 2
    # shellcheck disable=SC2086 # several options
    "$python" -m data.retrieval "$task" train --vocabulary "$vocabulary" --out "$folder/documents" $documents
    local from=()
    if [ -e "$folder/latest" ]; then from=(--resume); elif [ -n "$checkpoint" ]; then from=(--init-from "$checkpoint"); fi
    [ "$vocabulary" = words ] || from+=(--tokenizer "$vocabulary")
    "$program" --model "$model" --data "$folder/documents/train_*.bin" --out "$folder" --keep 1 "${from[@]}" "$@"
    rm -r "$folder/documents"
    checkpoint=$folder
}

# ask "options of data.retrieval" [options of train_samba retrieve]: prompts, answers, picture
ask() {
    local prompts=$1
    shift
    # shellcheck disable=SC2086
    "$python" -m data.retrieval "$task" prompts --vocabulary "$vocabulary" --out "$out/prompts" $prompts
    "$program" retrieve --checkpoint "$checkpoint" --prompts "$out/prompts" --out "$out/$task.json" "$@"
    rm -r "$out/prompts"
    "$python" "scripts/plot_$task.py" "$out/$task.json" --out "$out/$task.png"
}
