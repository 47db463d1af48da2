#!/usr/bin/env bash
# Text to image: scripts/sample.sh [checkpoint folder or hub id] [further options of generate.py]
# Without arguments it uses the demo checkpoint and its example prompts. Images go to outputs/t2i; a second run
# needs --overwrite or another --save_path.
set -euo pipefail

model_path="${1:-assets/demo}"
shift || true

python "$(dirname "${BASH_SOURCE[0]}")/../generate_examples/generate.py" \
    --model_path "$model_path" \
    --save_path outputs/t2i \
    --cfg 4.0 --top_k 4096 --temperature 1.0 \
    "$@"
