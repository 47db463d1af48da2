"""Checks this project on the GPU at hand, in stages: results, speed and memory. `scripts/gpu_check.sh` runs it."""
