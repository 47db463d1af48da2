"""Commands with unusual streams, paths, names, prompts, environments, signals and leftover files."""

import contextlib
import io
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import PATIENCE, environment, line_of, main_of
from PIL import Image

from lumina_mgpt.outputs import OutputFolder

SMALL = ("--device", "cpu", "--width", "32", "--height", "32")
PAIR = ("--device", "cpu", "--width", "32", "--height", "64")
NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights are read."""
    for name in ("pipeline.load_model", "vqgan.tokenizer.ImageTokenizer.from_checkpoint"):
        monkeypatch.setattr(f"lumina_mgpt.{name}", lambda *_, **__: pytest.fail("the work began"))


@pytest.fixture
def run(tiny_checkpoint, here):
    """Runs a command with the tiny checkpoint; results go to `out`, later options override earlier ones."""
    model = ("--model_path", str(tiny_checkpoint), "--save_path", "out")

    def call(name: str, *options: object) -> int:
        size = {"generate": SMALL, "edit": PAIR}.get(name, ("--device", "cpu"))
        return main_of(name)([*size, *model, *map(str, options)])

    return call


@pytest.fixture
def argv(here, monkeypatch):
    """Runs a command with sys.argv."""

    def call(name: str, *options: object) -> int:
        monkeypatch.setattr("sys.argv", [name, *map(str, options)])
        return main_of(name)()

    return call


def picture(path: Path | str, size: tuple[int, int] = (64, 64)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    Path(path).write_bytes(buffer.getvalue())
    return str(path)


def names(folder: str = "out") -> list[str]:
    with contextlib.suppress(FileNotFoundError):  # another process may remove the folder at any time
        return sorted(os.listdir(folder))
    return []


def text_of(name: str) -> dict[str, str]:
    with Image.open(Path("out") / name) as image:
        return dict(image.text)


def refused(capsys, status: int, *parts: str) -> None:
    """Asserts exit status 2 and one short line on stderr that contains all parts."""
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 700, (status, err)
    for part in parts:
        assert part in err, err


# -- output ------------------------------------------------------------------------------------------------------------


def stream(kind: str) -> io.TextIOBase | None:
    if kind == "closed":
        return None  # Python's value for a descriptor that is closed when it starts
    if kind == "full":
        return open("/dev/full", "w", buffering=1)
    if kind == "gone":
        reader, writer = os.pipe()
        os.close(reader)
        return open(writer, "w", buffering=1)
    return io.TextIOWrapper(io.BytesIO(), kind, "strict")


@pytest.mark.parametrize("kind", ["ascii", "cp1252", "gone", "full", "closed"])
def test_a_broken_stream_does_not_end_the_work(run, monkeypatch, kind):
    """A Chinese prompt or a closed pipe ended a run after its first picture."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", stream(kind))
    assert run("generate", "--prompt", "猫", "--prompt", "a cat", "--save_path", "猫", "--batch_size", 1) == 0
    assert names("猫") == ["0_0.png", "1_0.png"]


def finetune_options(tokens: Path, tiny_checkpoint: Path) -> list[str]:
    values = dict(
        data_config=tokens,
        output_dir="猫",
        init_from=tiny_checkpoint,
        batch_size=2,
        max_steps=1,
        precision="fp32",
        save_iteration_interval=0,
        device="cpu",
    )
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize("kind", ["ascii", "gone"])
@pytest.mark.parametrize("name", ["edit", "reconstruct", "pre_tokenize", "finetune"])
def test_other_commands_continue_without_their_output(run, argv, monkeypatch, tokens, tiny_checkpoint, name, kind):
    source = picture("猫.png")
    for which in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{which}", stream(kind))
    if name == "edit":
        assert run(name, "--image_path", source, "--instruction", "猫") == 0
        assert "edit_1.png" in names()
    elif name == "reconstruct":
        assert run(name, source, "--target_size", 64) == 0
        assert names() == ["猫_codes.png", "猫_reconstruction.png"]
    elif name == "pre_tokenize":
        (Path("pictures") / "猫").mkdir(parents=True)
        Path(picture("pictures/猫/0.png")).with_suffix(".txt").write_text("a cat")
        options = ["--in_filename", "pictures", "--out_dir", "猫", "--target_size", "64", "--device", "cpu"]
        assert argv(name, *options, "--model_path", tiny_checkpoint) == 0
        assert any(file.endswith("record.jsonl") for file in names("猫"))
    else:
        assert argv(name, *finetune_options(tokens, tiny_checkpoint)) == 0
        assert "export" in names("猫")


