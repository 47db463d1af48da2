"""Generates images in processes that hold one model together, forked from one interpreter, which start quickly.

    python tests/parallel_runs.py    # reads jobs as lines of JSON, prints one line of JSON for each

A job is {"world": 2, "size": 2, "folder": "...", "requests": [{...}, ...], "cache": "int8", "dtype": "float64"}. Each
request holds arguments of `Pipeline.generate`; `speculation` are those of a `Speculation`, `panel` is a file and `task`
a key of I2I_TASKS. The request {"logits": ids} asks for the logits after these ids. The job {"command": [...]} runs a
command of `lumina-mgpt` instead. With "dies": 1, process 1 ends when it has joined the others.

The line has "statuses", the exit status of each process, "processes", its results, and "printed", what all printed.
"""

import json
import os
import socket
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch
import torch._dynamo  # which torch.distributed.tensor imports at its first use; not part of what is measured
import torch.distributed.tensor.parallel  # takes seconds, here once for all processes
from PIL import Image

from lumina_mgpt import cli
from lumina_mgpt.cli.main import main as run_command
from lumina_mgpt.config import Speculation
from lumina_mgpt.measure import peak_anonymous
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.parallel import Parallel
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.prompts import I2I_TASKS

CPU = torch.device("cpu")


def load(job: dict, parallel: Parallel | None = None) -> Pipeline:
    dtype, cache = (getattr(torch, name) for name in (job.get("dtype", "float64"), job.get("cache", "float64")))
    return Pipeline.from_pretrained(job["folder"], CPU, dtype, cache_dtype=cache, parallel=parallel)


@torch.no_grad()
def results_of(pipeline: Pipeline, request: dict) -> list:
    """The codes of all images of a request, or the logits after its ids."""
    settings = dict(request)
    if "logits" in settings:
        ids = torch.tensor(settings["logits"])
        cache = KVCache(pipeline.model.config, *ids.shape, pipeline.cache_dtype, CPU)
        hidden = pipeline.model(ids, cache=cache)
        return pipeline.model.project(hidden, pipeline.checkpoint.vocabulary.code_slice).tolist()
    if "speculation" in settings:
        settings["speculation"] = Speculation(**settings["speculation"])
    if "panel" in settings:
        settings |= {"panel": Image.open(settings["panel"]), "task": I2I_TASKS[settings["task"]]}
    return [result.codes.tolist() for result in pipeline.generate(**settings)]


def measured(job: dict, parallel: Parallel | None) -> tuple[Pipeline, dict]:
    """Loads a pipeline and fills a cache of two rows and `length` ids.

    Returns the pipeline, and the bytes of weights and cache and the rise of the peak of memory.
    """
    with peak_anonymous(0.002) as peak:
        while not peak[0]:
            time.sleep(0.001)
        before = peak[0]
        pipeline = load(job, parallel)
        cache = KVCache(pipeline.model.config, 2, job.get("length", 1), pipeline.cache_dtype, CPU)
        for tensor in cache.tensors():
            tensor.fill_(1)  # the system gives memory when it is written
        time.sleep(0.01)
        figures = {
            "weights": sum(parameter.nbytes for parameter in pipeline.model.parameters()),
            "cache": sum(tensor.nbytes for tensor in cache.tensors()),
            "peak": peak[0] - before,
        }
    return pipeline, figures


def work(job: dict, results: Path) -> None:
    with Parallel.start(CPU, job["size"]) if job["size"] > 1 else nullcontext() as parallel:
        if parallel and job.get("dies") == parallel.rank:
            os._exit(9)
        pipeline, figures = measured(job, parallel)
        figures["results"] = [results_of(pipeline, request) for request in job.get("requests", ())]
        results.write_text(json.dumps(figures))


def start(job: dict, folder: str) -> list[int]:
    """Forks the processes of a job; returns their ids. Each writes its results to a file in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(job["world"]):
        child = os.fork()
        if child == 0:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world"], "MASTER_PORT": port}
            os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
            status = 1
            try:
                output = os.open(Path(folder, "printed"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                if "command" in job:
                    status = run_command(job["command"])
                else:
                    status = cli.run(lambda _: work(job, Path(folder, f"{rank}.json")), cli.Parser(), [])  # noqa: B023
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return children


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in start(job, folder)]
            processes = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
            printed = Path(folder, "printed").read_text()
            print(json.dumps({"statuses": statuses, "processes": processes, "printed": printed}), flush=True)


if __name__ == "__main__":
    main()
