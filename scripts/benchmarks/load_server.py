"""Loads a server with many clients, and checks every picture.

    python scripts/benchmarks/load_server.py --clients 32 --seconds 300

Starts `lumina-mgpt serve` with the demo checkpoint, unless --url names a running server. First one client alone asks
for pairs of a prompt and a seed; its pictures are the references. Then all clients ask for random pairs at the same
time. Each answer must be the picture of its pair.

A picture that differs in a few codes is a near tie of float32: a batch of another size rounds differently. `other`
counts answers that are closer to the picture of another pair, which must not happen. `cpu_ratio` compares the
processor time of the server for an image, alone and under load; unlike `ratio`, it does not depend on other programs.
`memory_mib` is the resident memory of the server: median of the second quarter and of the second half, and the largest
of the latter. The last line is JSON. The exit status is 1 if an answer is lost or mixed up.
"""

import argparse
import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
from common import print_header, print_row
from PIL import Image

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError
from lumina_mgpt.prompt_files import example_prompts
from lumina_mgpt.resources import demo_checkpoint

_PATIENCE = 600  # seconds until an answer counts as lost
_BASELINE = 0.2  # part of the time for the client alone
_SEEDS = 4  # seeds of each prompt

Pair = tuple[str, int]  # prompt and seed


@dataclass
class Counts:
    """What the clients saw. Threads append to lists, which needs no lock."""

    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    near: list[Pair] = field(default_factory=list)
    other: list[Pair] = field(default_factory=list)
    left: list[Pair] = field(default_factory=list)


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="load_server.py", description="Loads a server with many clients, and checks every picture."
    )
    parser.add_argument("--url", help="a running server (default: starts one with the demo checkpoint)")
    parser.add_argument("--clients", type=cli.whole, default=32, help="clients at the same time")
    parser.add_argument("--seconds", type=cli.number, default=300.0, help="time of the load")
    parser.add_argument("--leave", type=cli.number, default=0.0, help="part of the requests whose client leaves early")
    parser.add_argument("--batch_size", type=cli.whole, help="batch size of the server that the script starts")
    return parser


def load(args: argparse.Namespace) -> int:
    if args.clients < 1 or args.seconds <= 0 or not 0 <= args.leave < 1:
        raise InputError("--clients must be at least 1, --seconds above 0, and --leave in 0 ... 1")
    pairs = list(itertools.product(example_prompts(demo_checkpoint()), range(_SEEDS)))
    with contextlib.nullcontext(args.url) if args.url else running_server(args.batch_size) as url:
        ask(url, pairs[0])  # loads what a first request loads
        cpu = [metric(url, "process_cpu_seconds_total")]
        references, alone = baseline(url, pairs, args.seconds * _BASELINE)
        cpu.append(metric(url, "process_cpu_seconds_total"))
        counts, memory, elapsed = storm(url, references, args)
        cpu.append(metric(url, "process_cpu_seconds_total"))
    cpu_ratio = (cpu[1] - cpu[0]) / len(references) / ((cpu[2] - cpu[1]) / max(1, len(counts.seconds)))
    return report(counts, memory, elapsed, alone, cpu_ratio, args)


@contextlib.contextmanager
def running_server(batch_size: int | None) -> Iterator[str]:
    """Starts a server and gives its URL."""
    size = [] if batch_size is None else ["--batch_size", str(batch_size)]
    line = [sys.executable, "-m", "lumina_mgpt", "serve", "--port", "0", "--device", "cpu", *size]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            found = re.search(r"http://\S+?(?=;)", process.stdout.readline())
            if found is None:
                raise InputError("the server did not start; its message is above")
            yield found[0]
        finally:
            process.terminate()


def ask(url: str, pair: Pair, patience: float = _PATIENCE) -> tuple[int, dict, dict[str, str]]:
    """Returns status, body and headers of the answer to a request for one image."""
    parts = urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=patience)) as client:
        body = json.dumps({"prompt": pair[0], "seed": pair[1]})
        client.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        answer = client.getresponse()
        return answer.status, json.loads(answer.read()), dict(answer.getheaders())


def pixels_of(body: dict) -> np.ndarray:
    """Returns the pixels of the picture in an answer. Shapes: -> (H, W, 3) int16."""
    with Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"]))) as picture:
        return np.asarray(picture, np.int16)


