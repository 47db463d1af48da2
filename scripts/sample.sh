#!/usr/bin/env bash
# Text to image: scripts/sample.sh [checkpoint folder or hub id] [further options of generate.py]
# Without arguments the demo checkpoint makes its built-in prompts. Pictures go to outputs/t2i; a second
# run wants --overwrite, or another --save_path.
set -euo pipefail

model_path="${1:-assets/demo}"
shift || true

python "$(dirname "${BASH_SOURCE[0]}")/../generate_examples/generate.py" \
    --model_path "$model_path" \
    --save_path outputs/t2i \
    --cfg 4.0 --top_k 4096 --temperature 1.0 \
    "$@"
