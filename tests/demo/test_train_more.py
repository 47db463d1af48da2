"""The script of the demo's second training, and its data files."""

import os
import subprocess
import sys
from pathlib import Path

import mixture
import pytest

ROOT = Path(__file__).parents[2]
_STUB = """#!/bin/sh
if [ "$1" = -c ]; then exec {python} "$@"; fi
echo "$*" >> {log}
"""


def test_the_script_stops_at_the_end_of_its_time(tmp_path):
    """A call without time for its first stage begins nothing, and says that there is more to do."""
    command = ["bash", ROOT / "scripts/demo/train_more.sh", tmp_path]
    environment = {**os.environ, "STAGE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 3 and "give the same command again" in done.stdout, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


def test_the_data_file_lists_every_kind_once():
    text = (ROOT / "configs/data/demo_mixture.yaml").read_text()
    for kind in (*mixture.kinds(), "records", "pairs", "omni"):
        assert text.count(f"/tokens/{kind}.jsonl") == 1, kind
    assert text.count("/tokens/") == len(mixture.kinds()) + 3


def test_the_data_file_of_the_first_stage_names_sources_of_the_other():
    lines = (ROOT / "configs/data/demo_core.yaml").read_text().splitlines()
    whole = (ROOT / "configs/data/demo_mixture.yaml").read_text()
    sources = [line.rpartition(", weight")[0] for line in lines if "/tokens/" in line]
    assert sources and all(f"{source}, " in whole for source in sources)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_device_gets_its_options(tmp_path, device):
    """All that comes before the trainings has ended; a script in the place of Python writes down its options."""
    log, program, work = tmp_path / "log", tmp_path / "bin" / "python", tmp_path / "work"
    program.parent.mkdir()
    program.write_text(_STUB.format(python=sys.executable, log=log))
    program.chmod(0o755)
    (work / "records").mkdir(parents=True)
    (work / "drawn" / "00").mkdir(parents=True)
    (work / "processes").write_text("1")
    names = ["records", "omni", "pairs", "two"]
    for name in names:
        (work / ("records" if name == "two" else "") / f"{name}.jsonl").write_text("{}\n")
    ended = ["data", "data_omni", "records", "start"]
    ended += [f"decisions_{name}" for name in ("detect", "detect_absent", "unknown")]
    for name in ended + [f"{part}_{name}" for part in ("tokens", "concat") for name in names]:
        (work / f"{name}.done").touch()
    environment = {**os.environ, "DEVICE": device, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    command = ["bash", ROOT / "scripts/demo/train_more.sh", work]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    decoder, *trainings, publish = log.read_text().splitlines()
    assert "train-movqgan" in decoder and f"--device {device} " in decoder and "publish.py" in publish
    assert [line.split("--output_dir ")[1].split()[0].rpartition("/")[2] for line in trainings] == [
        "core",
        "learn",
        "last",
    ]
    for line in trainings:
        assert f"--device {device} " in line and ("--compile" in line) == (device == "cpu")
        assert f"--max_tokens {65536 if device == 'cuda' else 6144} " in line
