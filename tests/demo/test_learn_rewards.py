"""The demonstration of rewards: its prompts, its reward, and its commands with few prompts."""

import json

import emoji
import learn_rewards
import numpy as np
import pytest
import rewards
import scenes
from emoji import CELL
from scenes import Scene

from lumina_mgpt.errors import InputError


@pytest.fixture
def pictures(monkeypatch) -> dict[str, np.ndarray]:
    """Discs of different colours in place of the emoji, which are not part of the repository."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    made = {}
    for n, name in enumerate(["hedgehog", "owl", "grapes"]):
        rgba = np.zeros((CELL, CELL, 4), np.float32)
        rgba[..., n], rgba[..., 3] = 0.8, np.hypot(x, y) < 20 + 8 * n
        made[name] = rgba
    monkeypatch.setattr(rewards, "emoji_pictures", lambda: made)
    return made


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Writes the scenes of prompts where `rewards.right` finds them."""
    monkeypatch.setenv("DEMO_SCENES", str(tmp_path / "scenes.json"))
    rewards._asked.cache_clear()
    yield lambda row, known: rewards.write_scenes(tmp_path / "scenes.json", row, known)
    rewards._asked.cache_clear()


def test_the_reward_is_the_mean_of_the_scores(pictures, asked):
    wanted = Scene(("owl",), "red")
    asked("one emoji", {"an owl on red": wanted})
    drawn = [wanted, Scene(("grapes",), "red"), Scene(("owl",), "blue"), Scene(("grapes",), "blue")]
    images = [scenes.render(scene, pictures) for scene in drawn]
    found = rewards.right(images, ["an owl on red"] * 4)
    assert found[0] == 1 and found[1] == 0.5 and found[2] <= 0.5 and found[3] == 0
    with pytest.raises(InputError, match="'a cat' is not in DEMO_SCENES"):
        rewards.right(images[:1], ["a cat"])


def test_both_emoji_must_be_right(pictures, asked):
    wanted = Scene(("owl", "grapes"), "red", "beside")
    asked("two emoji", {"an owl left of grapes": wanted})
    drawn = [wanted, Scene(("grapes", "owl"), "red", "beside"), Scene(("owl", "hedgehog"), "red", "beside")]
    found = rewards.right([scenes.render(scene, pictures) for scene in drawn], ["an owl left of grapes"] * 3)
    assert found == [1, 0.5, 0.5]


@pytest.mark.parametrize("row, emoji", [("one emoji", 1), ("two emoji", 2)])
def test_prompts_to_train_on_are_of_other_scenes(row, emoji):
    training, held_out = (learn_rewards.prompts_of(held, 300, 0, row) for held in (False, True))
    assert len(training) == len(held_out) == 300 and not set(training.values()) & set(held_out.values())
    assert all(scene.held_out and len(scene.names) == emoji for scene in held_out.values())
    assert len({scene.size for scene in (*training.values(), *held_out.values())}) == 1
    assert learn_rewards.prompts_of(True, 300, 0, row) == held_out
    with pytest.raises(InputError, match="prompts must be at most about"):
        learn_rewards.prompts_of(True, 100_000, 0, "one emoji")


def test_measurements_have_the_same_noise_and_are_compared(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji, "fetch", lambda folder: None)
    start = ["--out_dir", str(tmp_path)]
    few = ["--prompts", "3", "--several", "3", "--repeats", "2", "--device", "cpu", "--model_path", "assets/demo"]
    for name in ("before", "after"):
        assert learn_rewards.main(["measure", *start, "--name", name, *few]) == 0
    before, after = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("before", "after"))
    assert before == after and len(before["prompts"]) == len(before["scores"]["right background"]) == 3
    after["scores"]["right background"] = [2 + value for value in before["scores"]["right background"]]
    before["distances"], after["distances"] = [0.2, 0.4], [0.3]
    for name, figures in (("before", before), ("after", after)):
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
    assert learn_rewards.main(["compare", *start]) == 0
    text = capsys.readouterr().out
    assert "+2.000 ± 0.000" in text and "0.3000 -> 0.3000, 100%" in text
    assert (tmp_path / "compared.png").exists()
    after["prompts"][0] = "another"
    (tmp_path / "after.json").write_text(json.dumps(after))
    assert learn_rewards.main(["compare", *start]) == 2
