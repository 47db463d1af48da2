#!/usr/bin/env bash
# Image to image: scripts/sample_i2i.sh [checkpoint folder or hub id] [further options of generate.py]
# Without arguments it uses the demo checkpoint and the pictures in assets. Images go to outputs/i2i; a second run
# needs --overwrite.
set -euo pipefail

model_path="${1:-assets/demo}"
shift || true
project="$(dirname "${BASH_SOURCE[0]}")/.."

sample() {
    python "$project/generate_examples/generate.py" \
        --model_path "$model_path" \
        --save_path outputs/i2i \
        --cfg 4.0 --top_k 4096 --temperature 1.0 \
        --task i2i "$@"
}

sample --i2i_task depth --image_path "$project/assets/depth.png" \
    --image_prompt "on a sky blue background" "$@"
sample --i2i_task subject --image_path "$project/assets/subject.png" \
    --image_prompt "a penguin on an orange background" "$@"
