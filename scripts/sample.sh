#!/usr/bin/env bash
# Text to image: scripts/sample.sh [checkpoint folder or hub id] [further options of generate.py]
# Without arguments it makes the demo checkpoint's built-in prompts, into outputs/t2i.
set -euo pipefail
cd "$(dirname "$0")/.."

model_path="${1:-assets/demo}"
shift || true

python generate_examples/generate.py \
    --model_path "$model_path" \
    --save_path outputs/t2i \
    --cfg 4.0 --top_k 4096 --temperature 1.0 \
    "$@"
