#!/usr/bin/env bash
# Finetunes in stages of growing picture sizes. Each stage starts from the export of the previous one:
#
#   DATA=data scripts/train_progressive.sh INIT_FROM OUTPUT_DIR [options of finetune.py, for every stage]
#
# DATA_CONFIG is the data file of each stage (default: configs/data/fp_sft.yaml; fp_sft_first.yaml for Lumina-mGPT 1).
# DATA holds SIZE/records.jsonl for each of SIZES (default: "512 768 1024"), made by pre_tokenize.py --target_size SIZE.
# After a stop, the same command resumes the current stage.
set -euo pipefail
[ $# -ge 2 ] || { echo "error: give INIT_FROM and OUTPUT_DIR; see the head of $0" >&2; exit 2; }
here="$(dirname "${BASH_SOURCE[0]}")"
init="$1" output="$2"
shift 2

for size in ${SIZES:-512 768 1024}; do
    echo "== ${size} x ${size}, from $init"
    if [ ! -f "$output/$size/export/config.json" ]; then
        SIZE="$size" bash "$here/train.sh" --init_from "$init" --data_config "${DATA_CONFIG:-$here/../configs/data/fp_sft.yaml}" \
            --output_dir "$output/$size" --resume auto "$@"
    fi
    init="$output/$size/export"
done
