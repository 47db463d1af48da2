"""The first generation of checkpoints: ids, labels and sizes equal those of the released code."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import FAMILIES, FIRST, SECOND
from lumina_mgpt.images import candidate_sizes
from lumina_mgpt.prompts import FIRST_I2I_TASKS, FIRST_TASKS, PICTURE
from lumina_mgpt.unirep import ImageLayout, encode_conversation, generation_prompt
from lumina_mgpt.vocabulary import Vocabulary

ROLES = {"human": "human", "gpt": "assistant"}


@pytest.fixture(scope="module")
def config(oracle_v1_checkpoint) -> ModelConfig:
    return ModelConfig.from_json(oracle_v1_checkpoint("image") / "config.json")


@pytest.fixture(scope="module")
def vocabulary(oracle_v1_checkpoint, config) -> Vocabulary:
    return Vocabulary.from_folder(oracle_v1_checkpoint("image"), config)


@pytest.fixture(scope="module")
def codes(oracle_v1_dir) -> dict[str, torch.Tensor]:
    """File name of a picture -> its codes (rows, cols)."""
    golden = load_file(oracle_v1_dir / "vqgan_tiny_golden.safetensors")
    return {path.name: golden[f"{path.name[0]}.codes"].long() for path in oracle_v1_dir.glob("[a-e]_*.png")}


def turns(item: dict, codes: dict) -> list:
    """Turns of a record, with code grids in the places of its picture marks."""
    pictures = iter(item["image"])
    found = []
    marked = any(PICTURE in (turn["value"] or "") for turn in item["conversations"])
    prefix = "" if marked else (PICTURE + " ") * len(item["image"])  # pictures without marks come first
    for index, turn in enumerate(item["conversations"]):
        if turn["value"] is None:
            continue
        before, *after = ((prefix if index == 0 else "") + turn["value"]).split(PICTURE)
        parts = [before]
        for text in after:
            parts += [codes[next(pictures)], text]
        found.append((ROLES[turn["from"]], [part for part in parts if not isinstance(part, str) or part]))
    return found


def read(folder, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_the_family_is_found_in_the_files(config, oracle_checkpoint):
    assert config.family is FIRST and (config.image_code_offset, config.num_image_codes) == (4, 8192)
    second = ModelConfig.from_json(oracle_checkpoint("mp2gqa256") / "config.json")
    assert second.family is SECOND and (second.image_code_offset, second.num_image_codes) == (155000, 16384)
    assert FAMILIES == {1: FIRST, 2: SECOND}


def test_a_written_config_names_its_generation(config, tmp_path):
    config.to_json(tmp_path / "config.json")
    assert ModelConfig.from_json(tmp_path / "config.json") == config
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"generation": 1', '"generation": 3')
    )
    with pytest.raises(InputError, match=r"generation must be 1 .* or 2 .*, got 3"):
        ModelConfig.from_json(tmp_path / "config.json")


def test_prompts_have_the_ids_of_the_released_code(oracle_v1_dir, vocabulary, codes):
    items = read(oracle_v1_dir, "prompts.json")
    assert len(items) == 16
    for name, item in items.items():
        assert generation_prompt(turns(item, codes), vocabulary) == item["ids"], name


def test_training_items_have_the_labels_of_the_released_code(oracle_v1_dir, vocabulary, codes):
    items = read(oracle_v1_dir, "train_items.json")
    for name, item in items.items():
        assert encode_conversation(turns(item, codes), vocabulary) == (item["ids"], item["labels"]), name


def test_instructions_of_tasks_are_those_of_the_released_code(oracle_v1_dir):
    items = read(oracle_v1_dir, "prompts.json")
    first = {name: item["conversations"][0]["value"] for name, item in items.items()}

    def text(task, prompt=""):
        return task.instruction(prompt, 64, 64)

    assert text(FIRST_TASKS["multiview"], "A red samurai helmet") == first["multiview"]
    assert text(FIRST_I2I_TASKS["edit"], "Add a spoon.") == first["edit"]
    assert text(FIRST_I2I_TASKS["no_edit"]) == first["no_edit"]
    assert text(FIRST_I2I_TASKS["detect"], "The red apple.") == first["detect"]
    assert text(FIRST_I2I_TASKS["depth"], "An ice cream with pink color.") == first["condition_to_image"]
    maps = {text(FIRST_I2I_TASKS[f"predict_{name}"]) for name in ("depth", "normal", "openpose", "segmentation")}
    assert maps <= set(first.values())
    parts = FIRST_I2I_TASKS["depth"].parts("x", 1, 2)
    assert parts[-2:] == [None, ""] and "".join(PICTURE if part is None else part for part in parts) == text(
        FIRST_I2I_TASKS["depth"], "x"
    )


def test_sizes(oracle_v1_dir, vocabulary):
    crops = read(oracle_v1_dir, "crops.json")
    for target, sizes in crops.items():
        assert [list(size) for size in candidate_sizes(int(target))] == sizes
    layout = ImageLayout.from_pixels(vocabulary, 768, 768)
    assert (layout.rows, layout.cols, layout.length, layout.size) == (48, 48, 2356, (768, 768))
    assert ImageLayout.from_pixels(vocabulary, 384, 384).length == 604


def test_names_of_codes_are_checked_and_refused_in_texts(oracle_v1_checkpoint, vocabulary, config):
    with pytest.raises(InputError, match="IMGIMGBAZ"):
        vocabulary.encode_text("a cat IMGIMGBAZ")
    with pytest.raises(InputError, match="'IMGIMGAZ' must have id 5, got 4"):
        Vocabulary.from_folder(oracle_v1_checkpoint("image"), replace(config, image_code_offset=5))


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(
        InputError, match=r"i2i_task.*must be a task of Lumina-mGPT: depth, normal.*got canny"
    ) as caught:
        FIRST.task("canny", i2i=True)
    assert caught.value.parameter == "i2i_task"
    assert SECOND.task("canny") is SECOND.tasks["canny"]


SIZES = {"vocab_size": 3328, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "image_code_offset": 1024, "num_image_codes": 2048}
ABILITIES = {"text": {}, "detect": {}, "multiview": {"views": 8, "side": 64}}


def test_a_checkpoint_can_name_more_abilities_than_its_family_has(tmp_path):
    plain = ModelConfig(**SIZES, **HEADS)
    config = replace(plain, abilities=ABILITIES)
    family = config.family
    assert family.answers_in_text and family.drops_earlier_images and not SECOND.answers_in_text
    multiview = family.task("multiview")
    assert multiview == replace(FIRST_TASKS["multiview"], views=8, side=64) and "multiview" not in SECOND.tasks
    assert family.task("detect", i2i=True) == FIRST_I2I_TASKS["detect"] and "detect" not in SECOND.i2i_tasks
    assert set(SECOND.tasks) < set(family.tasks) and set(SECOND.i2i_tasks) < set(family.i2i_tasks)
    assert plain.family is SECOND
    for written in (config, plain):
        written.to_json(tmp_path / "config.json")
        assert ModelConfig.from_json(tmp_path / "config.json") == written
    assert "abilities" not in json.loads((tmp_path / "config.json").read_text())
    assert replace(plain, abilities={"text": {}}).family.tasks == SECOND.tasks


@pytest.mark.parametrize(
    ("abilities", "message"),
    [
        ({"sing": {}}, "abilities must be of text, detect, multiview, got"),
        ({"text": {"views": 8}}, "abilities.text must have no settings"),
        ({"multiview": {"angle": 8}}, "abilities.multiview must have settings of views, side"),
        ({"multiview": {"views": 0}}, "abilities.multiview.views must be a whole number in 1 ... 1000"),
        ({"multiview": {"views": 8, "side": 65}}, "abilities.multiview.side must be a multiple of 32"),
        ({"multiview": 8}, "abilities.multiview must have settings"),
        ("text", "abilities must be null or an object"),
    ],
)
def test_unknown_abilities_and_settings_are_refused(abilities, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(**SIZES, **HEADS, abilities=abilities)


def test_the_first_generation_has_no_further_abilities(config):
    with pytest.raises(InputError, match="abilities must be absent for generation 1"):
        replace(config, abilities={"text": {}})
