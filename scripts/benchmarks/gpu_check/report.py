"""The markdown table and the JSON line of a run."""

import json
import math
from collections.abc import Mapping, Sequence

from gpu_check.check import Outcome, Value


def markdown(outcomes: Sequence[Outcome], title: str) -> str:
    """Returns a title line and a table: a row a stage with its verdict, then a row a figure."""
    lines = [title, "", "| stage | figure | measured | expected |", "| --- | --- | --- | --- |"]
    for outcome in outcomes:
        verdict = f"**{outcome.verdict}**" + (f": {outcome.reason}" if outcome.reason else "")
        lines.append(_row(outcome.name, "verdict", f"{verdict} ({outcome.seconds:.0f} s)", ""))
        lines += [
            _row("", figure.what, figure.measured, figure.expected) for figure in outcome.figures if figure.measured
        ]
    return "\n".join(lines) + "\n"


def json_text(outcomes: Sequence[Outcome], facts: Mapping[str, object]) -> str:
    """Returns one line of JSON: `facts`, and for each stage its verdict, reason, seconds and figures."""
    stages = {}
    for outcome in outcomes:
        stage: dict = {"verdict": outcome.verdict, "reason": outcome.reason, "seconds": round(outcome.seconds, 2)}
        stage["figures"] = {figure.key: _rounded(figure.value) for figure in outcome.figures}
        if outcome.left_out:
            stage["left_out"] = list(outcome.left_out)
        if outcome.trace:
            stage["trace"] = outcome.trace
        stages[outcome.name] = stage
    return json.dumps({**facts, "stages": stages}, allow_nan=False)


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _rounded(value: Value) -> Value | list:
    """Rounds to five digits. JSON has no infinity and no NaN, which become text."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)
