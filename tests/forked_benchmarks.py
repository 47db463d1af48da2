"""Runs `lumina-mgpt benchmark` in processes forked from one interpreter, which start quickly.

    python tests/forked_benchmarks.py    # reads jobs as lines of JSON, prints one line of JSON for each

A job is {"options": [...], "world": 1, "kill_at": null}. With `kill_at`, a process kills itself by SIGKILL while it
writes its file of that number, from 0. The answer is the list of exit statuses.
"""

import json
import os
import signal
import sys
import traceback

import torch

from lumina_mgpt import pipeline
from lumina_mgpt.benchmarks import folder
from lumina_mgpt.cli import benchmark

assert pipeline  # imported before the forks, as it takes seconds


def kill_while_writing(number: int) -> None:
    """Lets the file of this number be cut in half, and the process killed before the file gets its name."""
    leave, left = folder._Partial.__exit__, [number]

    def leave_or_die(partial: folder._Partial, *error: object) -> None:
        if left[0] == 0:
            os.truncate(partial.path, partial.path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        leave(partial, *error)

    folder._Partial.__exit__ = leave_or_die


def start(job: dict, rank: int) -> int:
    """Forks one process of a job and returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(job["world"])}
        if job.get("kill_at") is not None:
            kill_while_writing(job["kill_at"])
        status = benchmark.main(job["options"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = {"world": 1} | json.loads(line)
        children = [start(job, rank) for rank in range(job["world"])]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    main()
