"""The settings of a run, read from the values of the page's fields, and the command line with the same settings."""

import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lumina_mgpt.checks import whole_number
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.server.limits import Limits
from lumina_mgpt.server.values import size_of

SEEDS = 2**32  # a random seed is short enough to be typed
AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        size: width and height in pixels; None: that of the task.
        n: number of images.
    """

    size: tuple[int, int] | None
    n: int
    sampling: SamplingConfig
    speculation: Speculation | None

    @classmethod
    def read(
        cls,
        limits: Limits,
        size: str | None,
        n: float | None,
        seed: float | None,
        random_seed: bool,
        cfg: float | None,
        top_k: float | None,
        temperature: float | None,
        faster: bool,
    ) -> "Settings":
        """Returns the settings that the fields of the page show.

        Raises:
            InputError: a field is empty or out of range.
            ApiError: a value exceeds a limit of the server.
        """
        values: dict[str, Any] = {"cfg": cfg, "top_k": top_k, "temperature": temperature}
        values["seed"] = secrets.randbelow(SEEDS) if random_seed else _whole(seed)
        for name, value in (*values.items(), ("n", n)):
            if value is None:
                raise InputError("must not be empty; type a number", name)
        values["top_k"] = _whole(values["top_k"])
        return cls(
            size_of((size or AUTO).strip().lower().replace(" ", "").replace("×", "x"), limits),
            whole_number("n", _whole(n), 1, limits.images, f"must be a whole number in 1 ... {limits.images}"),
            SamplingConfig(**values),
            Speculation() if faster else None,
        )

    def options(self, size: tuple[int, int], many: bool = True) -> list[str]:
        """Returns the options of a command.

        Args:
            size: width and height in pixels of the whole image.
            many: whether the command has the option -n.
        """
        sampling = self.sampling
        text = [
            "--width",
            f"{size[0]}",
            "--height",
            f"{size[1]}",
            *(["-n", f"{self.n}"] if many and self.n > 1 else []),
        ]
        text += ["--seed", f"{sampling.seed}", "--cfg", number(sampling.cfg), "--top_k", f"{sampling.top_k}"]
        text += ["--temperature", number(sampling.temperature)]
        return text + (["--speculative_jacobi"] if self.speculation else [])

    def words(self, size: tuple[int, int]) -> str:
        """Returns the settings as a line of text."""
        sampling = self.sampling
        parts = [f"seed {sampling.seed}", f"{size[0]} × {size[1]}", f"guidance {number(sampling.cfg)}"]
        return " · ".join([*parts, f"top-k {sampling.top_k}", f"temperature {number(sampling.temperature)}"])


def _whole(value: float | None) -> Any:
    """Returns a number of a field as an int, where it is one. The caller checks what is left."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number(value: float) -> str:
    """Returns a number as text, without loss."""
    return f"{value:.0f}" if float(value).is_integer() else repr(value)


def option(name: str, text: str) -> list[str]:
    """Returns an option and its text, which may begin with a dash."""
    return [f"{name}={text}"] if text.startswith("-") else [name, text]


def command_line(*words: str, options: Sequence[str] = ()) -> str:
    """Returns a command line for a POSIX shell.

    Args:
        words: command and options.
        options: options that all commands share, such as `--model_path`.
    """
    return shlex.join(["lumina-mgpt", *words, *options])


def request_command(name: str, request: GenerationRequest, picture: str | None, extract: bool = False) -> list[str]:
    """Returns the command of an image task and its options, without settings.

    Args:
        name: name of the task.
        picture: file name of the given picture; None: the task has none.
        extract: whether the map is computed from the picture.
    """
    (prompt,) = request.prompts
    words = option("--prompt", prompt) if prompt else []
    if extract and picture is not None:
        return ["generate-with-image", "--task", name, "--extract", *option("--input_image_path", picture), *words]
    if picture is not None:
        return ["generate", "--task", "i2i", "--i2i_task", name, *option("--image_path", picture), *words]
    return ["generate", *(["--task", name] if name != "t2i" else []), *words]
