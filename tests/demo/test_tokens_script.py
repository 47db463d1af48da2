"""The demo's script that tokenizes in several processes."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image
from training_runs import environment, path_with_python

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tokenize(tiny_checkpoint, tmp_path):
    """Starts the script on six pictures, with a number of processes."""
    rows = []
    for n in range(6):
        Image.new("RGB", (64, 64), (40 * n, 0, 0)).save(tmp_path / f"{n}.png")
        rows.append({"prompt": f"picture {n}", "image_path": str(tmp_path / f"{n}.png")})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = environment() | {"PATH": path_with_python(tmp_path)}

    def start(count: int, *options: str) -> subprocess.Popen:
        command = ["scripts/demo/tokens.sh", str(count), "--in_filename", tmp_path / "rows.jsonl"]
        command += ["--out_dir", tmp_path / "tokens", "--model_path", tiny_checkpoint, "--device", "cpu", *options]
        quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=found, start_new_session=True, **quiet)

    return start


def test_each_process_tokenizes_its_part(tokenize, tmp_path):
    process = tokenize(2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    counts = [len((tmp_path / "tokens" / f"{n}-of-2-record.jsonl").read_text().splitlines()) for n in range(2)]
    assert counts == [3, 3]


def test_an_error_of_one_process_is_that_of_the_script(tokenize):
    process = tokenize(2, "--target_size", "7")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "target_size" in err


def test_the_first_process_that_fails_ends_the_others(tmp_path):
    """The script waited for its processes in turn, and left those that still ran."""
    (tmp_path / "python").write_text('#!/bin/sh\ncase "$*" in *"--rank 2") exit 2;; esac\nexec sleep 60\n')
    (tmp_path / "python").chmod(0o755)
    found = environment() | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    script = ["bash", "scripts/demo/tokens.sh"]
    process = subprocess.Popen([*script, "3"], cwd=ROOT, env=found, start_new_session=True)
    assert process.wait(timeout=30) == 2 and not members(process.pid)
    for count in ("", "0", "--help"):
        done = subprocess.run([*script, count], cwd=ROOT, env=found, capture_output=True, text=True)
        assert done.returncode == 2 and "COUNT must be a number above 0" in done.stderr


def test_a_stop_ends_all_processes(tokenize):
    process = tokenize(3)
    deadline = time.monotonic() + 60
    while len(members(process.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and not members(process.pid)


def members(session: int) -> list[int]:
    """Running processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(folder.name))
    return found
