"""`lumina-mgpt generate`: files, messages, exit statuses, and no files after an error."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_checks import ENVIRONMENT, PATIENCE, names, refused
from commands import module_of
from documents import guide_text
from PIL import Image

from lumina_mgpt import cli, prompt_files
from lumina_mgpt.autotune import Measured
from lumina_mgpt.cli.generate import print_hints
from lumina_mgpt.model.compiled import CompiledForward
from lumina_mgpt.outputs import OutputFolder

SCRIPT = Path(__file__).parents[2] / "generate_examples" / "generate.py"
BASE = ("--device", "cpu", "--width", "32", "--height", "32")


@pytest.fixture(scope="module")
def script():
    return module_of("generate")


@pytest.fixture
def generate(script, tiny_checkpoint, tmp_path):
    """Runs main in this process with the tiny checkpoint; options given later win."""

    given = (*BASE, "--model_path", str(tiny_checkpoint), "--save_path", str(tmp_path / "out"))
    return lambda *options: script.main([*given, *options])


def ended(command: list, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs a command in a folder to its end; output is text."""
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)


# -- what a run writes -------------------------------------------------------------------------------------------------


def test_files_are_named_by_prompt_and_repeat_and_carry_their_settings(generate, tmp_path, capsys):
    prompt = "a caf\u00e9 with a hedgehog"
    assert generate("--prompt", "a cat", "--prompt", prompt, "-n", "2", "--seed", "7", "--width", "64") == 0
    out = tmp_path / "out"
    assert names(out) == ["0_0.png", "0_1.png", "1_0.png", "1_1.png"]
    with Image.open(out / "1_1.png") as image:
        assert image.size == (64, 32)
        text = image.text
    expected = {"prompt": prompt, "repeat": "1", "seed": "7", "width": "64", "height": "32", "cfg": "4.0"}
    expected |= {"top_k": "64", "temperature": "1.0", "device": "cpu", "dtype": "float32", "attn": "sdpa"}
    assert expected.items() <= text.items()
    err = capsys.readouterr().err
    assert "4 images: 100%" in err and "codes/s" in err and "left" in err


def test_speculation_gives_the_same_picture_and_is_in_its_text(generate, tmp_path):
    assert generate("--prompt", "a cat", "--save_path", str(tmp_path / "plain")) == 0
    options = ("--speculative_jacobi", "--window", "7", "--save_path", str(tmp_path / "fast"))
    assert generate("--prompt", "a cat", *options) == 0
    with Image.open(tmp_path / "plain" / "0_0.png") as plain, Image.open(tmp_path / "fast" / "0_0.png") as fast:
        assert plain.tobytes() == fast.tobytes()
        assert fast.text | {"coupling": "noise", "window": "7"} == fast.text and "window" not in plain.text


def test_fast_chooses_the_fastest(generate, tmp_path, monkeypatch):
    """By seconds per code: with windows that cost nothing extra, and with windows that cost too much."""
    cases = (
        ("wide", "16", lambda choice: Measured(1.0, choice.window if choice else 1.0)),
        ("plain", None, lambda choice: Measured(99.0 if choice else 1.0, 1.0)),
    )
    for name, window, costs in cases:
        monkeypatch.setattr("lumina_mgpt.autotune._sampled", lambda *args, c=costs: c(args[2]))
        assert generate("--prompt", "a cat", "--fast", "--save_path", str(tmp_path / name)) == 0
        with Image.open(tmp_path / name / "0_0.png") as image:
            assert image.text.get("window") == window
    monkeypatch.undo()
    assert generate("--prompt", "a cat", "--fast", "-n", "2", "--save_path", str(tmp_path / "real")) == 0


