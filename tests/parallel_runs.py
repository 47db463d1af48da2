"""Generates images in processes that hold one model together, forked from one interpreter, which start quickly.

    python tests/parallel_runs.py    # reads jobs as lines of JSON, prints one line of JSON for each

A job is {"world": 2, "size": 2, "folder": "...", "dtype": "float64", "requests": [{...}, ...]}: each request holds
arguments of `Pipeline.generate`, and `speculation` is that of a `Speculation`. A request may have "logits" instead: ids
whose logits are wanted. The line has the exit status and the results of each process: codes, or logits, for each
request; the bytes of its weights, and of the cache of the last request.
"""

import json
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed.tensor.parallel  # seconds, once instead of in each process
from PIL import Image

from lumina_mgpt.config import Speculation
from lumina_mgpt.devices import own_device
from lumina_mgpt.errors import InputError
from lumina_mgpt.measure import peak_anonymous
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.parallel import Parallel
from lumina_mgpt.pipeline import Pipeline


@torch.no_grad()
def results_of(pipeline: Pipeline, request: dict) -> list:
    """The codes of all images of a request, or the logits after its ids."""
    if "logits" in request:
        ids = torch.tensor(request["logits"])
        hidden = pipeline.model(ids, cache=new_cache(pipeline, *ids.shape))
        return pipeline.model.project(hidden, pipeline.checkpoint.vocabulary.code_slice).tolist()
    settings = dict(request)
    if "speculation" in settings:
        settings["speculation"] = Speculation(**settings["speculation"])
    if "panel" in settings:
        settings["panel"] = Image.open(settings["panel"])
    if "task" in settings:
        from lumina_mgpt.prompts import I2I_TASKS

        settings["task"] = I2I_TASKS[settings["task"]]
    return [result.codes.tolist() for result in pipeline.generate(**settings)]


def new_cache(pipeline: Pipeline, rows: int, length: int) -> KVCache:
    return KVCache(pipeline.model.config, rows, length, pipeline.cache_dtype, pipeline.device)


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def work(job: dict) -> dict:
    size = job["size"]
    dtype = getattr(torch, job.get("dtype", "float64"))
    with Parallel.start(own_device("cpu"), size) as parallel, peak_anonymous(0.005) as peak:
        before = peak[0]
        pipeline = Pipeline.from_pretrained(job["folder"], "cpu", dtype, parallel=parallel)
        cache = new_cache(pipeline, 2, job.get("length", 1))
        loaded = peak[0] - before
        return {
            "results": [results_of(pipeline, request) for request in job.get("requests", ())],
            "weights": bytes_of(pipeline.model.parameters()),
            "cache": bytes_of(cache.tensors()),
            "loaded": loaded,
            "rank": parallel.rank,
        }


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
                Path(folder, f"{rank}.json").write_text(json.dumps(work(job)))
                status = 0
            except InputError as error:
                print(error, file=sys.stderr)
                status = 2
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
            files = sorted(Path(folder).glob("*.json"))
            print(json.dumps({"statuses": statuses, "processes": [json.loads(f.read_text()) for f in files]}), flush=True)


if __name__ == "__main__":
    main()
