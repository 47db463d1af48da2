"""Starts the check, and its clock before torch is imported."""

import sys
import time

BEGAN = time.monotonic()

from gpu_check import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(began=BEGAN))
