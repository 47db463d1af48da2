"""Steps that would harm the weights: found by rule, written down, stopped at or left out."""

import math
import sys
from pathlib import Path

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import append_lines, keep_until

_REMEMBERED = 100  # gradient norms of good steps that a spike is measured against
_NEEDED = 20  # of them, before anything counts as a spike
_LIMIT = 10  # steps left out in a row, after which no more are: the weights themselves are at fault


class Guard:
    """Judges each step before its gradient is used, alike on every process.

    `rule` is stop or skip; `spike` times the median of the last norms is too much (0: only what is not finite is). What
    it remembers is part of a checkpoint, so that a resumed run judges as an uninterrupted one.
    """

    def __init__(self, rule: str, spike: float, folder: Path, active: bool) -> None:
        self.rule, self.spike, self.path, self.active = rule, spike, folder / "bad_steps.jsonl", active
        self.norms: list[float] = []
        self.in_a_row = 0

    def begin(self) -> None:
        """Removes lines of the file that a power loss has damaged; bad steps of all attempts stay in it."""
        if self.active:
            keep_until(self.path, sys.maxsize)

    def state(self) -> dict:
        return {"norms": self.norms, "in_a_row": self.in_a_row}

    def load(self, state: dict) -> None:
        self.norms, self.in_a_row = list(state.get("norms", [])), state.get("in_a_row", 0)

    def fault(self, loss: float, norm: float) -> str | None:
        """Why a step is not to be taken; None for a good one, whose norm is remembered."""
        if not math.isfinite(loss + norm):
            return f"the loss is {loss} and the gradient norm {norm}"
        usual = sorted(self.norms)[len(self.norms) // 2] if len(self.norms) >= _NEEDED else math.inf
        if self.spike and norm > self.spike * usual:
            return f"the gradient norm is {norm:.4g}, over {self.spike:g} times the usual {usual:.4g}"
        self.norms, self.in_a_row = [*self.norms, norm][-_REMEMBERED:], 0
        return None

    def refuse(self, step: int, fault: str, samples: list[dict]) -> None:
        """Writes a bad step down with the records of its batches; then it is the caller's to leave it out.

        Raises:
            InputError: the rule is to stop, or too many steps in a row are bad.
        """
        self.in_a_row += 1
        if self.active:
            append_lines(self.path, [{"step": step, "reason": fault, "samples": samples}])
        before = self.path.parent / "checkpoints" / "step-N"
        kept = f"its records are in {self.path}"
        remedy = f"go back with --resume {before}, a checkpoint before it, and a lower --lr"
        if self.rule == "stop":
            raise InputError(f"--on_nonfinite stop: {fault} at step {step}; {kept}: go on with --resume auto and "
                             f"--on_nonfinite skip, or {remedy}")  # fmt: skip
        if self.in_a_row > _LIMIT:
            raise InputError(f"--on_nonfinite skip: {fault} at step {step}, and so were the {_LIMIT} steps before; "
                             f"{kept}: {remedy}")  # fmt: skip
