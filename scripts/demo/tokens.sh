#!/usr/bin/env bash
# Tokenizes records in several processes with one thread each: scripts/demo/tokens.sh COUNT [options of pre_tokenize.py]
#
# On small pictures, two threads of one process are hardly faster than one.
set -euo pipefail
count="${1:-}"
[[ "$count" =~ ^[1-9][0-9]*$ ]] || { echo "error: COUNT must be a number above 0, got '$count'" >&2; exit 2; }
shift
stop() { # exit status
    # shellcheck disable=SC2046 # a number for each process
    kill -TERM $(jobs -p) 2> /dev/null || true # a job in the background ignores SIGINT
    wait
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
for ((rank = 0; rank < count; rank++)); do
    OMP_NUM_THREADS=1 python scripts/pre_tokenize.py "$@" --splits "$count" --rank "$rank" &
done
for ((rank = 0; rank < count; rank++)); do
    wait -n || stop $? # the first process that fails ends the others
done
