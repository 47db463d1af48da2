"""Checks this project on the GPU at hand, in stages: results, speed and memory. `scripts/gpu_check.sh` runs it."""


def main(argv: list[str] | None = None, began: float | None = None) -> int:
    """Runs the check. Returns the exit status: 0, 1 if a stage failed, 2 for invalid options.

    Args:
        began: the time of `time.monotonic()` when the run began, None for now.
    """
    from gpu_check.command import main  # not at the top, so that `__main__` reads the clock before torch is imported

    return main(argv, began)
