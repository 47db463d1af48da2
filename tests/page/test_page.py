"""The page in a headless browser: what it shows is what the command line makes."""

import json
import shlex
import shutil
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing

import pytest
from commands import ROOT, main_of
from gradio.utils import get_upload_folder
from page_runs import PHONE, shown
from PIL import Image, ImageChops
from playwright.sync_api import expect
from server_runs import PATIENCE

from lumina_mgpt.results import ImageDone

PROMPT = "a cat on a white background"
GREY = (128, 128, 128)


def same(first: Image.Image, second: Image.Image) -> bool:
    return (
        first.size == second.size and not ImageChops.difference(first.convert("RGB"), second.convert("RGB")).getbbox()
    )


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Runs a command line of the page in a new folder, and returns the pictures that it makes, by name."""

    def run(command: str, *files: str) -> dict[str, Image.Image]:
        monkeypatch.chdir(tmp_path)
        for file in files:
            shutil.copy(ROOT / "assets" / file, tmp_path)
        program, name, *options = shlex.split(command)
        assert program == "lumina-mgpt"
        assert main_of(name.replace("-", "_"))([*options, "--device", "cpu"]) == 0
        return {path.name: Image.open(path) for path in (tmp_path / "outputs").iterdir()}

    return run


def test_a_prompt_becomes_a_picture_row_by_row(tiny, made, pause):
    held = pause(tiny.engine, 30)  # in row 4 of 8
    tiny.type(PROMPT)
    tiny.keep_seed(7)
    tiny["run"].click()
    assert held.reached.wait(PATIENCE)
    expect(tiny["status"]).to_contain_text("row 3 of 8")
    expect(tiny["stop"]).to_be_enabled()
    partial = tiny.picture("images")
    assert partial.size == (64, 64)
    assert partial.getpixel((32, 60)) == GREY != partial.getpixel((32, 10))
    held.opened.set()
    tiny.finish("done", "seed 7 · 64 × 64 · guidance 4 · top-k 4096 · temperature 1")
    final, expected = tiny.picture("images"), made(tiny.command())["0_0.png"]
    assert same(final, expected)
    assert not same(partial, final)
    assert final.text["prompt"] == PROMPT and final.text["seed"] == "7"


def test_several_images_of_a_new_seed(tiny, made):
    tiny.type(PROMPT)
    tiny.set("number input for Images", 2)
    tiny.run("done")
    seed = tiny.form().get_by_label("Seed", exact=True).input_value()
    command = tiny.command()
    assert f"-n 2 --seed {seed}" in command
    results = made(command)
    assert all(same(tiny.picture("images", number), results[f"0_{number}.png"]) for number in range(2))


def test_stop_ends_a_run(tiny, pause):
    held = pause(tiny.engine, 30)
    tiny.type(PROMPT)
    tiny["run"].click()
    assert held.reached.wait(PATIENCE)
    tiny["stop"].click()
    tiny.finish("stopped at row 3 of 8")
    held.opened.set()
    deadline = time.monotonic() + PATIENCE
    while tiny.engine.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    expect(tiny["images"].locator("img")).to_have_count(1)


def test_closing_the_page_ends_its_run(desktop, served_tiny, pause, monkeypatch):
    url, engine = served_tiny
    held, cancelled = pause(engine, 30), threading.Event()
    monkeypatch.setattr(engine.observer, "cancelled", cancelled.set)
    with shown(desktop, engine, url) as page:
        page.type(PROMPT)
        page["run"].click()
        assert held.reached.wait(PATIENCE)
    assert cancelled.wait(PATIENCE)
    held.opened.set()


def test_a_task_with_an_upload(tiny, made):
    task = tiny.open("task", "Tasks")
    task.upload(ROOT / "assets" / "subject.png")
    task["task"].locator("input").click()
    task.page.get_by_role("option", name="the subject elsewhere").click()
    task.type("the same on a navy background")
    task.keep_seed(3)
    task.run("done", "64 × 128")
    results = made(task.command(), "subject.png")
    assert same(task.picture("images", 0), results["subject_result.png"])
    assert same(task.picture("images", 1), results["subject.png"])


def test_a_map_is_computed_from_a_photo(tiny, made):
    task = tiny.open("task", "Tasks")
    task["task"].locator("input").click()
    task.page.get_by_role("option", name="image from canny map").click()
    task.upload(ROOT / "assets" / "subject.png")
    task.form().get_by_label("Compute the map from this photo").check()
    task.type(PROMPT)
    task.run("done")
    command = task.command()
    assert command.startswith("lumina-mgpt generate-with-image --task canny --extract")
    assert same(task.picture("images", 1), made(command, "subject.png")["canny.png"])


def test_edits_are_a_conversation(tiny, made):
    edit = tiny.open("edit", "Edit")
    edit.upload(ROOT / "assets" / "subject.png")
    edit.keep_seed(5)
    for turn, instruction in enumerate(["make the background red", "add a hat"], start=1):
        edit.type(instruction)
        edit.run("done", f"turn {turn} · seed {4 + turn}")
    expect(edit["turns"].locator("img")).to_have_count(3)
    expect(edit["turns"]).to_contain_text("add a hat")
    results = made(edit.command(), "subject.png")
    for number, name in enumerate(["edit_ref_center_crop.png", "edit_1_result.png", "edit_2_result.png"]):
        assert same(edit.picture("turns", number), results[name]), name
    edit["undo"].click()
    edit.finish("undone")
    expect(edit["turns"].locator("img")).to_have_count(2)
    expect(edit["prompt"].locator("textarea, input")).to_have_value("add a hat")
    assert "hat" not in edit.command()
    edit.run("done", "turn 2 · seed 6")  # the same seed and instruction again
    assert same(edit.picture("turns", 2), results["edit_2_result.png"])
    edit["new"].click()
    expect(edit["turns"].locator("img")).to_have_count(0)


def test_errors_name_the_field(tiny, tmp_path):
    tiny.set("Size", "100x64")
    tiny.type(PROMPT)
    tiny.run("width must be a multiple of 32, got 100")
    expect(tiny["status"].get_by_role("alert")).to_be_visible()
    tiny.set("Size", "64x64")
    tiny.type(" ")
    tiny.run("prompt must not be empty")
    tiny.type("<racm3:break><b>")
    tiny.run("prompt (number 0)")
    expect(tiny["status"].locator("b")).to_have_count(0)
    task = tiny.open("task", "Tasks")
    task.type(PROMPT)
    task.run("picture is missing; upload one")
    (tmp_path / "broken.png").write_text("no picture")
    task["picture"].locator("input[type=file]").set_input_files(tmp_path / "broken.png")
    expect(task["picture"].get_by_role("button", name="Remove")).to_be_visible()
    task.run("picture: the upload is not a picture of a supported format")
    expect(task["status"]).not_to_contain_text(str(tmp_path))


def test_a_full_queue_is_an_error(tiny, monkeypatch):
    monkeypatch.setattr(tiny.engine, "queue_limit", 0)
    tiny.type(PROMPT)
    tiny.run("try again in")


def test_the_names_go_into_the_prompt(tiny):
    tiny.type("a hedgehog on a sky blue background")
    tiny.form().get_by_label("What this checkpoint can draw").click()
    tiny.page.get_by_role("option", name="red apple").click()
    expect(tiny["prompt"].locator("textarea")).to_have_value("a red apple on a sky blue background")


def test_examples_fill_the_fields(tiny, chat):
    tiny.page.get_by_text("a red apple on a white background", exact=True).click()
    expect(tiny["prompt"].locator("textarea")).to_have_value("a red apple on a white background")
    task = tiny.open("task", "Tasks")
    task.page.get_by_text("the same on a pink background", exact=True).click()
    expect(task["prompt"].locator("textarea")).to_have_value("the same on a pink background")
    expect(task["task"].locator("input")).to_have_value("the subject elsewhere")
    edit = tiny.open("edit", "Edit")
    edit.page.get_by_text("make the background red", exact=True).click()
    expect(edit["prompt"].locator("textarea, input")).to_have_value("make the background red")
    talk = chat.open("chat", "Chat")
    talk.page.get_by_text("Is there a fox?", exact=True).click()
    expect(talk["prompt"].locator("textarea")).to_have_value("Is there a fox?")


def test_a_picture_is_described_and_talked_about(chat):
    page = chat.open("chat", "Chat")
    page.upload(ROOT / "assets" / "subject.png")
    page.keep_seed(2)
    page["describe"].click()
    page.finish("ended by turn end")
    with Image.open(ROOT / "assets" / "subject.png") as picture:
        turns = [("human", ["Describe the image in detail. ", picture.convert("RGBA")])]
        first = page.engine.pipeline.answer(turns, want="text", seed=2)
    messages = page["turns"].locator(".bot.message")
    expect(messages).to_have_count(1)
    assert messages.first.inner_text().split() == first.text.split() != []
    page.type("And now?")
    page.run("ended by turn end", "ids read")
    turns += [("assistant", [first.text]), ("human", ["And now?"])]
    second = page.engine.pipeline.answer(turns, seed=2)
    texts = [part.strip() for part in second.parts if isinstance(part, str) and part.strip()]
    assert texts and second.images
    for text in texts:
        expect(messages.filter(has_text=text).last).to_be_visible()
    assert same(page.picture("turns", 1), second.images[0].image)
    page["undo"].click()
    expect(messages).to_have_count(1)


def test_an_edit_of_the_first_generation(chat):
    edit = chat.open("edit", "Edit")
    edit.upload(ROOT / "assets" / "subject.png")
    edit.keep_seed(2)
    for turn, instruction in enumerate(["make it red", "add a hat"]):
        edit.type(instruction)
        edit.run("done", f"turn {turn + 1}")
    conversation = edit.engine.pipeline.conversation()
    with Image.open(ROOT / "assets" / "subject.png") as picture:
        given = [picture.convert("RGBA")]
        for turn, text in enumerate(["make it red <|image|>", "add a hat"]):
            stream = conversation.say(text, given if not turn else (), want="image", size=(64, 64), seed=2 + turn)
            (image,) = [event for event in stream if isinstance(event, ImageDone)]
            assert same(edit.picture("turns", turn + 1), image.image)


def test_checkpoints_without_text_have_no_chat(tiny):
    expect(tiny.page.get_by_role("tab")).to_have_text(["Image", "Tasks", "Edit"])


def test_the_page_fits_a_phone(browser, served_tiny):
    with (
        closing(browser.new_context(viewport=PHONE)) as phone,
        shown(phone, served_tiny[1], served_tiny[0]) as page,
    ):
        page.type(PROMPT)
        page.run("done")
        assert page.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        order = [page[field].bounding_box()["y"] for field in ("prompt", "run", "images", "status", "command")]
        assert order == sorted(order)
        page.open("edit", "Edit")
        expect(page.page.locator("#edit-run")).to_be_visible()


def test_nothing_comes_from_another_host(tiny):
    tiny.type(PROMPT)
    tiny.run("done")
    assert len(tiny.requests) > 20
    foreign = [url for url in tiny.requests if not url.startswith((tiny.url, "data:", "blob:"))]
    assert not foreign


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:1/a.png",
        "HTTPS://example.org/a.png",
        "//example.org/a.png",
        "/etc/passwd",
        "assets/subject.png",
        f"{get_upload_folder()}/../a.png",
        f"{get_upload_folder()}",
        "a\0.png",
        ["/etc/passwd"],
    ],
)
def test_pictures_that_are_no_uploads_are_refused(served_tiny, address):
    body = json.dumps({"data": [{"path": address, "meta": {"_type": "gradio.FileData"}}], "fn_index": 0}).encode()
    for place in ("queue/join", "run/predict", "call/predict"):
        request = urllib.request.Request(
            f"{served_tiny[0]}/gradio_api/{place}", body, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 400 and b"must be uploads" in refused.value.read()
