"""Runs trainings in processes forked from one interpreter, which start quickly.

    python tests/forked_runs.py    # reads jobs as lines of JSON, prints one line of JSON for each

A job is {"settings": {...}, "world": 1, "until": 0, "kills": 0, "chunks": false, "timeout": 0, "slow": 0}. `until`
stops after that step, as SIGTERM does; `kills` is the number of times that the run is killed by SIGKILL first, half of
them while it writes a checkpoint; `timeout` is that of collective operations, in seconds; `slow` is the number of
seconds that the last process takes longer to generate samples.
"""

import importlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

from lumina_mgpt.errors import InputError
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.training import distributed, loss, run_folder
from lumina_mgpt.training.distillation_trainer import trainer_of
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.options import TrainingConfig


def train(job: dict) -> int:
    loss.WHOLE_LOGITS = 0 if job.get("chunks") else loss.WHOLE_LOGITS
    if job.get("timeout"):
        distributed.TIMEOUT = timedelta(seconds=job["timeout"])
    processes = Processes.start("cpu")
    settings = TrainingConfig.of(**job["settings"])
    trainer = trainer_of(settings)(settings, processes)
    if job.get("slow") and processes.rank == processes.world - 1:
        generate = Pipeline.generate
        Pipeline.generate = lambda *given, **options: (time.sleep(job["slow"]), generate(*given, **options))[1]
    step = trainer._step

    def step_and_leave(began: float) -> None:
        if trainer.at + 1 == job.get("until"):
            trainer.stop = signal.SIGTERM
        step(began)

    trainer._step = step_and_leave
    trainer.run()
    processes.stop()
    return 0


def start(job: dict) -> list[int]:
    """Forks the processes of a job; returns their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world, children = job.get("world", 1), []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            status = 1
            try:
                status = train(job)
            except InputError as error:
                print(error, file=sys.stderr)
                status = 2
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return children


def kill(job: dict, number: int, chance: random.Random) -> bool:
    """Starts the run and kills it at a random moment; returns whether it was writing a checkpoint."""
    folder = Path(job["settings"]["output_dir"])
    before = run_folder.newest(folder)
    (child,) = start(job)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if number % 2 and any(folder.glob("checkpoints/.partial-*")):
            time.sleep(chance.uniform(0, 0.02))
            break
        if not number % 2 and run_folder.newest(folder) != before:
            time.sleep(chance.uniform(0, 0.1))
            break
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the run ended before it was killed: {status}"
    return any(folder.glob("checkpoints/.partial-*"))


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if job["settings"].get("lora_rank"):
            importlib.import_module("peft")  # seconds, once instead of in each process
        chance = random.Random(0)
        writing = sum(kill(job, number, chance) for number in range(job.get("kills", 0)))
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in start(job)]
        print(json.dumps({"statuses": statuses, "writing": writing}), flush=True)


if __name__ == "__main__":
    main()
