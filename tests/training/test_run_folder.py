"""Going back to an earlier checkpoint, on the command line."""

import json
import os
import shutil

import pytest
from commands import main_of, options_of
from safetensors.torch import load_file

finetune = main_of("finetune")


@pytest.fixture(scope="module")
def eight(tmp_path_factory, tokens, tiny_checkpoint):
    """A run of eight steps with checkpoints 4 and 8, and its command line."""
    folder = tmp_path_factory.mktemp("eight") / "run"
    start = {"data_config": tokens, "init_from": tiny_checkpoint}
    line = options_of(**start, batch_size=4, precision="fp32", dropout=0, export_dtype="fp32", lr=1e-3)
    line += ["--save_iteration_interval"]
    options = ["--sample_every", "4", "--sample_prompts", str(tiny_checkpoint / "prompts.txt")]
    assert finetune([*line, "4", "--output_dir", str(folder), "--max_steps", "8", *options]) == 0
    return folder, line


@pytest.fixture
def run(eight, tmp_path):
    """A copy of that run, and a function that resumes it and returns the exit status."""
    shutil.copytree(eight[0], tmp_path / "run")

    def go(*options: str) -> int:
        return finetune([*eight[1], "1", "--output_dir", str(tmp_path / "run"), *options])

    return tmp_path / "run", go


def steps_of(folder) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other) -> bool:
    return all((value == other[name]).all() for name, value in one.items())


def back(folder, step: int) -> list[str]:
    return ["--resume", str(folder / "checkpoints" / f"step-{step:08d}")]


def test_going_back_keeps_the_new_checkpoints_and_exports_them(run, eight, capsys):
    """At b0c7d2f the rotation removed each new checkpoint, and the export was that of the abandoned step 8."""
    folder, go = run
    assert go(*back(folder, 4), "--lr", "2e-3", "--max_steps", "7", "--keep_checkpoints", "1") == 0
    assert steps_of(folder) == [7]
    assert not same(weights(folder / "export"), weights(eight[0] / "export"))
    assert "later checkpoints and samples are now in" in capsys.readouterr().err
    aside = folder / "checkpoints" / "set_aside-1"
    assert (aside / "step-00000008" / "trainer.json").is_file() and (aside / "samples" / "step-00000008").is_dir()
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == 8
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 8)) and rows[-1]["lr"] < rows[4]["lr"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-00000000", "step-00000004"]


def test_a_later_resume_goes_on_with_the_new_branch(run):
    """At b0c7d2f `--resume auto` took the abandoned step 8 and said that the run is done."""
    folder, go = run
    assert go(*back(folder, 4), "--max_steps", "7", "--keep_checkpoints", "3") == 0
    assert steps_of(folder) == [5, 6, 7]
    before = weights(folder / "export")
    assert go("--resume", "auto", "--max_steps", "8", "--keep_checkpoints", "3") == 0
    assert steps_of(folder) == [6, 7, 8]
    assert not same(before, weights(folder / "export"))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 8


def test_going_back_twice_keeps_both_branches(run):
    folder, go = run
    for lr in ("2e-3", "3e-3"):
        assert go(*back(folder, 4), "--lr", lr, "--max_steps", "6", "--keep_checkpoints", "9") == 0
    assert steps_of(folder) == [4, 5, 6]
    asides = [{path.name for path in (folder / "checkpoints" / f"set_aside-{n}").glob("step-*")} for n in (1, 2)]
    assert asides == [{"step-00000008"}, {"step-00000005", "step-00000006"}]


def test_going_back_to_the_end_exports_that_step(run, eight, tmp_path):
    folder, go = run
    assert go(*back(folder, 4), "--max_steps", "4") == 0
    export = ["--output_dir", str(eight[0]), "--save_path", str(tmp_path / "four"), "--step", "4", "--dtype", "fp32"]
    assert main_of("export")(export) == 0
    assert same(weights(folder / "export"), weights(tmp_path / "four"))


def test_a_refused_resume_moves_nothing(run):
    folder, go = run
    assert go(*back(folder, 4), "--max_steps", "7", "--seed", "1") == 2
    assert steps_of(folder) == [4, 8] and not list((folder / "checkpoints").glob("set_aside-*"))


@pytest.mark.parametrize("call", range(1, 5))
def test_going_back_completes_after_a_kill(run, eight, monkeypatch, call):
    """Killed before each of the moves, the next `--resume auto` goes on from the step gone back to."""
    folder, go = run
    shutil.copytree(folder / "checkpoints" / "step-00000008", folder / "checkpoints" / "step-00000006")
    calls = {"n": 0}

    def killed(real):
        def do(*args):
            if "going_back" in str(args) or "set_aside" in str(args):
                calls["n"] += 1
                if calls["n"] == call:
                    raise KeyboardInterrupt
            return real(*args)

        return do

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed(os.replace))
        patch.setattr(os, "rename", killed(os.rename))
        go(*back(folder, 4), "--max_steps", "7", "--keep_checkpoints", "9")
    assert calls["n"] == call
    begun = (folder / "checkpoints" / "going_back.json").exists()
    assert begun == (call > 1)
    assert go(*(["--resume", "auto"] if begun else back(folder, 4)), "--max_steps", "7", "--keep_checkpoints", "9") == 0
    assert steps_of(folder) == [4, 5, 6, 7]
    names = {path.name for path in (folder / "checkpoints" / "set_aside-1").iterdir()}
    assert names == {"metrics.jsonl", "samples", "step-00000006", "step-00000008"}
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 8))


def test_a_checkpoint_of_another_folder_does_not_mix_with_a_run(run, eight, tmp_path, capsys):
    """At b0c7d2f its steps were added to the folder's own, and the highest number was exported."""
    folder, go = run
    assert go(*back(eight[0], 4), "--max_steps", "7") == 2
    assert "is not one of the checkpoints of --output_dir" in capsys.readouterr().err
    assert steps_of(folder) == [4, 8]
    line = [*eight[1], "0", "--output_dir", str(tmp_path / "new"), "--max_steps", "5"]
    assert finetune([*line, *back(eight[0], 4)]) == 0
    assert steps_of(tmp_path / "new") == [5]


def test_a_copied_folder_is_not_the_newest_checkpoint(run):
    """A user's `step-00000009-copy` was taken for the newest, and removed by the rotation."""
    folder, go = run
    copy = folder / "checkpoints" / "step-00000009-copy"
    shutil.copytree(folder / "checkpoints" / "step-00000004", copy)
    assert go("--resume", "auto", "--max_steps", "10", "--keep_checkpoints", "1") == 0
    assert copy.is_dir() and sorted(path.name for path in copy.parent.iterdir()) == [
        "step-00000009-copy",
        "step-00000010",
    ]


def test_a_checkpoint_whose_name_is_wrong_is_refused(run, capsys):
    folder, go = run
    (folder / "checkpoints" / "step-00000004").rename(folder / "checkpoints" / "step-00000009")
    assert go("--resume", "auto", "--max_steps", "12") == 2
    assert "holds step 4, which is not its name" in capsys.readouterr().err


@pytest.mark.parametrize("note", ["", "{}", '{"to": "step-00000004", "aside": "../x"}', "[" * 20000])
def test_a_damaged_note_of_going_back_names_the_right_remedy(run, capsys, note):
    """Removing the note alone would go on with the abandoned branch."""
    folder, go = run
    (folder / "checkpoints" / "going_back.json").write_text(note)
    assert go("--resume", "auto", "--max_steps", "9") == 2
    assert "remove it, and all checkpoints later than the one to go on from" in capsys.readouterr().err