@pytest.mark.parametrize(
    ("gain", "long", "kept"), [(0.9, True, True), (1.1, True, False), (None, True, False), (0.9, False, None)]
)
def test_fast_compiles_if_that_saves_time(generate, tmp_path, monkeypatch, gain, long, kept):
    """It compiles for a long run only, and keeps compiled steps if they are faster."""
    compiled = []

    def making(model):
        compiled.append(1)
        return CompiledForward(model, model.forward)

    monkeypatch.setattr("lumina_mgpt.autotune._COMPILING_MAY_PAY", 10.0 if long else 30.0)  # 16 codes of a second each
    monkeypatch.setattr("lumina_mgpt.autotune.has_compiler", lambda device: True)
    monkeypatch.setattr("lumina_mgpt.autotune.compile_forward", making)

    def costs(step, trial, choice):
        if step.compiled and gain is None:
            raise RuntimeError("no headers\nand more")
        return Measured((gain if step.compiled else 1.0) * (99.0 if choice else 1.0), 1.0)

    monkeypatch.setattr("lumina_mgpt.autotune._sampled", costs)
    assert generate("--prompt", "a cat", "--fast", "--save_path", str(tmp_path / "made")) == 0
    with Image.open(tmp_path / "made" / "0_0.png") as image:
        assert image.text.get("compile") == ("True" if kept else None)
    assert len(compiled) == long


def test_an_int8_cache_is_in_the_text_of_the_picture(generate, tmp_path, capsys):
    assert generate("--prompt", "a cat", "--cache_dtype", "int8") == 0
    with Image.open(tmp_path / "out" / "0_0.png") as image:
        assert image.text["cache_dtype"] == "int8"


