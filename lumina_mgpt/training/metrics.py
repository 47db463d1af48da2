"""What a run tells about itself: a progress bar, and one JSON line a step."""

import json
import time
from pathlib import Path

from tqdm import tqdm

from lumina_mgpt.data.files import append_lines, json_line, write_atomic

_FLUSH_SECONDS = 5


class Metrics:
    """Bar and `metrics.jsonl` of the first process; silent on the others."""

    def __init__(self, folder: Path, step: int, progress: float, active: bool) -> None:
        self.active, self.path, self.waiting = active, folder / "metrics.jsonl", []
        self.flushed = 0.0
        if not active:
            return
        if self.path.exists():  # lines of steps that a resumed run does again
            rows = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            write_atomic(self.path, "".join(json_line(row) for row in rows if row["step"] <= step))
        form = "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=1.0, initial=min(1.0, progress), bar_format=form, dynamic_ncols=True, smoothing=0.05)

    def step(self, row: dict) -> None:
        if not self.active:
            return
        self.waiting.append(row)
        self.bar.update(max(0.0, min(1.0, row["progress"]) - self.bar.n))
        self.bar.set_postfix_str(
            f"step {row['step']} loss {row['loss']:.3f} lr {row['lr']:.1e} {row['tokens_per_second']:.0f} tok/s"
        )
        if time.monotonic() - self.flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.active:
            append_lines(self.path, self.waiting)
            self.waiting, self.flushed = [], time.monotonic()

    def close(self) -> None:
        if self.active:
            self.flush()
            self.bar.close()
