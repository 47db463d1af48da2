"""Damaged files of a training checkpoint are detected when a run resumes and when it is exported."""

import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import pytest
from commands import main_of, options_of

finetune, export = main_of("finetune"), main_of("export")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokens, tiny_checkpoint):
    """A run of two steps, and its command line without --output_dir."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    start = {"data_config": tokens, "init_from": tiny_checkpoint}
    line = options_of(**start, batch_size=4, precision="fp32", on_nonfinite="skip", ema=0.5)
    assert finetune([*line, "--output_dir", str(folder), "--max_steps", "2"]) == 0
    return folder, line


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run, its checkpoint, and a function that goes on with it: returns the exit status."""
    shutil.copytree(trained[0], tmp_path / "run")

    def go(steps: int = 3) -> int:
        return finetune(
            [*trained[1], "--output_dir", str(tmp_path / "run"), "--max_steps", str(steps), "--resume", "auto"]
        )

    return tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000002", go


def error_of(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def as_an_earlier_version_wrote_it(checkpoint: Path) -> dict:
    """Removes the checksums; returns the state."""
    (checkpoint / "SHA256SUMS").unlink(missing_ok=True)
    state = json.loads((checkpoint / "trainer.json").read_text())
    for key in ("checksums", "base"):
        state.pop(key, None)
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    return state


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "trainer.json", "SHA256SUMS"])
def test_a_flipped_bit_is_detected(run, tmp_path, capsys, name):
    """At b0c7d2f a run went on with the changed weights."""
    folder, checkpoint, go = run
    data = (checkpoint / name).read_bytes()
    for position in (len(data) // 3, len(data) // 2, len(data) - 40):
        (checkpoint / name).write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert go() == 2
        assert name in error_of(capsys)
    assert export(["--output_dir", str(folder), "--save_path", str(tmp_path / "out")]) == 2
    assert name in error_of(capsys) and not (tmp_path / "out").exists()
    (checkpoint / name).write_bytes(data)
    assert go() == 0


def test_missing_and_additional_files_are_named(run, capsys):
    _, checkpoint, go = run
    (checkpoint / "__1_0.distcp").write_bytes(b"")
    assert go() == 2 and "__1_0.distcp does not belong to the checkpoint" in error_of(capsys)
    (checkpoint / "__1_0.distcp").unlink()
    (checkpoint / "__0_0.distcp").rename(checkpoint.parent / "away")
    assert go() == 2 and "__0_0.distcp is missing" in error_of(capsys)
    (checkpoint.parent / "away").rename(checkpoint / "__0_0.distcp")
    (checkpoint / "SHA256SUMS").unlink()
    assert go() == 2 and "SHA256SUMS is missing" in error_of(capsys)


def test_a_checkpoint_without_checksums_is_read_with_a_warning(run, capsys):
    _, checkpoint, go = run
    as_an_earlier_version_wrote_it(checkpoint)
    assert go() == 0
    assert "without checksums: damage to it is not detected" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["step", "epoch", "done", "elapsed", "tokens", "ema", "identity", "model", "settings"])
def test_a_state_without_a_key_or_of_another_type_is_named(run, tmp_path, capsys, key):
    """At b0c7d2f: KeyError and TypeError with a traceback."""
    folder, checkpoint, go = run
    state = as_an_earlier_version_wrote_it(checkpoint)
    wrongs = [{k: v for k, v in state.items() if k != key}, state | {key: "3"}, state | {key: None}]
    for wrong in (*wrongs, state | {key: -1}):
        (checkpoint / "trainer.json").write_text(json.dumps(wrong))
        assert go() == 2
        error = error_of(capsys)
        assert "trainer.json" in error and repr(key) in error
        assert export(["--output_dir", str(folder), "--save_path", str(tmp_path / "out")]) == 2
        assert repr(key) in error_of(capsys)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {}},
        {"settings": {"batch": 1}},
        {"model": {}},
        {"model": {"hidden_size": "64"}},
        {"model": {"hidden_size": 2.5}},
        {"model": {"colour": 1}},
        {"guard": {"norms": "x"}},
        {"guard": {"norms": [None]}},
        {"guard": {"in_a_row": []}},
        {"done": 10**6},
        {"step": 10**30},
    ],
)
def test_a_state_with_wrong_values_is_refused(run, tmp_path, capsys, change):
    folder, checkpoint, go = run
    state = as_an_earlier_version_wrote_it(checkpoint)
    ((key, value),) = change.items()
    if isinstance(value, dict) and value:
        value = state[key] | value
    (checkpoint / "trainer.json").write_text(json.dumps(state | {key: value}))
    status = export(["--output_dir", str(folder), "--save_path", str(tmp_path / "out")])
    if key not in ("done",):
        assert status == 2 and "trainer.json" in error_of(capsys)
    if key not in ("settings", "model"):
        assert go() == 2 and "remove the checkpoint" in error_of(capsys)


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"[1]", b"\xff", b"[" * 20000, b'{"step": ' + b"1" * 5000 + b"}"])
def test_a_state_that_is_not_json_is_refused(run, capsys, content):
    _, checkpoint, go = run
    as_an_earlier_version_wrote_it(checkpoint)
    (checkpoint / "trainer.json").write_bytes(content)
    assert go() == 2 and "trainer.json" in error_of(capsys)


def test_zero_bytes_after_a_power_loss_do_not_end_a_resume(run):
    """At b0c7d2f: json.decoder.JSONDecodeError for metrics.jsonl; zero bytes stayed in bad_steps.jsonl."""
    folder, _, go = run
    bad = '{"step": 1, "reason": "x", "samples": []}\n'
    (folder / "bad_steps.jsonl").write_bytes(bad.encode() + b"\0" * 300)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\0" * 300)
    assert go() == 0
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert (folder / "bad_steps.jsonl").read_text() == bad


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_from_elsewhere_runs_no_code(run, tmp_path, capsys):
    """At b0c7d2f torch unpickled `.metadata` without any limit, which made the file."""
    folder, checkpoint, go = run
    as_an_earlier_version_wrote_it(checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "made")))
    assert go() == 2 and "asks for io.open" in error_of(capsys)
    assert export(["--output_dir", str(folder), "--save_path", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "made").exists()


# -- exports are whole or absent ---------------------------------------------------------------------------------------


def adapter_run(trained, tmp_path) -> Path:
    line = [*trained[1][:-2], "--output_dir", str(tmp_path / "lora"), "--max_steps", "1", "--lora_rank", "2"]
    assert finetune(line) == 0
    return tmp_path / "lora"


@pytest.mark.parametrize("adapter", [False, True])
def test_an_export_to_a_full_disk_leaves_nothing(trained, tmp_path, capsys, monkeypatch, adapter):
    """At b0c7d2f: a SafetensorError with a traceback for the adapter, and a folder with half of the files."""
    if adapter and not importlib.util.find_spec("peft"):
        pytest.skip("needs peft")
    resource = pytest.importorskip("resource")
    folder = adapter_run(trained, tmp_path) if adapter else trained[0]
    line = ["--output_dir", str(folder), "--save_path", str(tmp_path / "new" / "out"), *["--adapter"] * adapter]
    capsys.readouterr()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        status = export(line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert status == 2
    assert "--save_path" in (error := error_of(capsys)) and "cannot be written" in error and ".part" not in error
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    line[3] = str(tmp_path / "file" / "out")
    assert export(line) == 2 and "--save_path" in error_of(capsys)
    line[3] = str(tmp_path / "new" / "out")
    assert export(line) == 0 and [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