def test_a_reader_that_closes_a_pipe(here, tiny_checkpoint):
    """`lumina-mgpt generate ... | head -1` wrote only the first pictures."""
    options = ("--prompt", "猫", "-n", 3, "--batch_size", 1, "--model_path", tiny_checkpoint, "--save_path", "out")
    variables = environment(PYTHONIOENCODING="cp1252:strict")
    command = [*line_of("generate", *SMALL, *options)]
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline().startswith(b"task t2i")
    process.stdout.close()
    assert process.wait(PATIENCE) == 0
    assert names() == ["0_0.png", "0_1.png", "0_2.png"]


# -- paths and text that cannot be written -----------------------------------------------------------------------------


def test_a_picture_whose_path_is_not_utf8(run):
    """Its result was lost: writing the path into the PNG failed after the sampling."""
    source = picture(f"{NOT_UTF8}.png")
    control = ("--task", "i2i", "--i2i_task", "depth", "--height", 64)
    assert run("generate", *control, "--image_path", source, "--prompt", "a cat") == 0
    assert text_of("depth.png")["image_path"] == text_of("depth_result.png")["image_path"] == "caf\\udce9.png"
    assert run("edit", "--image_path", source, "--instruction", "a cat", "--save_path", NOT_UTF8) == 0
    assert "edit_1.png" in names(NOT_UTF8)


def test_a_null_character_is_escaped_in_png_text(tmp_path):
    """PNG text ends at a null character, so programs read half of the prompt."""
    OutputFolder(tmp_path).save("a.png", Image.new("RGB", (8, 8)), {"prompt": "a cat\0 on a hat"})
    assert text_of(tmp_path / "a.png")["prompt"] == "a cat\\x00 on a hat"


def test_a_checkpoint_whose_path_is_not_utf8(run, tiny_checkpoint, capsys, no_weights):
    """Its tokenizer was called damaged."""
    Path(NOT_UTF8).symlink_to(tiny_checkpoint)
    refused(capsys, run("generate", "--prompt", "a cat", "--model_path", NOT_UTF8), "--model_path", "must be UTF-8")


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [238, 250])
def test_a_name_that_is_too_long_is_an_error_before_the_work(run, capsys, no_weights, length):
    """It was reported after the work, as a disk without space."""
    source = picture("b" * length + ".png")
    refused(capsys, run("reconstruct", source), "--save_path", "File name too long", "use a shorter name")
    assert names() == []


def test_a_folder_whose_name_is_too_long(run, capsys, no_weights):
    """The message asked for free space."""
    status = run("generate", "--prompt", "a cat", "--save_path", "a" * 300)
    refused(capsys, status, "File name too long", "use a shorter name")


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_only_line_feeds_and_carriage_returns_split_a_prompt_file(run):
    """A form feed, U+0085 or U+2028 inside a line made two prompts of it."""
    lines = "a\x0bcat\x0con\x85a\u2028hat", "a snowman", "a hedgehog"
    Path("prompts.txt").write_bytes("{}\r{}\r\n\n{}".format(*lines).encode())
    assert run("generate", "--prompt_file", "prompts.txt") == 0
    assert [text_of(name)["prompt"] for name in names()] == list(lines)


def test_a_prompt_file_in_utf16_is_recognized(run, capsys, no_weights):
    Path("prompts.txt").write_text("a cat", encoding="utf-16")
    refused(capsys, run("generate", "--prompt_file", "prompts.txt"), "--prompt_file prompts.txt", "got UTF-16")


def test_a_control_name_in_a_file_is_reported_with_that_file(run, capsys, no_weights, tiny_checkpoint):
    """It was reported as --prompt."""
    Path("prompts.txt").write_text("a cat\nan <eoss>\n")
    refused(capsys, run("generate", "--prompt_file", "prompts.txt"), "--prompt_file prompts.txt (number 1)", "<eoss>")
    Path("model").mkdir()
    for path in tiny_checkpoint.iterdir():
        (Path("model") / path.name).symlink_to(path)
    (Path("model") / "prompts.txt").unlink()
    (Path("model") / "prompts.txt").write_text("an <eoss>\n")
    status = run("generate", "--model_path", "model")
    refused(capsys, status, f"{Path('model') / 'prompts.txt'} (number 0)", "<eoss>")


