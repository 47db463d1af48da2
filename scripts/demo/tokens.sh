#!/usr/bin/env bash
# Tokenizes records in several processes with one thread each: scripts/demo/tokens.sh COUNT [options of pre_tokenize.py]
#
# On small pictures, two threads of one process are hardly faster than one.
set -euo pipefail
count="$1"
shift
running=()
stop() { # exit status
    kill -TERM "${running[@]}" 2> /dev/null || true # a job in the background ignores SIGINT
    wait
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
for ((rank = 0; rank < count; rank++)); do
    OMP_NUM_THREADS=1 python scripts/pre_tokenize.py "$@" --splits "$count" --rank "$rank" &
    running+=($!)
done
for process in "${running[@]}"; do
    wait "$process"
done
