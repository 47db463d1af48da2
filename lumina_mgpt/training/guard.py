"""Detects and records training steps that would damage the weights; stops the run or skips the step."""

import math
import sys
from pathlib import Path

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import append_lines, keep_until

# Chosen values, not tuned.
_REMEMBERED = 100  # gradient norms of good steps, whose median a spike is compared with
_NEEDED = 20  # norms that must be known before a step can be a spike
_LIMIT = 10  # consecutive skipped steps; if there are more, the weights themselves are not finite


class Guard:
    """Checks each training step before its gradient is applied, with the same result on every process.

    Args:
        rule: what happens at a bad step: "stop" ends the run, "skip" leaves the step out.
        spike: a step is bad if its gradient norm exceeds `spike` times the median norm of the last 100 good steps. With
            0, a step is bad only if its loss or norm is not finite.
        folder: output folder of the run; bad steps are recorded in its `bad_steps.jsonl`.
        active: whether this process writes that file.
    """

    def __init__(self, rule: str, spike: float, folder: Path, active: bool) -> None:
        self.rule, self.spike, self.path, self.active = rule, spike, folder / "bad_steps.jsonl", active
        self.norms: list[float] = []
        self.in_a_row = 0

    def begin(self) -> None:
        """Removes lines of `bad_steps.jsonl` that a power loss damaged.

        All other lines stay, also those of steps that a resumed run repeats.
        """
        if self.active:
            keep_until(self.path, sys.maxsize)

    def state(self) -> dict:
        """Returns the state to store in a checkpoint; with it, a resumed run makes the same decisions."""
        return {"norms": self.norms, "in_a_row": self.in_a_row}

    def load(self, state: dict) -> None:
        """Restores a state that the method `state` returned."""
        self.norms, self.in_a_row = list(state.get("norms", [])), state.get("in_a_row", 0)

    def fault(self, loss: float, norm: float) -> str | None:
        """Returns why a step is bad; for a good step, records its norm and returns None.

        Args:
            loss, norm: loss and gradient norm of the step.
        """
        if not math.isfinite(loss + norm):
            return f"the loss is {loss} and the gradient norm {norm}"
        usual = sorted(self.norms)[len(self.norms) // 2] if len(self.norms) >= _NEEDED else math.inf
        if self.spike and norm > self.spike * usual:
            return f"the gradient norm is {norm:.4g}, over {self.spike:g} times the usual {usual:.4g}"
        self.norms, self.in_a_row = [*self.norms, norm][-_REMEMBERED:], 0
        return None

    def refuse(self, step: int, fault: str, samples: list[dict]) -> None:
        """Records a bad step, and raises an error unless the caller may skip it.

        Args:
            step: number of the step.
            fault: what the method `fault` returned for it.
            samples: file and record of each sequence in the step's batches, as `TokenDataset.locate` returns them.

        Raises:
            InputError: the rule is "stop", or too many consecutive steps are bad.
        """
        self.in_a_row += 1
        if self.active:
            append_lines(self.path, [{"step": step, "reason": fault, "samples": samples}])
        before = self.path.parent / "checkpoints" / "step-N"
        recorded = f"its records are in {self.path}"
        remedy = f"go back with resume={before}, a checkpoint before it, and a lower lr"
        if self.rule == "stop":
            raise InputError(
                f"stop: {fault} at step {step}; {recorded}: go on with resume=auto and on_nonfinite=skip, or {remedy}",
                "on_nonfinite",
            )
        if self.in_a_row > _LIMIT:
            raise InputError(
                f"skip: {fault} at step {step} and at the {_LIMIT} steps before; {recorded}: {remedy}", "on_nonfinite"
            )
