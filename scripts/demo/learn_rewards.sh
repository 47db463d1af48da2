#!/usr/bin/env bash
# Shows lumina-mgpt grpo on a demo checkpoint, without guidance: held-out prompts before and after, and with guidance.
#
#   scripts/demo/learn_rewards.sh [WORK]    # work folder, relative to the project's root; default work/grpo
#
# MODEL is the checkpoint (default: an earlier one from the history, which leaves more to learn than the current one), ROW
# the row of the evaluation, STEPS the steps of the training. PROMPTS and HELD_OUT are the numbers of prompts, SEVERAL
# the number of those with four images, OPTIONS further options of the training. REWARD holds the options of the reward;
# REWARD="--reward rewards:right" takes the scores of the evaluation, one for each image. After an interruption, the same
# command resumes; take another WORK for other settings. Needs npm, which downloads the emoji pictures, and a git clone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work="${1:-work/grpo}" model="${MODEL:-}" row="${ROW:-two emoji}"
export DEMO_EMOJI="${DEMO_EMOJI:-work/demo/emoji}" DEMO_SCENES="$work/scenes.json"
export PYTHONPATH="$PWD:$PWD/scripts/demo${PYTHONPATH:+:$PYTHONPATH}"
declare -A sizes=(["two emoji"]="--width 192 --height 96")
declare -A tasks=(["one emoji"]=t2i ["two emoji"]=t2i [pair_depth]=depth [pair_canny]=canny)

measure() { # NAME MODEL options
    if [ ! -f "$work/$1.json" ]; then
        python scripts/demo/learn_rewards.py measure --out_dir "$work" --row "$row" --name "$1" --model_path "$2" \
            --prompts "${HELD_OUT:-1000}" "${@:3}"
    fi
}

mkdir -p "$work"
if [ -z "$model" ]; then
    model="$work/earlier"
    if [ ! -d "$model" ]; then
        rm -rf "$model.partial" && mkdir "$model.partial"
        git archive e515151 assets/demo | tar -x -C "$model.partial" --strip-components=2
        mv "$model.partial" "$model"
    fi
fi
python scripts/demo/learn_rewards.py prompts --out_dir "$work" --row "$row" --prompts "${PROMPTS:-2000}"
measure before "$model" --several "${SEVERAL:-256}"
measure guided "$model" --cfg 4 --several 0
if [ ! -d "$work/run/export" ]; then
    reward="${REWARD:---reward bayes --supervision process --discount 0 --advantage mean}"
    # Sizes, rewards and OPTIONS are split into words.
    # shellcheck disable=SC2086
    python -m lumina_mgpt grpo --init_from "$model" --prompt_file "$work/prompts.txt" --task "${tasks[$row]}" \
        ${sizes[$row]:-} $reward --groups 8 --group_size 8 --batch_size 32 --sample_batch 32 --lr 1e-4 --kl 0.3 \
        --updates 2 --max_steps "${STEPS:-12}" --output_dir "$work/run" --resume auto --export_dtype fp32 \
        --save_minutes 5 --save_iteration_interval 0 --sample_every 5 ${OPTIONS:-}
fi
measure after "$work/run/export" --several "${SEVERAL:-256}"
python scripts/demo/learn_rewards.py compare --out_dir "$work"
