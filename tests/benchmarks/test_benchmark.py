"""`lumina-mgpt benchmark`: layouts, continuing after a kill, several processes, and refused reruns."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import PATIENCE, ROOT, environment, main_of
from PIL import Image

from lumina_mgpt import Pipeline
from lumina_mgpt.benchmarks.folder import BenchmarkFolder, tile
from lumina_mgpt.benchmarks.manifest import hashes

SMALL = ("--device", "cpu", "--width", "32", "--height", "32")


@pytest.fixture
def lists(tmp_path) -> dict[str, Path]:
    """A list of three prompts for each benchmark."""
    prompts = ("a hedgehog", "a red apple", "a cat on a mat")
    rows = [{"tag": "x", "include": [{"class": "cat", "count": 1}], "prompt": prompt} for prompt in prompts]
    paths = {name: tmp_path / f"{name}.list" for name in ("geneval", "dpg", "compbench", "parti")}
    paths["geneval"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths["compbench"].write_text("\n".join(prompts))
    header = "Prompt\tCategory\tChallenge\tNote\n"
    paths["parti"].write_text(header + "".join(f"{prompt}\tAnimals\tBasic\t\n" for prompt in prompts))
    paths["dpg"].mkdir()
    for number, prompt in enumerate(prompts):
        (paths["dpg"] / f"item{number}.txt").write_text(prompt)
    return paths


@pytest.fixture
def run(tiny_checkpoint, lists, tmp_path):
    """Runs a benchmark in this process, into `out`, and returns its exit status."""
    main = main_of("benchmark")

    def call(name: str, *options: object) -> int:
        fixed = ["--prompts", lists[name], "--save_path", tmp_path / "out", "--model_path", tiny_checkpoint, *SMALL]
        return main([name, *map(str, [*fixed, *options])])

    return call


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def test_geneval(run, lists, tiny_checkpoint, tmp_path, capsys):
    """The files that the official scorer reads, and the images of `generate`."""
    assert run("geneval", "-n", 2, "--seed", 5) == 0
    out = tmp_path / "out"
    lines = lists["geneval"].read_text().splitlines(keepends=True)
    assert files(out) == {"manifest.json"} | {
        f"{index:05d}/{name}"
        for index in range(3)
        for name in ("metadata.jsonl", "grid.png", "samples/0000.png", "samples/0001.png")
    }
    assert [(out / f"{index:05d}/metadata.jsonl").read_text() for index in range(3)] == lines
    results = Pipeline.from_pretrained(tiny_checkpoint, "cpu").generate(
        ["a hedgehog", "a red apple", "a cat on a mat"], 32, 32, n=2, seed=5
    )
    for result in results:
        path = out / f"{result.job.prompt_index:05d}/samples/{result.job.repeat:04d}.png"
        assert np.array_equal(pixels(path), np.array(result.image))
        text = Image.open(path).text
        assert (text["prompt"], text["repeat"]) == (result.job.prompt, str(result.job.repeat))
        assert (text["seed"], text["benchmark"]) == ("5", "GenEval")
    first, second = (pixels(out / f"00001/samples/000{number}.png") for number in range(2))
    assert np.array_equal(pixels(out / "00001/grid.png"), np.hstack([first, second]))


def test_dpg_tiles_four_images(run, tmp_path):
    assert run("dpg") == 0
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.png")} == {"item0.png", "item1.png", "item2.png"}
    parts = [pixels(out / f"samples/item1_{number}.png") for number in range(4)]
    whole = pixels(out / "item1.png")
    for part, (top, left) in zip(parts, ((0, 0), (0, 32), (32, 0), (32, 32)), strict=True):
        assert np.array_equal(whole[top : top + 32, left : left + 32], part)


def test_dpg_refuses_images_that_are_not_square(run, capsys):
    assert run("dpg", "--height", 64) == 2
    assert "--width must equal the height for DPG-Bench, got 32 x 64" in capsys.readouterr().err


def test_compbench_numbers_all_images(run, tmp_path):
    assert run("compbench", "-n", 2) == 0
    names = files(tmp_path / "out/samples")  # the scorers list this folder and split each name
    assert sorted((int(name.split("_")[-1].split(".")[0]), name.split("_")[0]) for name in names) == [
        (0, "a hedgehog"), (1, "a hedgehog"), (2, "a red apple"), (3, "a red apple"), (4, "a cat on a mat"),
        (5, "a cat on a mat"),
    ]  # fmt: skip


def test_parti_writes_an_index(run, tmp_path):
    assert run("parti") == 0
    rows = [line.split("\t") for line in (tmp_path / "out/index.tsv").read_text().splitlines()]
    assert rows[0] == ["File", "Prompt", "Category", "Challenge", "Note"]
    assert rows[2] == ["00001.png", "a red apple", "Animals", "Basic", ""]
    assert all((tmp_path / "out" / row[0]).is_file() for row in rows[1:])


def test_both_families_choose_the_best(run, oracle_v1_checkpoint, tiny_checkpoint, tmp_path):
    """`own` of each family; the best of N is an image of a run with N times as many."""
    for checkpoint, scorer in ((oracle_v1_checkpoint("image"), "own, reading"), (tiny_checkpoint, "own, bayes")):
        out = tmp_path / scorer
        where = ("--model_path", checkpoint, "--save_path", out)
        assert run("parti", *where, "-n", 2, "--best_of", 2) == 0
        with Image.open(out / "00001_01.png") as image:
            text, chosen = image.text, pixels(out / "00001_01.png")
        scores = json.loads(text["candidates"])
        assert text["scorer"] == scorer and list(scores) == ["2", "3"]
        assert scores[text["repeat"]] == max(scores.values()) == float(text["score"])
        assert json.loads((out / "manifest.json").read_text())["settings"]["scorer"] == scorer
        prompts = [line.split("\t")[1] for line in (out / "index.tsv").read_text().splitlines()[1::2]]
        results = Pipeline.from_pretrained(checkpoint, "cpu").generate(prompts, 32, 32, n=4)
        assert np.array_equal(chosen, np.array(results[4 + int(text["repeat"])].image))


def test_done_images_are_not_made_again(run, tmp_path, monkeypatch, capsys):
    """A run that lacks an image, has one cut short and a tile cut short makes these alone, with the same pixels."""
    assert run("geneval", "-n", 2) == 0
    out = tmp_path / "out"
    missing, short, grid = (
        out / name for name in ("00000/samples/0001.png", "00001/samples/0000.png", "00002/grid.png")
    )
    before = {path: pixels(path) for path in (missing, short, grid)}
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("0*.png") if path not in before}
    missing.unlink()
    for path in (short, grid):
        path.write_bytes(path.read_bytes()[:-20])
    jobs = []
    stream = Pipeline.stream

    def watched(self, request, on_row=None, *, jobs_=jobs, **options):
        jobs_ += [(job.prompt_index, job.repeat) for job in options["jobs"]]
        return stream(self, request, on_row, **options)

    monkeypatch.setattr(Pipeline, "stream", watched)
    assert run("geneval", "-n", 2) == 0
    assert jobs == [(0, 1), (1, 0)] and "4 are done already" in capsys.readouterr().out
    assert all(np.array_equal(pixels(path), image) for path, image in before.items())
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    monkeypatch.setattr(Pipeline, "from_pretrained", None)  # no weights are loaded for nothing
    assert run("geneval", "-n", 2) == 0 and "6 are done already" in capsys.readouterr().out


def test_another_setting_is_refused(run, lists, tmp_path, capsys):
    assert run("parti", "--seed", 1) == 0
    before = (tmp_path / "out/manifest.json").read_bytes()
    capsys.readouterr()
    for options, part in (
        (("--seed", 2), "seed was 1, is 2"),
        (("--seed", 1, "-n", 2), "images_a_prompt was 1, is 2"),
        (("--seed", 1, "--speculative_jacobi", "--window", 4), "window was not there, is 4"),
        (("--seed", 1, "--best_of", 2), "best_of was not there, is 2"),
        (("--seed", 1, "--cfg", 2, "--top_k", 7), "cfg was 4.0, is 2.0; top_k was 64, is 7"),
    ):
        assert run("parti", *options) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1, error
    lists["parti"].write_text(lists["parti"].read_text() + "one more\tA\tB\t\n")
    assert run("parti", "--seed", 1) == 2 and "list sha256 was" in capsys.readouterr().err
    assert (tmp_path / "out/manifest.json").read_bytes() == before


def test_other_weights_are_refused(tiny_checkpoint, lists, tmp_path, run, capsys):
    assert run("parti") == 0
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run("parti", "--model_path", other) == 2
    assert "checkpoint model.safetensors was" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/holiday.png").write_bytes(b"")
    assert run("parti") == 2
    assert "--save_path" in (error := capsys.readouterr().err) and "holiday.png" in error


@pytest.fixture(scope="module")
def run_forked():
    """Runs one job of `forked_benchmarks.py` and returns the exit statuses."""
    command = [sys.executable, ROOT / "tests/forked_benchmarks.py"]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )

    def run(*options: object, **job: object) -> list[int]:
        print(json.dumps({"options": list(map(str, options)), **job}), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    assert server.wait(PATIENCE) == 0


def test_a_killed_run_continues(tiny_checkpoint, lists, tmp_path, run, run_forked):
    """A run is killed while it writes the manifest, the list, images and tiles, until nothing is left to write."""
    assert run("geneval", "-n", 2) == 0
    out, alone = tmp_path / "killed", tmp_path / "out"
    options = ("geneval", "--prompts", lists["geneval"], "--save_path", out, "--model_path", tiny_checkpoint, *SMALL)
    for kill_at in (0, 1, 3, 2, 2, 3, 4):  # of the files that this run still has to write; the first is a probe
        assert run_forked(*options, "-n", 2, kill_at=kill_at) == [-signal.SIGKILL]
        for path in out.glob("0*/**/*.png"):  # complete, or not there
            assert np.array_equal(pixels(path), pixels(alone / path.relative_to(out)))
    assert run_forked(*options, "-n", 2) == [0]
    assert {name for name in files(out) if not name.startswith(".part/")} == files(alone)


def test_a_stopped_run_says_how_to_continue(run, monkeypatch, tmp_path, capsys):
    save = BenchmarkFolder.save_image

    def save_and_stop(folder, item, *image):
        save(folder, item, *image)
        if item.index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(BenchmarkFolder, "save_image", save_and_stop)
    assert run("parti", "--batch_size", 1) == 130
    message = f"1 of 3 images are in {tmp_path / 'out'}; the same command continues"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/00002.png").exists()


def test_two_processes_make_the_files_of_one(tiny_checkpoint, lists, tmp_path, run, run_forked):
    assert run("dpg", "-n", 3) == 0
    both, alone = tmp_path / "both", tmp_path / "out"
    options = ("dpg", "--prompts", lists["dpg"], "--save_path", both, "--model_path", tiny_checkpoint, *SMALL)
    assert run_forked(*options, "-n", 3, world=2) == [0, 0]
    assert files(both) == files(alone)
    for name in files(alone) - {"manifest.json"}:
        assert np.array_equal(pixels(both / name), pixels(alone / name)), name


def test_the_second_process_may_be_done_before_the_first_starts(run, lists, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert run("geneval", "-n", 1) == 0
    assert len(list((tmp_path / "out").glob("0*/samples/0000.png"))) == 3


def test_files_of_one_name_have_two_checksums(tmp_path):
    paths = [tmp_path / "model.safetensors", tmp_path / "movqgan/model.safetensors"]
    paths[1].parent.mkdir()
    for path in paths:
        path.write_text(str(path))
    assert sorted(hashes(paths)) == sorted(map(str, paths))
    assert list(hashes(paths[:1])) == ["model.safetensors"]


def test_malformed_lists_are_one_line(run, lists, capsys):
    lists["geneval"].write_text('{"prompt": "a cat"}\n')
    assert run("geneval") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --prompts {lists['geneval']}, line 1 ") and error.count("\n") == 1


@pytest.mark.parametrize(("images", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (5, (2, 3)), (10, (3, 4))])
def test_tiles(images, shape):
    parts = [Image.new("RGB", (4, 2), (number + 1,) * 3) for number in range(images)]
    whole = np.array(tile(parts))
    assert whole.shape == (shape[0] * 2, shape[1] * 4, 3)
    cells = whole.reshape(shape[0], 2, shape[1], 4, 3)[:, 0, :, 0, 0].flatten().tolist()
    assert cells == [*range(1, images + 1), *[0] * (shape[0] * shape[1] - images)]


def test_a_folder_that_cannot_be_made_is_one_line(run, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert run("parti") == 2
    assert "cannot be written" in (error := capsys.readouterr().err) and error.count("\n") == 1
