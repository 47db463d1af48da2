#!/usr/bin/env bash
# Makes the demo checkpoint from nothing: pictures, image tokenizer, tokens, transformer, export, evaluation.
#
#   pip install -e '.[demo]' && scripts/train_demo.sh [work folder]
#
# Two CPU cores take about two and a half hours; MOVQGAN_MINUTES and MINUTES set the two trainings' time boxes. Every
# step goes on from where it was when the script is run again after a stop. Needs npm (for the pictures) and a C++
# compiler (torch.compile).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work="${1:-work/demo}"
out="${OUT:-assets/demo}"
pictures="$work/pictures"

echo "== 1/6 pictures, captions and text tokenizer"
[ -f "$work/data.done" ] || python scripts/demo_data.py --out_dir "$work"
touch "$work/data.done"

echo "== 2/6 image tokenizer"
python scripts/train_movqgan.py --out_dir "$work/movqgan" --minutes "${MOVQGAN_MINUTES:-45}" --images \
    "$pictures/single=4" "$pictures/beside=2" "$pictures/above=1" \
    "$pictures/maps=1.2" "$pictures/panels=1" "$pictures/loose=1"

echo "== 3/6 pictures to tokens"
python scripts/pre_tokenize.py --in_filename "$work/records.jsonl" --out_dir "$work/tokens" --keep_size \
    --model_path "$work/tokenizer" --movqgan_path "$work/movqgan/movqgan.safetensors" --target_size 96
python scripts/concat_record.py --sub_record_dir "$work/tokens" --save_path "$work/tokens/records.jsonl"

echo "== 4/6 transformer"
data_config="$work/data.yaml"
sed "s#work/demo#$work#" configs/data/demo.yaml > "$data_config"
bash scripts/train.sh --data_config "$data_config" --output_dir "$work/run" --resume auto \
    --model_config configs/model/demo.yaml --tokenizer_path "$work/tokenizer" \
    --max_minutes "${MINUTES:-80}" --save_minutes 5 --save_iteration_interval 0 --compile \
    --optimizer muon --muon_lr 0.02 --lr 3e-3 --ema 0.99 --max_tokens 8192 --clip_grad 1 \
    --export_dtype fp16 --export_dir "$work/export"

echo "== 5/6 export to $out"
mkdir -p "$out"
cp "$work"/export/* "$work/tokenizer/names.txt" "$work/movqgan/movqgan.safetensors" "$out/"

echo "== 6/6 evaluation"
python scripts/evaluate_demo.py --model_path "$out" --emoji_dir "$work/emoji" --out_dir "$work/evaluation"
