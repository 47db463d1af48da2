"""`lumina-mgpt describe` and `lumina-mgpt chat`: answers, files, messages and exit statuses."""

import io
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_checks import names, refused
from commands import environment, line_of, main_of, module_of
from documents import guide_text
from PIL import Image

from lumina_mgpt.cli.chat import views_of
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import SECOND, with_abilities

GREEDY = ("--text_top_k", "1", "--device", "cpu", "--target_size", "64")
QUESTION = "A dog is playing in the water"


@pytest.fixture
def given(oracle_v1_checkpoint, tmp_path):
    """Name of the tiny model's script -> options for its checkpoint and the folder `out`."""
    return lambda script: [*("--model_path", str(oracle_v1_checkpoint(script)), "--save_path", str(tmp_path / "out"))]


@pytest.fixture
def pictures(tmp_path, oracle_v1_dir) -> Path:
    """A folder of four pictures, one of them broken, and of a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for source, target in (("a_96x32", "a.png"), ("b_64x64", "b.png"), ("c_32x96", "more/c.PNG")):
        (folder / target).write_bytes((oracle_v1_dir / f"{source}.png").read_bytes())
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def golden(oracle_v1_dir) -> dict[int, dict]:
    """Number -> greedy answer of the released code."""
    return {item["n"]: item for item in json.loads((oracle_v1_dir / "generation_greedy.json").read_text())}


@pytest.fixture
def talk(monkeypatch):
    """Runs `chat` in this process with lines on stdin."""

    def run(options: list[str], *lines: str) -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return main_of("chat")([*GREEDY, "--top_k", "1", *options])

    return run


# -- describe ----------------------------------------------------------------------------------------------------------


def test_a_folder_with_a_broken_picture_is_described(given, pictures, golden, tmp_path, capsys):
    answers = tmp_path / "new" / "answers.jsonl"
    options = [*given("text")[:2], "--save_path", str(answers)]
    assert main_of("describe")([*GREEDY, *options, str(pictures)]) == 2
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["image"] for row in rows] == [str(pictures / name) for name in ("a.png", "b.png", "more/c.PNG")]
    assert {row["question"] for row in rows} == {"Describe the image in detail."}
    assert {(row["answer"], row["reason"]) for row in rows} == {(golden[4]["text"], "turn end")}
    err = capsys.readouterr().err
    assert "left out:" in err and "broken.jpg is not a picture" in err
    assert err.splitlines()[-1] == "error: 1 of 4 pictures cannot be read and have no line"
    refused(capsys, main_of("describe")([*GREEDY, *options, str(pictures)]), "--save_path", "already exists", "--over")


def test_ctrl_c_keeps_finished_lines(given, pictures, tmp_path, capsys, monkeypatch):
    from lumina_mgpt.pipeline import Pipeline

    describe = Pipeline.describe

    def stopping(self, *args, **settings):
        yield next(iter(describe(self, *args, **settings)))
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "describe", stopping)
    answers = tmp_path / "answers.jsonl"
    options = [*given("text")[:2], "--save_path", str(answers), str(pictures)]
    assert main_of("describe")([*GREEDY, *options]) == 130
    assert len(answers.read_text().splitlines()) == 1 and "1 of 4 pictures have a line" in capsys.readouterr().err


def test_answers_on_stdout_and_a_question(given, pictures, capsys):
    options = ["--question", "Is <|image|> red?", "--max_new_tokens", "2", "--batch_size", "1"]
    paths = [str(pictures / "a.png"), str(pictures / "a.png")]
    assert main_of("describe")([*GREEDY, *given("text")[:2], *options, *paths]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 2 and rows[0] == rows[1] and rows[0]["question"] == "Is <|image|> red?"
    assert rows[0]["reason"] == "length" and rows[0]["answer"]


def test_the_second_generation_answers_with_a_warning(tiny_checkpoint, pictures, capsys):
    options = ["--model_path", str(tiny_checkpoint), "--device", "cpu", "--max_new_tokens", "3"]
    assert main_of("describe")([*options, str(pictures / "a.png")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["reason"] and "warning: Lumina-mGPT 2.0 is not trained to write text" in err


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ["images"]),
        (["/no/such.png"], ["images /no/such.png does not exist"]),
        (["EMPTY"], ["images", "folder without pictures"]),
        (["PICTURE", "--question", " "], ["--question must not be empty"]),
        (["PICTURE", "--question", "a <eoss>"], ["--question", "<eoss>"]),
        (["PICTURE", "--text_top_k", "0"], ["--text_top_k", "got 0"]),
        (["PICTURE", "--max_new_tokens", "0"], ["--max_new_tokens", "got 0"]),
        (["PICTURE", "--batch_size", "0"], ["--batch_size", "got 0"]),
        (["PICTURE", "--overwrite"], ["--overwrite has no effect without --save_path"]),
        (["PICTURE", "--save_path", "PICTURE", "--overwrite"], ["--save_path", "one of the pictures"]),
        (["PICTURE", "--save_path", "EMPTY", "--overwrite"], ["--save_path", "not a regular file"]),
        (["PICTURE", "--save_path", "PIPE", "--overwrite"], ["--save_path", "not a regular file"]),
        (["PICTURE", "--save_path", "/dev/null/x"], ["--save_path", "cannot be written"]),
        (["PICTURE", "--question", "<|image|> <|image|>"], ["--question must have one mark"]),
        (["PICTURE", "--question", "a " * 20000], ["--question has", "this model sees 10240"]),
    ],
)
def test_what_describe_refuses(given, pictures, tmp_path, capsys, no_weights, options, parts):
    (tmp_path / "empty").mkdir()
    pipe = tmp_path / "pipe"  # stands for a device, which a fault would remove
    os.mkfifo(pipe)
    places = {"PICTURE": str(pictures / "a.png"), "EMPTY": str(tmp_path / "empty"), "PIPE": str(pipe)}
    options = [places.get(option, option) for option in options]
    code = main_of("describe")(["--device", "cpu", *given("text")[:2], *options])
    refused(capsys, code, *parts)
    assert pipe.exists()


def test_earlier_answers_stay_until_there_is_a_new_one(given, pictures, tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    answers.write_text("earlier\n")
    options = [*GREEDY, *given("text")[:2], "--save_path", str(answers), "--overwrite"]
    assert main_of("describe")([*options, str(pictures / "broken.jpg")]) == 2
    assert answers.read_text() == "earlier\n"
    assert main_of("describe")([*options, str(pictures / "a.png")]) == 0
    assert json.loads(answers.read_text())["image"] == str(pictures / "a.png")


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """A limit on the size of files stands for the full disk: it stops writing in the middle of a line."""
    resource = pytest.importorskip("resource")
    path = str(tmp_path / "answers.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written"), module_of("describe").answers_file(path) as write:
            for _ in range(3):
                write("x" * 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert Path(path).read_text() == ("x" * 9 + "\n") * 2


@pytest.mark.parametrize("command", ["describe", "chat", "attention"])
def test_every_option_is_in_the_documents(command):
    text = guide_text()
    options = {option for action in module_of(command).build_parser()._actions for option in action.option_strings}
    missing = [option for option in options - {"-h", "--help"} if not re.search(rf"`{option}[ `]", text)]
    assert not missing


# -- a conversation in a file ------------------------------------------------------------------------------------------


def written(folder: Path, turns: list[tuple[str, str]], *images: str, **more: object) -> str:
    path = folder / "question.json"
    conversations = [{"from": role, "value": value} for role, value in turns]
    path.write_text(json.dumps({"conversations": conversations, "image": list(images)} | more))
    return str(path)


def test_words_and_an_image_as_in_the_released_code(given, golden, tmp_path, capsys, oracle_v1_dir):
    text = f"Generate an image of 96x64 according to the following prompt:\n{QUESTION}"
    options = ["--conversation", written(tmp_path, [("human", text)]), "--cfg", "3"]
    assert main_of("chat")([*GREEDY, "--top_k", "1", *given("mixed"), *options]) == 0
    out = tmp_path / "out"
    assert names(out) == ["answer.json", "answer_0.png"]
    found = json.loads((out / "answer.json").read_text())
    assert found == {
        "text": golden[6]["text"],
        "images": ["answer_0.png"],
        "ids": golden[6]["generated"],
        "reason": "turn end",
    }
    assert capsys.readouterr().out.splitlines() == ["Sure,", f"[{out / 'answer_0.png'}: 96x64]", "Yes"]
    with Image.open(out / "answer_0.png") as image, Image.open(oracle_v1_dir / "gen_6_0.png") as expected:
        differences = zip(image.tobytes(), expected.convert("RGB").tobytes(), strict=True)
        assert max(abs(one - other) for one, other in differences) <= 1, "rounded, where the released code cuts off"
        assert {"cfg": "3.0", "top_k": "1", "want": "any"}.items() <= image.text.items()


def test_pictures_of_a_file_are_relative_to_it(given, pictures, golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [("human", "Describe the image in detail. <|image|>"), ("gpt", "A dog."), ("human", "Describe it")]
    path = written(pictures, turns, "a.png")
    assert main_of("chat")([*GREEDY, *given("text"), "--conversation", path, "--want", "text"]) == 0
    found = json.loads((tmp_path / "out" / "answer.json").read_text())
    assert found["text"] == golden[4]["text"] and found["images"] == []


def test_images_in_a_row_and_a_broken_off_one(given, tmp_path, capsys):
    path = written(tmp_path, [("human", "Draw")])
    size = ["--width", "32", "--height", "64", "--cfg", "1"]
    options = [*GREEDY, *given("images"), "--conversation", path]
    assert main_of("chat")([*options, "--want", "images", "--views", "3", *size]) == 0
    assert names(tmp_path / "out") == ["answer.json", "answer_0.png", "answer_1.png", "answer_2.png"]
    capsys.readouterr()
    refused(capsys, main_of("chat")([*options, "--overwrite", "--want", "image", "--width", "33"]), "--width", "33")
    assert main_of("chat")([*options, "--overwrite", "--max_new_tokens", "24", "--top_k", "1"]) == 0
    found = json.loads((tmp_path / "out" / "answer.json").read_text())
    assert found["reason"] == "length" and found["images"] == ["answer_0.png"] and len(found["ids"]) == 24
    out = capsys.readouterr().out
    assert "broken off after 3 of 4 rows" in out and "is not complete" in out


def test_default_number_of_images_in_a_row():
    assert views_of(with_abilities(SECOND, {"multiview": {"views": 8, "side": 64}})) == 8
    assert views_of(SECOND) == 16


def test_speculation_gives_the_same_answer(given, tmp_path):
    path = written(tmp_path, [("human", QUESTION)])
    found = []
    for more in ([], ["--speculative_jacobi", "--window", "4"]):
        options = [*given("mixed"), "--conversation", path, "--seed", "3", "--overwrite", *more]
        assert main_of("chat")(["--device", "cpu", "--target_size", "64", "--text_top_k", "1", *options]) == 0
        found.append(json.loads((tmp_path / "out" / "answer.json").read_text()))
    assert found[0] == found[1] and found[0]["images"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("[", ["is not JSON"]),
        ("[]", ["a conversation must be a mapping, got a list"]),
        ({"conversations": []}, ["at least one turn"]),
        ({"image": []}, ["must have the key conversations"]),
        ({"conversations": [["human", "x"]]}, ["turn 0 must be from human"]),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, ["turn 0 must be from human"]),
        ({"conversations": [{"from": "human", "value": "x"}] * 2}, ["turn 1 must be from gpt"]),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
            ["the last turn must be the human's"],
        ),
        ({"conversations": [{"from": "human", "value": "x", "role": "y"}]}, ["turn 0", "got role"]),
        ({"conversations": [{"from": "human", "value": "x"}], "id": 3}, ["conversations and image only, got id"]),
        ({"conversations": [{"from": "human", "value": "x <|image|>"}]}, ["1 <|image|>", "0 images"]),
        ({"conversations": [{"from": "human", "value": "x"}], "image": ["no.png"]}, ["no.png"]),
        ({"conversations": [{"from": "human", "value": "x"}], "image": [["a", "b"]]}, ["list of panels"]),
        ({"conversations": [{"from": "human", "value": "<eoss>"}]}, ["--conversation", "<eoss>"]),
    ],
)
def test_files_that_are_refused(given, tmp_path, capsys, no_weights, content, parts):
    path = tmp_path / "question.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    code = main_of("chat")([*GREEDY, *given("text"), "--conversation", str(path)])
    refused(capsys, code, *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--width", "64"], ["--width 64 has no effect with --want any"]),
        (["--views", "2", "--want", "image"], ["--views 2 has no effect without --want images"]),
        (["--want", "picture"], ["--want", "'picture'"]),
        (["--window", "4"], ["--window 4 has no effect without --speculative_jacobi"]),
        (["--text_temperature", "0"], ["--text_temperature", "got 0"]),
        (["--conversation", "/no/such.json"], ["--conversation", "/no/such.json"]),
        (["--conversation", "PATH", "--max_new_tokens", "0"], ["--max_new_tokens", "got 0"]),
        (["--conversation", "PATH", "--want", "image", "--width", "40", "--height", "64"], ["--width", "got 40"]),
    ],
)
def test_options_that_are_refused(given, tmp_path, capsys, options, parts):
    path = written(tmp_path, [("human", "x")])
    options = [path if option == "PATH" else option for option in options]
    refused(capsys, main_of("chat")(["--device", "cpu", *given("text"), *options]), *parts)


def test_words_need_no_decoder(oracle_v1_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in oracle_v1_checkpoint("text").iterdir():
        if not path.name.startswith("vqgan"):
            (folder / path.name).symlink_to(path)
    options = ["--model_path", str(folder), "--conversation", written(tmp_path, [("human", "x")])]
    refused(capsys, main_of("chat")([*GREEDY, *options]), "no VQGAN weights", "--want text")


# -- in the terminal ---------------------------------------------------------------------------------------------------


def test_a_conversation_with_a_picture(given, talk, pictures, golden, tmp_path, capsys):
    lines = [f"/image {pictures / 'a.png'}", "Describe the image in detail. <|image|>", "", "And now?", "/quit", "x"]
    assert talk(given("text"), *lines) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [f"[{pictures / 'a.png'} goes with the next message]", golden[4]["text"], golden[4]["text"]]


def test_images_are_saved_and_named(given, talk, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "image_001.png").write_bytes(b"existing")
    assert talk([*given("mixed"), "--cfg", "1"], QUESTION, "again \\", "and again") == 0
    assert names(tmp_path / "out") == ["image_001.png", "image_002.png", "image_003.png"]
    assert (tmp_path / "out" / "image_001.png").read_bytes() == b"existing"
    with Image.open(tmp_path / "out" / "image_003.png") as image:
        assert image.text["prompt"] == "again \nand again" and image.size == (96, 64)
    out = capsys.readouterr().out
    assert out.splitlines()[:3] == ["Sure,", f"[{tmp_path / 'out' / 'image_002.png'}: 96x64]", "Yes"]


def test_new_conversations_and_errors(given, talk, tmp_path, capsys, monkeypatch):
    from lumina_mgpt.conversation import Conversation

    histories, say = [], Conversation.say

    def watch(self, *args, **settings):
        histories.append(self.answers)
        return say(self, *args, **settings)

    monkeypatch.setattr(Conversation, "say", watch)
    lines = ["one", "two", "/new", "three", "/image /no/such.png", "/sing", "a <eoss>", "/image", "/help", "four"]
    assert talk(given("text"), *lines) == 2, "an input that is no terminal had errors"
    assert histories == [0, 1, 0, 1, 1]
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4 and "/no/such.png" in errors[0] and "/sing is no command" in errors[1]
    assert "<eoss>" in errors[2] and "/image FILE" in errors[3]
    assert "/quit        end" in out


def test_examples_are_shown_as_they_are_typed(tiny_checkpoint, given, talk, tmp_path, capsys):
    out = ["--save_path", str(tmp_path / "out")]
    assert talk(["--model_path", str(tiny_checkpoint), *out], "/examples") == 0
    assert capsys.readouterr().out == "Draw this:\\\na cat\n"
    assert talk(given("text"), "/examples") == 0
    assert capsys.readouterr().out == "[the checkpoint has no examples]\n"


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(given, talk, tmp_path, capsys, monkeypatch):
    from lumina_mgpt.conversation import AnswerStream
    from lumina_mgpt.results import RowDone

    following, stops = AnswerStream.__next__, iter([True])

    def stopping(self):
        event = following(self)
        if isinstance(event, RowDone) and len(event.codes) == 2 and next(stops, False):
            raise KeyboardInterrupt
        return event

    monkeypatch.setattr(AnswerStream, "__next__", stopping)
    assert talk([*given("mixed"), "--cfg", "1"], QUESTION, "again") == 0
    out = capsys.readouterr().out
    assert "image_001.png: 96x64, broken off after 2 of 4 rows of codes]" in out
    assert "[stopped; the conversation goes on]" in out and "image_002.png: 96x64]" in out
    assert names(tmp_path / "out") == ["image_001.png", "image_002.png"]


@pytest.mark.slow
def test_a_stopped_process_keeps_what_came(given, tmp_path):
    """The model never ends its answer here, so that Ctrl-C comes within it."""
    path = written(tmp_path, [("human", "Draw")])
    line = line_of("chat", *given("images"), "--device", "cpu", "--conversation", path, "--cfg", "1")
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not (tmp_path / "out" / "answer_1.png").exists() and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "what came of the answer is in" in err, err
    found = json.loads((tmp_path / "out" / "answer.json").read_text())
    assert found["reason"] == "stopped" and len(found["images"]) >= 2
    assert [name for name in names(tmp_path / "out") if name.endswith("png")] == sorted(found["images"])
