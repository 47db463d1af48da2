#!/usr/bin/env bash
# Distills guidance 4 into the demo checkpoint, and compares it with the original.
#
#   pip install -e '.[demo]'
#   scripts/demo/distill.sh [WORK]    # work folder of scripts/demo/train.sh; default work/demo
#
# RECORDS is the number of records of each file that are used, MINUTES limits the training, PROMPTS is the number of
# prompts in each row of the evaluation, IMAGES the number of images that each setting is timed with. Data that train.sh
# has made in WORK are used; else they are made, which needs npm. After an interruption, the same command resumes.
# --compile needs a C++ compiler.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work="${1:-work/demo}"
out="$work/guidance"
mkdir -p "$out"
exec 9> "$work/lock" # children inherit the lock: a training may outlive this script
flock -n 9 || { echo "error: another run is using $work; stop it first" >&2; exit 2; }

echo "== 1/4 tokens"
if [ ! -f "$work/data.done" ]; then
    python scripts/demo/make_data.py --out_dir "$work"
    python scripts/demo/make_data.py --out_dir "$work" --omni
    touch "$work/data.done"
fi
for name in records omni pairs; do
    if [ ! -f "$out/tokens/$name.jsonl" ]; then
        shuf -n "${RECORDS:-3000}" --random-source=<(yes) "$work/$name.jsonl" > "$out/$name.jsonl"
        python scripts/pre_tokenize.py --in_filename "$out/$name.jsonl" --out_dir "$out/tokens/$name" --keep_size \
            --model_path assets/demo --target_size 96
        python scripts/concat_record.py --sub_record_dir "$out/tokens/$name" --save_path "$out/tokens/$name.jsonl"
    fi
done

echo "== 2/4 training"
# Noise in the codes, as in the training of the checkpoint: sampled images have wrong codes, too.
WORK="$out" lumina-mgpt distill-guidance --cfg 4 --init_from assets/demo --data_config configs/data/demo_omni.yaml \
    --output_dir "$out/run" --max_minutes "${MINUTES:-32}" --max_tokens 6144 --optimizer muon --muon_lr 0.003 --lr 6e-4 \
    --warmup 0.02 --clip_grad 1 --code_noise 0.1 --spare_panel 0.8 --compile --pad_multiple 64 \
    --save_minutes 5 --save_iteration_interval 0 --export_dtype fp16 --resume auto

echo "== 3/4 evaluation"
for model in assets/demo "$out/run/export"; do # the original with guidance 4, then the other without guidance
    python scripts/demo/evaluate.py --model_path "$model" --emoji_dir "$work/emoji" --prompts "${PROMPTS:-300}" \
        --out_dir "$out/evaluation/$(basename "$model")"
done

echo "== 4/4 comparison"
python scripts/demo/compare_guidance.py --original assets/demo --guided "$out/run/export" --images "${IMAGES:-64}" \
    --figures "$out/evaluation/demo/figures.json" "$out/evaluation/export/figures.json"