@pytest.mark.parametrize(
    ("content", "part"), [("an <eoss>", "(number 0)"), (None, "cannot be read"), ("\n", "got none")]
)
def test_bad_sample_prompts_name_their_option(argv, capsys, tokens, tiny_checkpoint, content, part):
    """They were reported as --prompt or --prompt_file, which finetune does not have."""
    if content is not None:
        Path("asked.txt").write_text(content)
    options = ("--sample_every", "1", "--sample_prompts", "asked.txt")
    assert argv("finetune", *finetune_options(tokens, tiny_checkpoint), *options) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: --sample_prompts") and part in last, last


def test_a_sample_that_cannot_be_written_does_not_end_the_training(argv, capsys, tokens, tiny_checkpoint):
    """A full disk, or a file in place of the folder, ended the training."""
    Path("猫").mkdir()
    (Path("猫") / "samples").write_text("in the way")
    options = ("--sample_every", "1", "--sample_prompts", "asked.txt")
    Path("asked.txt").write_text("a cat")
    assert argv("finetune", *finetune_options(tokens, tiny_checkpoint), *options) == 0
    assert "the samples of step 1 are not all written" in capsys.readouterr().err


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_seeds_of_later_turns_are_checked_before_the_first(run, capsys, no_weights):
    """`lumina-mgpt edit --seed 9223372036854775807` failed after its first turn."""
    options = ("--image_path", picture("a.png"), "--instruction", "a cat", "--instruction", "a dog")
    refused(capsys, run("edit", *options, "--seed", 2**63 - 1), "--seed must be at most 2**63 - 2", str(2**63 - 1))
    assert names() == []


def test_the_last_seed_of_all_turns_may_be_the_largest(run):
    options = ("--image_path", picture("a.png"), "--instruction", "a cat", "--instruction", "a dog")
    assert run("edit", *options, "--seed", 2**63 - 2) == 0
    assert text_of("edit_2.png")["seed"] == str(2**63 - 1)


def test_seeds_of_an_evaluation_are_checked_before_its_work(here, capsys, monkeypatch, tiny_checkpoint):
    evaluate = main_of("evaluate")
    monkeypatch.setattr("emoji.fetch", lambda *_: pytest.fail("the work began"))
    refused(capsys, evaluate(["--model_path", str(tiny_checkpoint), "--seed", str(2**63 - 1)]), "--seed must be")


@pytest.mark.parametrize("option", ["--size", "--gpus", "--gb", "--lora_rank"])
@pytest.mark.parametrize("value", ["0", "-8", "1" + "0" * 400])
def test_impossible_sizes(capsys, option, value):
    """They gave wrong numbers or an OverflowError."""
    refused(capsys, main_of("memory_table")([option, value]), option, "1 ... 1000000")


@pytest.mark.parametrize("option", ["-n", "--batch_size", "--width", "--height", "--seed", "--cfg", "--window"])
@pytest.mark.parametrize("digits", [40, 5000])
def test_numbers_of_many_digits(run, capsys, no_weights, option, digits):
    """The message repeated all 5,000 digits."""
    more = ("--speculative_jacobi",) if option == "--window" else ()
    refused(capsys, run("generate", "--prompt", "a cat", *more, option, "9" * digits), option)


@pytest.mark.parametrize("options", [("--temperature", 1e-300), ("--temperature", 1e300), ("--top_k", 10**40)])
def test_extreme_valid_settings(run, options):
    assert run("generate", "--prompt", "a cat", "--cfg", 1000, *options) == 0 and names() == ["0_0.png"]


# -- environments, signals, leftovers ----------------------------------------------------------------------------------


