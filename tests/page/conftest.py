"""A headless browser, and running pages of small checkpoints."""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from page_runs import DESKTOP, FLAGS, Pause, Shown, shown
from playwright.sync_api import Browser, BrowserContext, sync_playwright
from server_runs import PATIENCE, serving

from lumina_mgpt import Checkpoint, Pipeline
from lumina_mgpt.page.mount import mount
from lumina_mgpt.server.engine import Engine


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium or Chrome. Without one of them the tests fail: `.ci/run` installs it."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    assert path, "these tests need a browser; apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def desktop(browser) -> Iterator[BrowserContext]:
    with contextlib.closing(browser.new_context(viewport=DESKTOP)) as context:
        yield context


@pytest.fixture(scope="session")
def served_tiny(tiny_checkpoint) -> Iterator[tuple[str, Engine]]:
    engine = Engine(Pipeline.from_pretrained(tiny_checkpoint, "cpu"), "tiny")
    options = ("--model_path", str(tiny_checkpoint))
    with serving(engine, page=lambda app, engine: mount(app, engine, options)) as served:
        yield served.url, engine
    engine.close()


@pytest.fixture
def tiny(desktop, served_tiny) -> Iterator[Shown]:
    with shown(desktop, served_tiny[1], served_tiny[0]) as page:
        yield page


@pytest.fixture(scope="session")
def served_chat(oracle_v1_checkpoint, tmp_path_factory) -> Iterator[tuple[str, Engine]]:
    checkpoint = Checkpoint.open(oracle_v1_checkpoint("mixed"))
    folder = tmp_path_factory.mktemp("chat")
    (folder / "examples.json").write_text('{"chat": ["What is it?", "Is there a fox?"]}')
    small = replace(checkpoint, config=replace(checkpoint.config, base_size=64))
    pipeline = Pipeline.from_pretrained(small, "cpu")
    pipeline.checkpoint = replace(small, folder=folder)  # whose examples the page reads
    engine = Engine(pipeline, "chat")
    with serving(engine, page=mount) as served:
        yield served.url, engine
    engine.close()


@pytest.fixture
def chat(desktop, served_chat) -> Iterator[Shown]:
    with shown(desktop, served_chat[1], served_chat[0]) as page:
        yield page


@pytest.fixture
def pause(monkeypatch) -> Iterator[Callable[[Engine, int], Pause]]:
    """Returns a function that makes an engine's model wait before the given forward, counted from 1."""
    pauses: list[Pause] = []

    def at(engine: Engine, number: int) -> Pause:
        pause, forward, count = Pause(threading.Event(), threading.Event()), engine.pipeline.model.forward, [0]

        def held(*arguments, **settings):
            count[0] += 1
            if count[0] == number:
                pause.reached.set()
                assert pause.opened.wait(PATIENCE)
            return forward(*arguments, **settings)

        monkeypatch.setattr(engine.pipeline.model, "forward", held)
        pauses.append(pause)
        return pause

    yield at
    for one in pauses:
        one.opened.set()
