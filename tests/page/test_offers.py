"""What the page offers, its settings and its command lines, without a browser."""

import shlex

import pytest

from lumina_mgpt import Checkpoint
from lumina_mgpt.cli import generate, tasks
from lumina_mgpt.errors import InputError
from lumina_mgpt.page.offers import Offer, computes_map, task_label
from lumina_mgpt.page.settings import Settings, command_line, request_command
from lumina_mgpt.prompt_files import other_examples
from lumina_mgpt.prompts import I2I_TASKS
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.resources import demo_checkpoint
from lumina_mgpt.server.faults import ApiError
from lumina_mgpt.server.limits import Limits

FIELDS = dict(size="96x64", n=2.0, seed=7, random_seed=False, cfg=2.5, top_k=100.0, temperature=0.1, faster=True)


def read(**changes: object) -> Settings:
    return Settings.read(Limits(), **{**FIELDS, **changes})


def test_the_demo_offers_its_sizes_tasks_and_names():
    offer = Offer.of(Checkpoint.open(demo_checkpoint()))
    assert offer.sizes[0] == "96x96" and {"192x96", "96x192"} <= set(offer.sizes)
    assert list(offer.tasks)[:2] == ["t2i", "depth"] and "depth" in offer.picture_tasks
    assert offer.edit is I2I_TASKS["edit"] and "edit" not in offer.picture_tasks
    assert "hedgehog" in offer.names and offer.examples[0] == "a hedgehog on a sky blue background"


UNSHOWN = ('{"chat": ["\\u001b[2J"]}', '{"chat": ["half of \\ud83d"]}', '{"edit": ["a\\r\\nb"]}')


def test_other_examples(tiny_checkpoint, tmp_path):
    others = Offer.of(Checkpoint.open(tiny_checkpoint)).others
    assert others["edit"] == ("make the background red",) and set(others) == {"edit", "subject", "chat"}
    assert other_examples(tmp_path) == {}
    for content in (
        '["a"]',
        '{"sing": ["a"]}',
        '{"chat": "a"}',
        '{"chat": ["a", " "]}',
        '{"chat": [1]}',
        "{",
        *UNSHOWN,
    ):
        (tmp_path / "examples.json").write_text(content)
        with pytest.raises(InputError, match="examples.json"):
            other_examples(tmp_path)


def test_every_offered_size_fits_the_checkpoint(tiny_checkpoint, oracle_v1_checkpoint):
    for folder in (tiny_checkpoint, demo_checkpoint(), oracle_v1_checkpoint("mixed")):
        checkpoint = Checkpoint.open(folder)
        for size in Offer.of(checkpoint).sizes:
            width, height = map(int, size.split("x"))
            checkpoint.prepare(GenerationRequest(["a cat"], width, height))


def test_tasks_of_the_first_generation(oracle_v1_checkpoint):
    offer = Offer.of(Checkpoint.open(oracle_v1_checkpoint("mixed")))
    assert list(offer.tasks) == ["t2i"]  # a multiview answer is no single image
    labels = [task_label(name, task) for name, task in offer.picture_tasks.items()]
    assert len(set(labels)) == len(labels) and "the picture again" in labels
    assert computes_map("canny") and not computes_map("depth")


@pytest.mark.parametrize(
    ("prompt", "name", "expected"),
    [
        ("a hedgehog on a sky blue background", "owl", "an owl on a sky blue background"),
        ("Two slice of pizza", "cat", "Two cat"),
        ("something else", "red apple", "a red apple"),
        ("", "owl", "an owl"),
    ],
)
def test_a_name_replaces_the_known_one(tiny_checkpoint, prompt, name, expected):
    assert Offer.of(Checkpoint.open(tiny_checkpoint)).with_name(prompt, name) == expected


def test_settings_are_read_from_the_fields():
    settings = read()
    assert (settings.size, settings.n, settings.sampling.top_k) == ((96, 64), 2, 100)
    assert read(size=" 96 × 64 ").size == (96, 64) and read(size=None).size is None
    assert len({read(random_seed=True).sampling.seed for _ in range(4)}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": None}, "seed must not be empty"),
        ({"cfg": None}, "cfg must not be empty"),
        ({"n": None}, "n must not be empty"),
        ({"n": 11}, "1 ... 10"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"size": "big"}, "WIDTHxHEIGHT"),
        ({"size": "99999x99999"}, "pixels"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises((InputError, ApiError), match=message.replace(".", r"\.")):
        read(**changes)


@pytest.mark.parametrize("prompt", ['it\'s a "cat" & $HOME', "--n 3", "-x", "two\nlines"])
def test_the_command_line_has_the_same_values(prompt):
    settings, request = read(), GenerationRequest([prompt])
    words = request_command("t2i", request, None)
    line = shlex.split(command_line(*words, *settings.options((96, 64)), options=["--device", "cpu"]))
    assert line[:2] == ["lumina-mgpt", "generate"]
    plan = tasks.read_plan(generate.build_parser().parse_args(line[2:]))
    assert plan.request.prompts == (prompt,)
    assert (plan.request.width, plan.request.height, plan.request.n) == (96, 64, 2)
    assert plan.request.sampling == settings.sampling and plan.request.speculation == settings.speculation