def baseline(url: str, pairs: list[Pair], seconds: float) -> tuple[dict[Pair, np.ndarray], float]:
    """Asks alone for pairs, at least four. Returns their pictures, and the images a second."""
    references: dict[Pair, np.ndarray] = {}
    begun = time.monotonic()
    for pair in random.Random(0).sample(pairs, len(pairs)):
        if len(references) >= 4 and time.monotonic() - begun > seconds:
            break
        status, body, _ = ask(url, pair)
        assert status == 200, body
        references[pair] = pixels_of(body)
    return references, len(references) / (time.monotonic() - begun)


def storm(
    url: str, references: dict[Pair, np.ndarray], args: argparse.Namespace
) -> tuple[Counts, list[tuple[float, float]], float]:
    """Runs all clients. Returns their counts, (seconds, MiB) of the server's memory, and the time in seconds."""
    counts, memory, begun = Counts(), list[tuple[float, float]](), time.monotonic()
    end = begun + args.seconds
    clients = [
        threading.Thread(target=client, args=(url, references, end, args.leave, number, counts))
        for number in range(args.clients)
    ]
    for thread in clients:
        thread.start()
    while any(thread.is_alive() for thread in clients):
        memory.append((time.monotonic() - begun, metric(url, "process_resident_memory_bytes") / 2**20))
        time.sleep(1)
    return counts, memory, time.monotonic() - begun


def client(url: str, references: dict[Pair, np.ndarray], end: float, leave: float, number: int, counts: Counts) -> None:
    """One client: asks for random pairs until `end`, the next after each answer."""
    choose = random.Random(number)
    while time.monotonic() < end:
        pair, begun = choose.choice(list(references)), time.monotonic()
        leaves = choose.random() < leave
        try:
            status, body, headers = ask(url, pair, choose.uniform(0.1, 2) if leaves else _PATIENCE)
        except (OSError, http.client.HTTPException, ValueError) as error:
            (counts.left if leaves else counts.lost).append(pair if leaves else repr(error))  # type: ignore[arg-type]
            continue
        if status == 429:
            counts.refused.append(status)
            time.sleep(int(headers["Retry-After"]))
        elif status != 200:
            counts.lost.append(str(body))
        else:
            counts.seconds.append(time.monotonic() - begun)
            judge(pair, pixels_of(body), references, counts)


def judge(pair: Pair, picture: np.ndarray, references: dict[Pair, np.ndarray], counts: Counts) -> None:
    """Compares a picture with the reference of its pair, and if they differ, with all references."""
    if np.array_equal(picture, references[pair]):
        return
    distances = {key: float(np.abs(picture - reference).mean()) for key, reference in references.items()}
    closest = min(distances, key=distances.__getitem__)
    (counts.near if closest == pair else counts.other).append(pair)


def metric(url: str, name: str) -> float:
    """Returns the value of a metric of the server."""
    parts = urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    found = re.search(rf"^{name} (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else float("nan")


def report(
    counts: Counts,
    memory: list[tuple[float, float]],
    elapsed: float,
    alone: float,
    cpu_ratio: float,
    args: argparse.Namespace,
) -> int:
    """Prints the results and returns the exit status."""
    if not counts.seconds:
        raise InputError(f"no request was answered: {counts.lost[:1]}; raise --seconds, or see the server's log")
    rate = len(counts.seconds) / elapsed
    half = [value for at, value in memory if at > elapsed / 2] or [memory[-1][1]]
    quarter = [value for at, value in memory if elapsed / 4 < at <= elapsed / 2] or half
    percentiles = {f"p{q}": round(float(np.percentile(counts.seconds, q)), 2) for q in (50, 90, 95, 99)}
    result = {
        "clients": args.clients,
        "seconds": round(elapsed, 1),
        "images": len(counts.seconds),
        "images_a_second": round(rate, 3),
        "alone_images_a_second": round(alone, 3),
        "ratio": round(rate / alone, 2),
        "cpu_ratio": round(cpu_ratio, 2),
        **percentiles,
        "lost": len(counts.lost),
        "other": len(counts.other),
        "near_ties": len(counts.near),
        "refused": len(counts.refused),
        "left": len(counts.left),
        "memory_mib": [round(float(np.median(quarter))), round(float(np.median(half))), round(max(half))],
    }
    print_header(*result)
    print_row(*result.values())
    for error in counts.lost[:5]:
        print(f"lost: {error}", file=sys.stderr)
    print(json.dumps(result))
    return int(bool(counts.lost or counts.other))


def main(argv: list[str] | None = None) -> int:
    return cli.run(load, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
