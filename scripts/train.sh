#!/usr/bin/env bash
# Trains on all GPUs of this machine, or in one process without a GPU: scripts/train.sh [options of finetune.py]
#
#   scripts/train.sh --init_from Alpha-VLLM/Lumina-mGPT-2.0 --data_config data.yaml --output_dir outputs/finetune \
#       --batch_size 8 --accum_iter 4 --epochs 2 --warmup_epochs 0.01 --lr 2e-5 --min_lr 2e-5 --wd 0.1 --clip_grad 4 \
#       --max_seq_len 10240 --dropout 0.05 --z_loss_weight 1e-5 --checkpointing --resume auto
#
# NPROC sets the number of processes; TORCHRUN adds options of torchrun (several machines).
set -euo pipefail
script="$(dirname "${BASH_SOURCE[0]}")/finetune.py"

nproc="${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
if [ "$nproc" = 1 ] && [ -z "${TORCHRUN:-}" ]; then
    exec python "$script" "$@"
fi
# shellcheck disable=SC2086 # TORCHRUN holds several options
exec torchrun ${TORCHRUN:---standalone} --nproc-per-node="$nproc" "$script" "$@"
