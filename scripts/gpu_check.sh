#!/usr/bin/env bash
# Checks results, speed and memory on the GPU of this machine, in at most nine minutes: scripts/gpu_check.sh [options]
#
#   scripts/gpu_check.sh --json gpu.json --table gpu.md
#
# Without a GPU it tests itself on the CPU, with small models. --help lists the options. It needs no installation of the
# project, only its dependencies; any torch from 2.11 on will do. PYTHON names the interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root:$root/scripts/benchmarks:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m gpu_check "$@"
