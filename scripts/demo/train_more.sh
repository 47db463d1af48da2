#!/usr/bin/env bash
# Trains the demo checkpoint on: drawing by the categories of GenEval, reading, conversations, detection, maps and views.
#
#   pip install -e '.[demo]'
#   scripts/demo/train_more.sh [WORK]    # work folder, relative to the project's root; default work/demo
#
# Each call works for at most STAGE minutes (default 95; 8 on a GPU) and ends with status 3 if there is more to do.
# The same command then continues, also after an interruption. All its files are in WORK, so you may continue from another
# copy of the code. Status 0 means that the new checkpoint is in OUT (default: WORK/demo).
#
# START is the checkpoint to begin with (default: assets/demo): the result of train.sh, or of an earlier run of this
# script. DECODER_MINUTES, CORE_MINUTES, LEARN_MINUTES and LAST_MINUTES limit the total time of each training, MAX_TOKENS is
# the size of a batch, RECORDS multiplies the numbers of records, OPTIONS are further options of the transformer's training,
# DATA is another data file. Needs npm, which downloads the pictures, and a C++ compiler for torch.compile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work="${1:-work/demo}"
device="${DEVICE:-auto}"
[ "$device" != auto ] || device="$(python -c 'from lumina_mgpt.devices import resolve_device; print(resolve_device())')"
start="${START:-assets/demo}"
out="${OUT:-$work/demo}"
if [[ "$device" = cuda* ]]; then # without --compile, which would take a good part of a stage there
    defaults=(8 6 12 12 8 65536) speed=(--muon_lr 0.004)
else
    defaults=(95 30 190 190 110 6144) speed=(--muon_lr 0.003 --compile)
fi
stage="${STAGE:-${defaults[0]}}" tokens="${MAX_TOKENS:-${defaults[5]}}"
decoder="${DECODER_MINUTES:-${defaults[1]}}" core="${CORE_MINUTES:-${defaults[2]}}"
learn="${LEARN_MINUTES:-${defaults[3]}}" last="${LAST_MINUTES:-${defaults[4]}}"
mkdir -p "$work"
exec 9> "$work/lock" # children inherit the lock: a training may outlive this script
flock -n 9 || { echo "error: another run is using $work; stop it first" >&2; exit 2; }
export WORK="$work" # read by the data file
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$work/inductor}" # compiled parts serve the next call
ends=$((SECONDS + $(python -c "print(round(60 * $stage))")))

# NAME COMMAND: runs the command unless it has ended well before; ends the call if there is no time for it to begin.
once() {
    local name="$1" code=0
    shift
    [ ! -f "$work/$name.done" ] || return 0
    local left=$((ends - SECONDS))
    if [ "$left" -le 5 ]; then
        echo "more to do from $name on: give the same command again"
        exit 3
    fi
    echo "== $name"
    # SIGTERM lets the transformer's training finish its step and write a checkpoint. SIGINT is ignored where this
    # script runs in the background.
    timeout --foreground --signal=TERM --kill-after=300 "$left" "$@" || code=$?
    if [ "$code" = 124 ]; then
        echo "more to do from $name on: give the same command again"
        exit 3
    fi
    [ "$code" = 0 ] || exit "$code"
    touch "$work/$name.done"
}

first_records() { # records of the first training, which the model must not forget
    once data python scripts/demo/make_data.py --out_dir "$work"
    once data_omni python scripts/demo/make_data.py --out_dir "$work" --omni
}

pre_tokenize() { # records, name
    # The number of processes is kept in a file: the shards of two divisions cannot be joined.
    [ -s "$work/processes" ] || python -c "import os, torch
print(1 if '$device' != 'cpu' and torch.cuda.is_available() else len(os.sched_getaffinity(0)))" > "$work/processes"
    local processes records
    processes="$(cat "$work/processes")" records="$(wc -l < "$1")"
    once "tokens_$2" scripts/demo/tokens.sh "$((records < processes ? records : processes))" --in_filename "$1" \
        --out_dir "$work/tokens/$2" --keep_size --model_path "$work/start" --target_size 96 --device "$device"
    once "concat_$2" python scripts/concat_record.py --sub_record_dir "$work/tokens/$2" \
        --save_path "$work/tokens/$2.jsonl"
}

train() { # name, data, checkpoint to begin with, minutes, code noise, options
    # OPTIONS is split into words.
    # shellcheck disable=SC2086
    once "$1" bash scripts/train.sh --data_config "${DATA:-configs/data/$2.yaml}" --output_dir "$work/$1" \
        --init_from "$3" --resume auto --max_minutes "$4" --code_noise "$5" --spare_panel 0.8 --save_minutes 5 \
        --save_iteration_interval 0 --device "$device" "${speed[@]}" --pad_multiple 64 --optimizer muon --wd 0.02 --dropout 0 \
        --clip_grad 1 --max_tokens "$tokens" --max_seq_len 2048 --export_dtype fp16 \
        --export_dir "$work/export-$1" "${@:6}" ${OPTIONS:-}
}

first_records
once records python scripts/demo/make_mixture.py --out_dir "$work" --scale "${RECORDS:-1}"
once start python scripts/demo/extend.py --model_path "$start" --records "$work/records" --save_path "$work/start" \
    --known "$work/records.jsonl" "$work/omni.jsonl" "$work/pairs.jsonl"
for file in "$work"/records.jsonl "$work"/omni.jsonl "$work"/pairs.jsonl "$work"/records/*.jsonl; do
    pre_tokenize "$file" "$(basename "$file" .jsonl)"
done
for kind in detect detect_absent unknown; do
    once "decisions_$kind" python scripts/demo/decision_tokens.py --records "$work/records/$kind.jsonl" \
        --tokens "$work/tokens/$kind" --model_path "$work/start"
done
# Only the decoder learns smaller objects and their colours: the codes stay the same. A sixteenth of the new pictures is
# enough, and fits into memory.
images=("$work/pictures/single=4" "$work/pictures/beside=1" "$work/pictures/above=1" "$work/pictures/maps=1.5")
for folder in "$work"/drawn/0*; do images+=("$folder=1"); done
once decoder python -m lumina_mgpt train-movqgan --decoder_of "$start/movqgan.safetensors" --out_dir "$work/decoder" \
    --lr 1e-3 --minutes "$decoder" --device "$device" --images "${images[@]}"
# First drawing and reading of single pictures, which all other tasks consist of, then all tasks.
train core demo_core "$work/start" "$core" 0.3 --warmup 0.01 --tail_weight 0.1 --lr 8e-4 --min_lr 1e-4 --seed 72
train learn demo_mixture "$work/export-core" "$learn" 0.3 --warmup 0.02 --tail_weight 0.1 --lr 8e-4 \
    --min_lr 2e-4 --seed 61
# Less noise gives clearer pictures, and the tail term makes wrong codes rarer under guidance: see train.sh.
train last demo_mixture "$work/export-learn" "$last" 0.25 --warmup 0.02 --tail_weight 0.7 --lr 6e-4 --seed 67
once publish python scripts/demo/publish.py --model_path "$work/export-last" --save_path "$out" \
    --movqgan_path "$work/decoder/movqgan.safetensors"
echo "the checkpoint is in $out; measure it with scripts/demo/evaluate.py --model_path $out --emoji_dir $work/emoji"
