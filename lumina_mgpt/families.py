"""The two families of checkpoints, as data: Lumina-mGPT (first generation) and Lumina-mGPT 2.0 (second generation).

A checkpoint's family is found once, by `ModelConfig.from_json`. Other modules read the values below from
`config.family`; none of them asks which family it is.

Sources: arXiv 2408.02657 and its released code; arXiv 2507.17801 and its released code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from lumina_mgpt.checks import require, whole_number
from lumina_mgpt.errors import InputError
from lumina_mgpt.prompts import FIRST_I2I_TASKS, FIRST_TASKS, I2I_TASKS, TASKS, Task

# File with the encoder of a VQGAN alone, in copies of checkpoints that have no other file of it.
VQGAN_ENCODER = "vqgan_encoder.safetensors"
FIRST_CODE_NAME = "IMGIMGAZ"  # name of image code 0 in the tokenizers of the first generation


@dataclass(frozen=True)
class Family:
    """What the checkpoints of one generation have in common.

    Attributes:
        generation: 1 or 2.
        name: name in messages.
        cell: side in pixels of the square that one image code stands for.
        image_code_offset, num_image_codes: image code c has the id `image_code_offset + c`. Released configs lack
            these two values.
        codes_are_named: whether the text tokenizer has a name for each image code.
        image_tokenizer: kind of the image tokenizer, `vqgan` or `movqgan`.
        context: length of the longest training sequences. It replaces a smaller `max_position_embeddings`, which the
            released code of the first generation does not enforce.
        answers_in_text: whether the model is trained to write text.
        fits_fp16: whether all activations are within the range of fp16.
        tasks: name -> task whose images are all generated.
        i2i_tasks: name -> task with a given picture.
        sampling: default values of `SamplingConfig`, where they differ from those of the class.
        plain_share: share of text-to-image training records whose instruction does not name the size of the image.
        drops_earlier_images: whether training also drops the context of sequences with several images; see
            `unirep.drop_context`.
    """

    generation: int
    name: str
    cell: int
    image_code_offset: int
    num_image_codes: int
    codes_are_named: bool
    image_tokenizer: Literal["vqgan", "movqgan"]
    context: int
    answers_in_text: bool
    fits_fp16: bool
    tasks: Mapping[str, Task]
    i2i_tasks: Mapping[str, Task]
    sampling: Mapping[str, float] = field(default_factory=dict)
    plain_share: float = 0.0
    drops_earlier_images: bool = False

    @property
    def has_panels(self) -> bool:
        """Whether an image of some task consists of several panels, one above the other."""
        return any(task.panels > 1 for task in (*self.tasks.values(), *self.i2i_tasks.values()))

    def task(self, name: str, i2i: bool = False) -> Task:
        """Returns the task of this name.

        Args:
            i2i: whether a picture is given.

        Raises:
            InputError: this family has no such task. The message lists those that it has.
        """
        known = self.i2i_tasks if i2i else self.tasks
        if name not in known:
            listed = ", ".join(known)
            raise InputError(f"must be a task of {self.name}: {listed}; got {name}", "i2i_task" if i2i else "task")
        return known[name]

    def sampling_of(self, task: Task) -> dict[str, float]:
        """Returns the default values of `SamplingConfig` for a task, where they differ from those of the class."""
        return {**self.sampling, **task.sampling}


FIRST = Family(
    generation=1,
    name="Lumina-mGPT",
    cell=16,
    image_code_offset=4,
    num_image_codes=8192,
    codes_are_named=True,
    image_tokenizer="vqgan",
    context=10240,
    answers_in_text=True,
    fits_fp16=False,
    tasks=FIRST_TASKS,
    i2i_tasks=FIRST_I2I_TASKS,
    sampling=MappingProxyType({"top_k": 2000}),
    drops_earlier_images=True,  # as the paper says; the released code drops no context
)
SECOND = Family(
    generation=2,
    name="Lumina-mGPT 2.0",
    cell=8,
    image_code_offset=155000,
    num_image_codes=16384,
    codes_are_named=False,
    image_tokenizer="movqgan",
    context=0,
    answers_in_text=False,
    fits_fp16=True,
    tasks=TASKS,
    i2i_tasks=I2I_TASKS,
    plain_share=0.1,
)
FAMILIES: Mapping[int, Family] = MappingProxyType({family.generation: family for family in (FIRST, SECOND)})


# What weights of the second generation can be trained on besides the tasks of their family: `abilities` of config.json.
# Name -> its settings with their largest values.
ABILITIES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {"text": {}, "detect": {}, "multiview": {"views": 1000, "side": 2**16}}
)


def check_abilities(abilities: Mapping[str, Any], generation: int) -> None:
    """Refuses abilities that are not known, and wrong settings of them.

    Args:
        abilities: name -> settings, as in `config.json`: `text` (answers in words), `detect` and `multiview` (the tasks
            of the first generation). Settings of `multiview` are its default number of `views`, and their `side` in
            pixels.
        generation: generation of the checkpoint.

    Raises:
        InputError: as above, or the checkpoint is of the first generation, which has all abilities.
    """
    name = "abilities"
    require(generation == 2, name, abilities, "must be absent for generation 1, which has all abilities")
    for ability, settings in abilities.items():
        require(ability in ABILITIES, name, ability, f"must be of {', '.join(ABILITIES)}")
        known = ABILITIES[ability]
        fits = isinstance(settings, dict) and settings.keys() <= known.keys()
        rule = f"must have settings of {', '.join(known)}" if known else "must have no settings: {}"
        require(fits, f"{name}.{ability}", settings, rule)
        for key, value in settings.items():
            rule = f"must be a whole number in 1 ... {known[key]}"
            whole_number(f"{name}.{ability}.{key}", value, 1, known[key], rule)
    side = abilities.get("multiview", {}).get("side", 32)
    require(side % 32 == 0, f"{name}.multiview.side", side, "must be a multiple of 32")


def with_abilities(family: Family, abilities: Mapping[str, Any] | None) -> Family:
    """Returns a family whose checkpoints can do more: `abilities` as in `check_abilities`, None for nothing more."""
    if not abilities:
        return family
    tasks, i2i_tasks = dict(family.tasks), dict(family.i2i_tasks)
    if "multiview" in abilities:
        tasks["multiview"] = replace(FIRST_TASKS["multiview"], **abilities["multiview"])
    if "detect" in abilities:
        i2i_tasks["detect"] = FIRST_I2I_TASKS["detect"]
    return replace(
        family,
        answers_in_text=family.answers_in_text or "text" in abilities,
        tasks=MappingProxyType(tasks),
        i2i_tasks=MappingProxyType(i2i_tasks),
        drops_earlier_images=True,  # guidance in a conversation needs images without their context, too
    )


def task_names(i2i: bool = False) -> tuple[str, ...]:
    """Returns the names of the tasks of all families.

    Args:
        i2i: whether a picture is given.
    """
    tables = [family.i2i_tasks if i2i else family.tasks for family in (SECOND, FIRST)]
    return tuple(dict.fromkeys(name for table in tables for name in table))


def family_of(folder: Path) -> Family:
    """Returns the family of a checkpoint folder whose `config.json` does not name it.

    The tokenizers of the first generation have a name for each image code. A folder without a tokenizer counts as the
    second generation.
    """
    path = folder / "tokenizer.json"
    try:
        return FIRST if f'"{FIRST_CODE_NAME}"' in path.read_text(encoding="utf-8") else SECOND
    except (OSError, UnicodeDecodeError):  # `Vocabulary.from_folder` reports what is wrong with the file
        return SECOND
