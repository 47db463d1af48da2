"""Pages in a headless browser."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import BrowserContext, Locator, Page, expect
from server_runs import PATIENCE

from lumina_mgpt.server.engine import Engine

FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
expect.set_options(timeout=PATIENCE * 1000)


@dataclass
class Shown:
    """A page of a running server in the browser.

    Attributes:
        part: part of the page that the methods use: text, task, edit or chat.
        requests: URLs of everything that the browser asked for.
    """

    page: Page
    engine: Engine
    url: str
    requests: list[str]
    part: str = "text"

    def __getitem__(self, field: str) -> Locator:
        """The field `text-status` for "status"."""
        return self.page.locator(f"#{self.part}-{field}")

    def open(self, part: str, tab: str) -> "Shown":
        self.page.get_by_role("tab", name=tab, exact=True).click()
        return replace(self, part=part)

    def form(self) -> Locator:
        return self.page.locator(".work", has=self["run"])

    def type(self, prompt: str) -> None:
        self["prompt"].locator("textarea, input").fill(prompt)

    def set(self, label: str, value: object) -> None:
        field = self.form().get_by_label(label, exact=True)
        field.fill(str(value))
        field.press("Tab")

    def keep_seed(self, seed: int) -> None:
        self.form().get_by_label("New seed each time").uncheck()
        self.set("Seed", seed)

    def upload(self, path: Path) -> None:
        self["picture"].locator("input[type=file]").set_input_files(path)
        expect(self["picture"].locator("img")).to_be_visible()

    def finish(self, *words: str) -> None:
        """Waits until the status has the words and a run can be started."""
        for text in words:
            expect(self["status"]).to_contain_text(text)
        expect(self["run"]).to_be_enabled()

    def run(self, *words: str) -> None:
        self["run"].click()
        self.finish(*words)

    def picture(self, field: str, number: int = 0) -> Image.Image:
        """The file of a shown picture, as the browser saves it."""
        image = self[field].locator("img").nth(number)
        expect(image).to_be_visible()
        return Image.open(BytesIO(self.page.request.get(image.get_attribute("src")).body()))

    def command(self) -> str:
        """The command line that the page shows."""
        expect(self["command"].locator(".cm-content")).to_be_visible()
        return " ".join(self["command"].locator(".cm-line").all_inner_texts())


@contextlib.contextmanager
def shown(context: BrowserContext, engine: Engine, url: str) -> Iterator[Shown]:
    """Opens a page in the browser."""
    page, requests = context.new_page(), list[str]()
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    expect(page.locator("#text-run")).to_be_visible()
    try:
        yield Shown(page, engine, url, requests)
    finally:
        page.close()


@dataclass
class Pause:
    """Holds the model before one of its forwards."""

    reached: threading.Event
    opened: threading.Event