def test_a_leftover_number_of_processes(run, capsys, no_weights, monkeypatch):
    """The run made one picture of four without a message."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused(capsys, run("generate", "--prompt", "a cat", "-n", 4), "RANK must be set", "WORLD_SIZE='4'", "unset")
    assert names() == []


def test_the_first_of_several_processes_prints_its_share(run, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert run("generate", "--prompt", "a cat", "-n", 6) == 0
    assert "process 0 of 4 makes 2 of 6 images: numbers 0, 4, 8 and so on" in capsys.readouterr().out
    assert names() == ["0_0.png", "0_4.png"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_removes_previews(here, tiny_checkpoint, name):
    """SIGTERM or a closed terminal left previews, which made the same command fail."""
    options = ("--prompt", "a cat", "-n", 500, "--batch_size", 4, "--preview", "--save_path", "out")
    command = line_of("generate", "--device", "cpu", "--model_path", tiny_checkpoint, *options)
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while not any("preview" in file for file in names()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    err = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 128 + getattr(signal, name), err
    assert err.splitlines()[-1].startswith(f"stopped by {name}; "), err
    assert all(file.startswith("0_") and file.count(".") == 1 for file in names()), names()


def test_previews_that_a_killed_run_left_are_replaced(run, capsys):
    """After SIGKILL the same command refused to run because of its preview."""
    Path("out").mkdir()
    (Path("out") / "0_0.preview.png").write_bytes(b"half of a pic")
    assert run("generate", "--prompt", "a cat", "--preview") == 0
    assert names() == ["0_0.png"]


def test_a_given_picture_named_as_a_preview_is_kept(run, capsys, no_weights):
    Path("out").mkdir()
    source = picture("out/depth.preview.png")
    control = ("--task", "i2i", "--i2i_task", "depth", "--height", 64, "--image_path", source, "--prompt", "a cat")
    refused(capsys, run("generate", *control, "--preview"), f"would replace {source}")
    assert names() == ["depth.preview.png"]


def test_a_given_picture_named_as_a_preview_is_kept_without_previews(run):
    Path("out").mkdir()
    source = picture("out/depth.preview.png")
    control = ("--task", "i2i", "--i2i_task", "depth", "--height", 64, "--image_path", source, "--prompt", "a cat")
    assert run("generate", *control) == 0
    assert "depth.preview.png" in names()


def test_incomplete_files_of_a_killed_run_are_removed(run):
    """They were never removed. Recent ones, which another process may be writing, and other names are kept."""
    Path("out").mkdir()
    for name, age in ((".0_0.png.7.part", 7200), (".0_0.png.8.part", 60), (".other.png.7.part", 7200)):
        (Path("out") / name).write_bytes(b"half")
        os.utime(Path("out") / name, (time.time() - age,) * 2)
    assert run("generate", "--prompt", "a cat") == 0
    assert names() == [".0_0.png.8.part", ".other.png.7.part", "0_0.png"]


@pytest.mark.parametrize(
    ("name", "options", "option"),
    [
        (
            "finetune",
            "--init_from no_folder --data_config d.yaml --output_dir o --max_steps 1",
            "--init_from",
        ),
        (
            "finetune",
            "--model_config no.yaml --tokenizer_path t --data_config d.yaml --output_dir o --max_steps 1",
            "--model_config",
        ),
        (
            "finetune",
            "--init_from b --movqgan_path no_file --data_config d.yaml --output_dir o --max_steps 1",
            "--movqgan_path",
        ),
        ("merge_lora", "--model_path no_folder --adapter a --save_path o", "--model_path"),
        ("quantize", "--model_path no_folder --save_path o", "--model_path"),
        ("pre_tokenize", "--model_path no_folder --in_filename p --out_dir o --target_size 64", "--model_path"),
    ],
)
def test_a_missing_file_or_folder_is_reported_with_its_option(here, capsys, name, options, option):
    """`--movqgan_path` was ignored, so that the export took another image tokenizer; others named no option."""
    (here / "d.yaml").write_text("META: [{path: records.jsonl, type: image}]\n")
    (here / "records.jsonl").write_text("")
    (here / "p").mkdir()
    picture(here / "p" / "a.png")
    (here / "p" / "a.txt").write_text("a cat")
    assert main_of(name)(options.split()) == 2
    assert f"error: {option} no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pre_tokenize", "--in_filename p --out_dir o --model_path m --splits 0", "--splits must be at least 1, got 0"),
        (
            "pre_tokenize",
            "--in_filename p --out_dir o --model_path m --splits 2 --rank 2",
            "--rank must be at least 0 and below --splits 2, got 2",
        ),
    ],
)
def test_messages_name_the_option_at_fault(here, capsys, name, options, message):
    """They named parameters without dashes (`0 ... splits - 1`), and --rank where --splits was wrong."""
    assert main_of(name)([*options.split(), "--target_size", "64"]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