@pytest.mark.slow
def test_two_processes_make_the_pictures_of_one(generate, tiny_checkpoint, tmp_path):
    """The processes are started by torchrun, as by `accelerate launch`."""
    prompts = ["--prompt", "a cat", "--prompt", "a snowman", "-n", "2", "--batch_size", "1", "--preview"]
    assert generate(*prompts) == 0
    out = tmp_path / "shared"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    options = [*BASE, "--model_path", str(tiny_checkpoint), "--save_path", str(out), *prompts]
    run = subprocess.run([*launch, *options], capture_output=True, text=True, timeout=PATIENCE, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert names(out) == names(tmp_path / "out") == ["0_0.png", "0_1.png", "1_0.png", "1_1.png"]
    for name in names(out):
        assert (out / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert run.stdout.count("width 32") == 1  # only the first process prints


def test_fast_excludes_speculation_options(generate, capsys, no_weights):
    refused(capsys, generate("--prompt", "a cat", "--fast", "--window", "8"), "--fast", "--window")


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("x", "1")])
def test_invalid_launcher_variables(generate, capsys, no_weights, monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    refused(capsys, generate("--prompt", "a cat"), "RANK", rank, world)


def test_built_in_prompts_and_the_base_size(script, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    assert script.main(["--model_path", str(tiny_checkpoint), "--save_path", str(out), "--device", "cpu"]) == 0
    assert names(out) == [f"{index}_0.png" for index in range(5)]
    with Image.open(out / "1_0.png") as image:
        assert image.size == (64, 64)
        assert image.text["prompt"] == "a slice of pizza on a white background"


def test_prompts_of_a_checkpoint_without_its_own(tmp_path):
    assert prompt_files.example_prompts(tmp_path) == list(prompt_files.EXAMPLE_PROMPTS)
    assert len(set(prompt_files.EXAMPLE_PROMPTS)) == 5


def test_prompt_file_follows_the_prompts(generate, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa snowman\r\n\r\n  a red apple \n".encode())
    assert generate("--prompt", "a cat", "--prompt_file", str(file)) == 0
    texts = []
    for index in range(3):
        with Image.open(tmp_path / "out" / f"{index}_0.png") as image:
            texts.append(image.text["prompt"])
    assert texts == ["a cat", "a snowman", "a red apple"]


def test_nothing_is_overwritten_unless_asked(generate, tmp_path, capsys, no_weights):
    out = tmp_path / "out"
    out.mkdir()
    (out / "0_1.png").write_bytes(b"existing")
    code = generate("--prompt", "a cat", "-n", "3")
    refused(capsys, code, "--save_path", "0_1.png", "--overwrite")
    assert names(out) == ["0_1.png"]
    assert (out / "0_1.png").read_bytes() == b"existing"


def test_overwrite(generate, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "0_0.png").write_bytes(b"old")
    (out / "9_9.png").write_bytes(b"another's")
    assert generate("--prompt", "a cat", "--overwrite") == 0
    Image.open(out / "0_0.png").verify()
    assert (out / "9_9.png").read_bytes() == b"another's"


def test_the_picture_does_not_depend_on_the_batch_size(generate, tmp_path):
    """Compares pixels; this seed has no near tie (test_pipeline tests equality in float64)."""
    for size in ("1", "4"):
        folder = str(tmp_path / size)
        assert (
            generate(
                "--prompt", "a cat", "--prompt", "a snowman", "-n", "2", "--batch_size", size, "--save_path", folder
            )
            == 0
        )
    for name in ("0_0.png", "0_1.png", "1_0.png", "1_1.png"):
        assert Image.open(tmp_path / "1" / name).tobytes() == Image.open(tmp_path / "4" / name).tobytes()


def test_preview_grows_row_by_row_and_is_removed(generate, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []
    save = OutputFolder.save

    def watch(self, name, image, text=None, *, again=False):
        path = save(self, name, image, text, again=again)
        Image.open(path).verify()
        seen.append((name, names(out)))
        return path

    monkeypatch.setattr(OutputFolder, "save", watch)
    assert generate("--prompt", "a cat", "--preview") == 0
    assert [name for name, _ in seen] == ["0_0.preview.png"] * 4 + ["0_0.png"]
    assert all(listing == ["0_0.preview.png"] for _, listing in seen[:4]), "no temporary file is visible"
    assert names(out) == ["0_0.png"]


# -- hints -------------------------------------------------------------------------------------------------------------


def test_a_prompt_of_unknown_things_gets_a_hint(generate, capsys):
    assert generate("--prompt", "a hedghog on a white background") == 0
    hint = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("hint:"))
    assert "'a hedghog on a white background'" in hint and "hedgehog" in hint and "names.txt" in hint


@pytest.mark.parametrize("views, hints", [(1, 1), (8, 0)])
def test_names_are_not_those_of_objects_with_several_views(views, hints, capsys):
    request = SimpleNamespace(task=SimpleNamespace(views=views), prompts=["a mug on a white background"])
    checkpoint = SimpleNamespace(folder=SCRIPT.parent.parent / "assets" / "demo")
    print_hints(SimpleNamespace(picture=None, request=request), checkpoint)
    assert capsys.readouterr().err.count("hint:") == hints


def test_hints():
    known = ["hedgehog", "slice of pizza", "cat"]
    assert prompt_files.unknown_hint("Two Hedgehogs", known) is None
    for text in ("concatenate", "category"):
        assert prompt_files.unknown_hint(text, known) is not None, "part of a word does not count as a name"
    assert "slice of pizza" in prompt_files.unknown_hint("a slize of piza", known)
    assert "hedgehog, slice of pizza" in prompt_files.unknown_hint("democracy", known)
    assert prompt_files.unknown_hint("democracy", []) is None


# -- invalid input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--height", "500"], ["--height must be a multiple of 32, got 500; try 480 or 512"]),
        (["--width", "0"], ["--width", "got 0"]),
        (["--width", "-32"], ["--width", "got -32"]),
        (["--width", "4096"], ["--width", "got 4096", "2048"]),
        (["--width", "1024", "--height", "1024"], ["--width 1024 --height 1024", "2048", "smaller"]),
        (["--width", "wide"], ["--width must be a whole number, got 'wide'"]),
        (["-n", "0"], ["-n must be a whole number in 1 ... 100000", "got 0"]),
        (["-n", "1.5"], ["-n must be a whole number, got '1.5'"]),
        (["--batch_size", "-1"], ["--batch_size must be a whole number in 1 ... 100000", "got -1"]),
        (["--cfg", "nan"], ["--cfg", "got nan"]),
        (["--cfg", "-1"], ["--cfg", "got -1.0"]),
        (["--cfg", "much"], ["--cfg must be a number, got 'much'"]),
        (["--top_k", "0"], ["--top_k", "got 0"]),
        (["--temperature", "0"], ["--temperature", "got 0.0"]),
        (["--temperature", "inf"], ["--temperature", "got inf"]),
        (["--seed", "-1"], ["--seed", "got -1"]),
        (["--speculative_jacobi", "--window", "0"], ["--window must be a whole number in 1 ... 4096", "got 0"]),
        (["--speculative_jacobi", "--coupling", "loose"], ["--coupling", "'loose'"]),
        (["--coupling", "maximal"], ["--coupling maximal", "without --speculative_jacobi"]),
        (["--device", "gpu"], ["--device", "'gpu'", "auto"]),
        (["--device", "mps"], ["--device mps", "--device cpu"]),
        (["--dtype", "int8"], ["--dtype", "'int8'"]),
        (["--attn", "fast"], ["--attn", "'fast'"]),
        (["--prompt", ""], ["--prompt must not be empty"]),
        (["--prompt", "a <eoss> b"], ["--prompt (number 1)", "<eoss>"]),
        (["--prompt", "snow " * 3000], ["the prompt (number 1)", "shorter"]),
        (["--prompt_file", "/no/such/file"], ["--prompt_file /no/such/file", "No such file"]),
        (["--prompt_file", "."], ["--prompt_file .", "Is a directory"]),
        (["--model_path", "no/such/folder"], ["--model_path no/such/folder"]),
        (["--movqgan_path", "/no/such.ckpt"], ["--movqgan_path /no/such.ckpt"]),
        (["--promt", "a cat"], ["--promt"]),
        (["--pro", "a cat"], ["--pro"]),
    ],
)
def test_bad_options(generate, tmp_path, capsys, no_weights, monkeypatch, options, parts):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if options[:2] == ["--device", "mps"] and torch.backends.mps.is_available():
        pytest.skip("this machine has an Apple GPU")
    refused(capsys, generate("--prompt", "a cat", *options), *parts)
    assert not (tmp_path / "out").exists(), "nothing is written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("options", [["--device", "cuda"]])
def test_a_missing_gpu(generate, tmp_path, capsys, no_weights, options):
    refused(capsys, generate("--prompt", "a cat", *options), "--device cuda", "--device cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_flash_attention_without_a_gpu(generate, tmp_path, capsys, no_weights):
    refused(capsys, generate("--prompt", "a cat", "--attn", "flash"), "--attn flash", "sdpa")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("content", "part"), [(b"\n  \n", "at least one prompt"), (b"caf\xe9\n", "UTF-8")])
def test_bad_prompt_files(generate, tmp_path, capsys, no_weights, content, part):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    refused(capsys, generate("--prompt_file", str(file)), "--prompt_file", part)
    assert not (tmp_path / "out").exists()


def test_a_save_path_that_is_a_file(generate, tmp_path, capsys, no_weights):
    (tmp_path / "out").write_text("existing")
    refused(capsys, generate("--prompt", "a cat"), "--save_path", "another folder")
    assert (tmp_path / "out").read_text() == "existing"


def damage(folder: Path, name: str, how: str) -> None:
    path = folder / name
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "garbage":
        path.write_bytes(b"\x00garbage" * 100)
    elif how == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["missing", "truncated", "garbage", "empty"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "movqgan_270M.ckpt"])
