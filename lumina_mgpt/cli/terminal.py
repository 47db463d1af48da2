"""A conversation in the terminal."""

import sys
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

from lumina_mgpt.cli.answers import AnswerWriter
from lumina_mgpt.cli.parser import Parser
from lumina_mgpt.cli.runner import REFUSED
from lumina_mgpt.console import Stopped
from lumina_mgpt.errors import InputError
from lumina_mgpt.outputs import OutputFolder
from lumina_mgpt.prompt_files import CHAT, other_examples

if TYPE_CHECKING:
    from PIL import Image

    from lumina_mgpt.pipeline import Pipeline

HELP = """\
/image FILE  attach a picture to the next message; <|image|> in the message is its place (default: before the text)
/new         begin a new conversation
/examples    messages to try, if the checkpoint has some
/quit        end the program; so does the end of the input
/help        this list
Ctrl-C       stop an answer and keep what came
A line that ends in \\ goes on in the next line. To begin a message with /, write a space before it."""


class Terminal:
    """Reads messages from stdin, and shows the answers.

    Args:
        pipeline: the loaded model.
        settings: further arguments of `Conversation.say`.
        output: folder to save images to. They are named image_001.png and so on, from the first free number.
        described: settings for the text of saved images.
        parser: parser of the command, whose options stand in errors.
    """

    def __init__(
        self,
        pipeline: "Pipeline",
        settings: Mapping[str, Any],
        output: OutputFolder,
        described: Mapping[str, object],
        parser: Parser,
    ) -> None:
        self.pipeline, self.settings, self.output, self.parser = pipeline, settings, output, parser
        self.conversation = pipeline.conversation()
        self.pictures: list[Image.Image] = []
        self.writer = AnswerWriter(output, self._name, described)
        self.errors = 0
        self._numbers = count(1)
        self._asks = sys.stdin is not None and sys.stdin.isatty()

    def run(self) -> int:
        """Talks until the input ends. Returns the exit status: 2 if an input that is no terminal had an error."""
        if sys.stdin is None:
            raise InputError("stdin is closed, so there is nothing to answer; give --conversation")
        if self._asks:
            print("/help lists the commands, /quit ends.")
        while (message := self._read()) is not None:
            try:
                if message.startswith("/"):
                    if not self._command(*message.split(maxsplit=1)):
                        break
                elif message.strip():
                    self._say(message.strip())
            except InputError as error:
                self.errors += 1
                print(f"error: {self.parser.render(error)}", file=sys.stderr)
        return REFUSED if self.errors and not self._asks else 0

    def _read(self) -> str | None:
        """Returns the next message, None at the end of the input."""
        lines: list[str] = []
        while True:
            try:
                line = input(("> " if not lines else ". ") if self._asks else "")
            except EOFError:
                return "\n".join(lines) if lines else None
            except UnicodeDecodeError:
                raise InputError("stdin must be UTF-8 text; convert the input") from None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _command(self, name: str, argument: str = "") -> bool:
        """Does what a command says. Returns whether the conversation goes on."""
        if name == "/image":
            from lumina_mgpt.images import open_panel

            if not argument:
                raise InputError("/image needs a file; write /image FILE")
            self.pictures.append(open_panel("/image", argument.strip()))
            print(f"[{argument.strip()} goes with the next message]")
        elif name == "/new":
            self.conversation, self.pictures = self.pipeline.conversation(), []
            print("[a new conversation]")
        elif name == "/examples":
            texts = other_examples(self.pipeline.checkpoint.folder).get(CHAT, ())
            typed = [" " * text.startswith("/") + text.replace("\n", "\\\n") for text in texts]
            print("\n".join(typed) or "[the checkpoint has no examples]")
        elif name == "/help":
            print(HELP)
        elif name != "/quit":
            raise InputError(
                f"{name} is no command; /help lists them. To send it as a message, write a space before it"
            )
        return name != "/quit"

    def _say(self, message: str) -> None:
        stream = self.conversation.say(message, self.pictures, **self.settings)
        self.pictures = []
        self.writer.described = {**self.writer.described, "prompt": message}
        try:
            self.writer.show(stream)
        except Stopped:  # by another signal than Ctrl-C, which ends the program
            raise
        except KeyboardInterrupt:
            print("[stopped; the conversation goes on]")

    def _name(self) -> str:
        """Returns the file name of the next image."""
        for number in self._numbers:
            name = f"image_{number:03}.png"
            if self.output.overwrite or not (self.output.folder / name).exists():
                return name
        raise AssertionError  # the numbers do not end