def test_damaged_checkpoints(generate, tiny_checkpoint, tmp_path, capsys, name, how):
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    damage(folder, name, how)
    code = generate("--prompt", "a cat", "--model_path", str(folder))
    refused(capsys, code, str(folder) if how == "missing" else name)
    assert not (tmp_path / "out").exists()


def test_a_config_of_another_kind(generate, tiny_checkpoint, tmp_path, capsys, no_weights):
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    refused(capsys, generate("--prompt", "a cat", "--model_path", str(folder)), "model_type", "llama")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_checkpoint(generate, tmp_path, capsys, no_weights):
    (tmp_path / "empty").mkdir()
    refused(capsys, generate("--prompt", "a cat", "--model_path", str(tmp_path / "empty")), "config.json")
    assert not (tmp_path / "out").exists()


def test_a_hub_id_that_cannot_be_reached(tmp_path):
    """Runs in another process, whose connections are all refused."""
    environment = ENVIRONMENT | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
    environment.pop("HF_HUB_OFFLINE", None)
    result = ended(
        [sys.executable, SCRIPT, *BASE, "--prompt", "a cat", "--model_path", "some/model", "--save_path", "out"],
        tmp_path,
        environment,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and "--model_path some/model" in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up(generate, tmp_path, capsys, monkeypatch):
    """The second picture does not fit: the first stays, and no part of the second does."""
    out, replace = tmp_path / "out", os.replace

    def fill_up(source, target):
        if Path(target).name == "0_1.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fill_up)
    assert generate("--prompt", "a cat", "-n", "3") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--save_path" in last and "0_1.png" in last and "No space left on device" in last
    assert names(out) == ["0_0.png"]


def test_a_full_disk_is_an_error_before_the_work(tmp_path, tiny_checkpoint):
    """The system's limit on file sizes simulates the full disk."""
    result = subprocess.run(
        [sys.executable, SCRIPT, *BASE, "--prompt", "a cat", "--model_path", tiny_checkpoint, "--save_path", "out"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and "--save_path out" in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_out_of_memory(generate, tmp_path, capsys, monkeypatch):
    def exhausted(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("lumina_mgpt.pipeline.sample", exhausted)
    assert generate("--prompt", "a cat") == 2
    assert "--batch_size 1" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_bug_keeps_its_traceback(generate, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("lumina_mgpt.pipeline.sample", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        generate("--prompt", "a cat")


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_finished_pictures_and_nothing_else(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            sys.executable,
            SCRIPT,
            "--device",
            "cpu",
            "--prompt",
            "a cat",
            "-n",
            "500",
            "--batch_size",
            "1",
            "--preview",
            "--model_path",
            tiny_checkpoint,
            "--save_path",
            out,
        ],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in a shell's background ignores it
    )
    deadline = time.monotonic() + PATIENCE
    try:
        while not (out / "0_1.png").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=PATIENCE)[1]
    finally:
        process.kill()
    assert process.returncode == 130, err
    finished = names(out)
    assert finished == sorted(f"0_{repeat}.png" for repeat in range(len(finished))), "no preview and no incomplete file"
    assert 2 <= len(finished) < 500
    for name in finished:
        Image.open(out / name).verify()
    last = err.splitlines()[-1]
    assert "Traceback" not in err and "Ctrl-C" in last and f"{len(finished)} of 500" in last


def test_ctrl_c_before_anything_was_made(generate, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lumina_mgpt.pipeline.load_model", stop)
    assert generate("--prompt", "a cat") == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C; finished images are kept\n"
    assert not (tmp_path / "out").exists()


def test_ctrl_c_in_the_middle_of_a_write_leaves_nothing(tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        OutputFolder(tmp_path).save("0_0.png", Image.new("RGB", (32, 32)))
    assert names(tmp_path) == []


# -- starting up -------------------------------------------------------------------------------------------------------


def test_help_lists_every_option_without_importing_torch():
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['generate.py', '--help']\ntry: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("False\n")
    for option in (
        "model_path save_path cfg top_k temperature width height prompt prompt_file seed batch_size device "
        "dtype movqgan_path preview overwrite attn"
    ).split():
        assert f"--{option}" in result.stdout


def test_the_demo_checkpoint_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.checkpoint_path(cli.DEMO) == SCRIPT.parent.parent / "assets" / "demo"
    assert cli.checkpoint_path("Alpha-VLLM/Lumina-mGPT-2.0") == "Alpha-VLLM/Lumina-mGPT-2.0"
    (tmp_path / "assets" / "demo").mkdir(parents=True)
    assert cli.checkpoint_path(cli.DEMO) == cli.DEMO, "a folder of that name in the working folder has priority"


def test_the_sample_script_runs(tiny_checkpoint, tmp_path):
    """Runs from another folder, with a path and a prompt that need quotes."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "my models" / "tiny")
    script = SCRIPT.parent.parent / "scripts" / "sample.sh"
    result = ended(["bash", script, folder, "--prompt", "a cat  & \"a 'snowman'\"", *BASE], tmp_path, ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "outputs" / "t2i" / "0_0.png") as image:
        assert image.text["prompt"] == "a cat  & \"a 'snowman'\""


def test_every_option_is_in_the_documents(script):
    text = guide_text()
    options = {option for action in script.build_parser()._actions for option in action.option_strings}
    for option in options - {"-h", "--help"}:
        assert re.search(rf"`{option}[ `]", text), f"{option} is missing in README.md and docs/"


def test_a_slow_load_has_a_bar_and_a_fast_one_has_none(capsys):
    for delay, shown in ((0, True), (60, False)):
        with cli.ReadingBar("reading", delay) as bar:
            for done in (0, 400, 1000):
                bar(done, 1000)
        err = capsys.readouterr().err
        assert ("reading: 100%" in err) == shown and ("1.00k/1.00k" in err) == shown, err
    with cli.ReadingBar("nothing read"):
        pass
    assert capsys.readouterr().err == ""
