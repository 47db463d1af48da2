"""Image tasks of the demo: examples, training records, and measures of the evaluation."""

import json
import random
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import emoji
import evaluation
import numpy as np
import omni
import pytest
import scenes
from commands import module_of
from emoji import CELL
from PIL import Image
from scenes import Scene

from lumina_mgpt import Checkpoint, Pipeline, prompt_files
from lumina_mgpt.config import ModelConfig
from lumina_mgpt.data.inputs import read_input
from lumina_mgpt.data.job import PreTokenizeConfig
from lumina_mgpt.data.pre_tokenize import PreTokenizer
from lumina_mgpt.data.shards import read_sequence
from lumina_mgpt.prompts import I2I_TASKS
from lumina_mgpt.unirep import IGNORED, encode_image
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

ROOT = Path(__file__).parents[2]
NAMES = ["hedgehog", "owl", "grapes"]


@pytest.fixture(scope="module")
def pictures() -> dict[str, np.ndarray]:
    """Striped discs of different colours and sizes with three real names; the emoji are not in the repository."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    made = {}
    for n, name in enumerate(NAMES):
        rgba = np.zeros((CELL, CELL, 4), np.float32)
        rgba[..., n] = 0.8
        rgba[..., (n + 1) % 3] = 0.8 * (np.abs(y) < 3 + 4 * n)
        rgba[..., 3] = np.hypot(x, y) < 20 + 8 * n
        made[name] = rgba
    return made


@pytest.mark.parametrize("kind", omni.KINDS)
def test_held_out_scenes_are_evaluated_and_never_trained_on(kind):
    names = emoji.known_names()
    trained = omni.training_examples(kind, names, random.Random(0))
    assert len(trained) == omni.KINDS[kind].records
    assert not any(scene.held_out for example in trained for scene in (example.upper, example.lower))
    evaluated = omni.evaluation_examples(kind, names, 300, random.Random(0))
    assert len(evaluated) == 300 and all(example.held_out for example in evaluated)
    assert evaluated == omni.evaluation_examples(kind, names, 300, random.Random(0))


def test_prompts_rarely_name_what_the_panel_shows():
    names = emoji.known_names()

    def named(examples) -> float:
        """Share of prompts with the name, or the everyday name, of the object in the lower panel."""
        called = [(e, {*e.lower.names, *(emoji.ALIASES.get(name, name) for name in e.lower.names)}) for e in examples]
        return sum(any(name in e.prompt.lower() for name in known) for e, known in called) / len(examples)

    rng = random.Random(0)
    for kind, least, most in (("subject", 0.05, 0.1), ("predict_depth", 0.25, 0.35), ("canny", 0.25, 0.35)):
        assert least < named(omni.training_examples(kind, names, rng)) < most, kind
    assert named(omni.evaluation_examples("subject", names, 100, rng)) == 0
    assert named(omni.evaluation_examples("depth", names, 100, rng)) == 1
    assert {example.prompt for example in omni.evaluation_examples("predict_canny", names, 100, rng)} == {""}


def test_prompts_of_edits_describe_the_change():
    seen = set()
    for example in omni.training_examples("edit", NAMES, random.Random(0)):
        before, after, text = example.upper, example.lower, example.prompt
        assert "{" not in text and " a o" not in text and "  " not in text, text
        if text == "no edit":
            seen.add("nothing")
            assert before == after
        elif "background" in text:
            seen.add("background")
            assert before.names == after.names and before.color != after.color and after.color in text
        else:
            seen.add((len(before.names), len(after.names)))
            assert before.color == after.color and before.names != after.names
            assert all(name in text for name in before.names + after.names), text
    assert seen == {"nothing", "background", (1, 1), (1, 0), (0, 1)}


def test_panels_show_their_scenes(pictures):
    hedgehog, bare = Scene(("hedgehog",), "red"), Scene((), "red")
    both = omni.draw(omni.Example("edit", hedgehog, bare, "remove the hedgehog"), pictures)
    assert both.size == omni.SIZE
    upper, lower = both.crop((0, 0, CELL, CELL)), both.crop((0, CELL, CELL, 2 * CELL))
    assert upper.tobytes() == scenes.render(hedgehog, pictures).tobytes()
    assert lower.getcolors() == [(CELL * CELL, (255, 0, 0))]
    control = omni.draw(omni.Example("depth", hedgehog, hedgehog, ""), pictures)
    predicted = omni.draw(omni.Example("predict_depth", hedgehog, hedgehog, ""), pictures)
    assert control.crop((0, 0, CELL, CELL)).tobytes() == predicted.crop((0, CELL, CELL, 2 * CELL)).tobytes()


def test_identical_panels_have_the_same_key():
    owl, hedgehog = Scene(("owl",), "red"), Scene(("hedgehog",), "red")
    pair, predicted = (omni.Example(kind, owl, owl, "") for kind in ("pair_depth", "predict_depth"))
    edits = [omni.Example("edit", *panels, "") for panels in ((owl, hedgehog), (hedgehog, owl), (owl, owl))]
    assert pair.keys == predicted.keys == omni.Example("depth", owl, owl, "").keys[::-1]
    assert edits[0].keys == edits[1].keys[::-1] and edits[2].keys == 2 * edits[0].keys[:1] == 2 * pair.keys[:1]
    assert len({key for example in (pair, *edits) for key in example.keys}) == 3
    assert pair.keys[1] == omni.Example("depth", replace(owl, color="blue"), owl, "").keys[0]  # the same picture


@pytest.mark.parametrize("apart", [False, True])
def test_records_equal_the_ids_of_the_same_request(tiny_checkpoint, pictures, tmp_path, apart):
    """The ids before the image are those of generation; both panels have a loss."""
    examples = [omni.training_examples(kind, NAMES, random.Random(3))[7] for kind in omni.KINDS]
    lines = []
    for n, example in enumerate(examples):
        paths = [str(tmp_path / f"{n}-{panel}.png") for panel in ("upper", "lower")]
        for path, panel in zip(paths, omni.panels(example, pictures), strict=True):
            panel.save(path)
        lines.append(json.dumps(omni.record(example, paths)) + "\n")
    (tmp_path / "omni.jsonl").write_text("".join(lines))
    checkpoint = Checkpoint.open(tiny_checkpoint)
    tokenizer = ImageTokenizer.from_checkpoint(checkpoint.movqgan_path)
    config = PreTokenizeConfig(str(tmp_path / "tokens"), target_size=96, keep_size=True, panels_apart=apart)
    job = PreTokenizer(config, read_input(tmp_path / "omni.jsonl"), checkpoint.vocabulary, tokenizer)
    job.run()
    assert (job.good, job.bad) == (len(examples), 0)
    for n, example in enumerate(examples):
        sequence = read_sequence(job.files.shard(0), n)
        layout = checkpoint.layout(*omni.SIZE, example.task)
        (start,) = checkpoint.prompt_ids([example.prompt], layout, example.task, example.shown)
        codes = tokenizer.encode([omni.draw(example, pictures)], 2 if apart else 1)[0]
        image = encode_image(codes, checkpoint.vocabulary) + [checkpoint.vocabulary.turn_end_id]
        assert sequence.ids.tolist() == start + image
        assert sequence.labels.tolist() == [IGNORED] * len(start) + image


def test_make_data_writes_only_image_tasks(pictures, tmp_path, monkeypatch, capsys):
    script = module_of("make_data")
    few = {kind: replace(entry, records=5) for kind, entry in omni.KINDS.items()}
    monkeypatch.setattr(omni, "KINDS", few)
    monkeypatch.setattr(emoji, "fetch", lambda folder: None)
    monkeypatch.setattr(emoji, "load", lambda folder: pictures)
    monkeypatch.setattr(emoji, "known_names", lambda: NAMES)
    assert script.main(["--out_dir", str(tmp_path), "--omni"]) == 0 and "45 records" in capsys.readouterr().out
    given, drawn = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("omni", "pairs")
    )
    rows = given + drawn
    assert {row["task"] for row in drawn} == {"pair_depth", "pair_canny"}
    assert {row["task"] for row in given} == set(few) - {"pair_depth", "pair_canny"}
    panels = [panel for row in rows for panel in row["image"][0]]
    assert len(panels) == 2 * len(rows) and {Image.open(panel).size for panel in panels} == {(CELL, CELL)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["omni.jsonl", "pairs.jsonl", "pictures"]


@pytest.mark.parametrize("name", ["make_data", "evaluate"])
def test_output_folder_that_cannot_be_created_is_a_one_line_error(pictures, tmp_path, monkeypatch, capsys, name):
    script, taken = module_of(name), tmp_path / "file"
    taken.write_text("kept")
    monkeypatch.setattr(emoji, "fetch", lambda folder: None)
    monkeypatch.setattr(emoji, "load", lambda folder: pictures)
    monkeypatch.setattr(emoji, "known_names", lambda: NAMES)
    assert script.main(["--out_dir", str(taken / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {taken}") and taken.read_text() == "kept"


def test_make_data_writes_pictures_captions_and_a_tokenizer(pictures, tmp_path, monkeypatch, capsys):
    script = module_of("make_data")
    monkeypatch.setattr(script, "LOOSE", 2)
    monkeypatch.setattr(emoji, "fetch", lambda folder: None)
    monkeypatch.setattr(emoji, "load", lambda folder: pictures)
    monkeypatch.setattr(emoji, "known_names", lambda: NAMES)
    assert script.main(["--out_dir", str(tmp_path), "--pairs", "3"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    sizes = {row["image_path"]: Image.open(row["image_path"]).size for row in rows}
    singles = [scene for scene in scenes.all_singles(NAMES) if not scene.held_out]
    assert list(sizes.values()).count((CELL, CELL)) == len(singles) and len(sizes) == len(singles) + 3
    assert f"{len(rows)} records of {len(sizes)} pictures" in capsys.readouterr().out
    for name in ("maps", "panels", "loose"):
        assert any((tmp_path / "pictures" / name).iterdir())
    folder = tmp_path / "tokenizer"
    vocabulary = Vocabulary.from_folder(folder, ModelConfig.from_json(folder / "config.json"))
    assert all(vocabulary.encode_text(row["prompt"]) for row in rows)
    assert len(prompt_files.example_prompts(folder)) == 5 and prompt_files.known_names(folder) == sorted(NAMES)


# -- measures ----------------------------------------------------------------------------------------------------------


def lines(*columns: int) -> Image.Image:
    pixels = np.zeros((CELL, CELL), np.uint8)
    pixels[:, list(columns)] = 255
    return Image.fromarray(pixels)


def test_edge_f1_has_a_tolerance_of_one_pixel():
    assert evaluation.edge_f1(lines(10, 50), lines(10, 50)) == evaluation.edge_f1(lines(11), lines(10)) == 1
    assert evaluation.edge_f1(lines(12), lines(10)) == 0
    assert evaluation.edge_f1(lines(10), lines(10, 50)) == pytest.approx(2 / 3)  # precision 1, recall 0.5
    assert evaluation.edge_f1(lines(), lines(10)) == 0 and evaluation.edge_f1(lines(), lines()) == 1


def test_correlation_and_iou():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    inverse, flat = Image.eval(ramp, lambda value: 255 - value), Image.new("L", (16, 16), 80)
    assert evaluation.correlation(ramp, ramp) == pytest.approx(1) == -evaluation.correlation(ramp, inverse)
    assert evaluation.correlation(flat, ramp) == 0
    truth = Image.new("RGB", (4, 4))
    truth.paste(scenes.OBJECT_COLORS[0], (0, 0, 4, 2))
    near = Image.new("RGB", (4, 4), (20, 10, 10))
    near.paste((200, 70, 80), (0, 0, 4, 1))
    assert evaluation.mean_iou(truth, truth) == 1
    assert evaluation.mean_iou(near, truth) == pytest.approx((4 / 8 + 8 / 12) / 2)


def test_measures_distinguish_centred_shapes():
    """An upright and a lying bar overlap in a third of the picture; correlation and mean IoU stay high."""
    upright, lying = Image.new("RGB", (CELL, CELL)), Image.new("RGB", (CELL, CELL))
    upright.paste(scenes.OBJECT_COLORS[0], (30, 18, 66, 78))
    lying.paste(scenes.OBJECT_COLORS[0], (18, 30, 78, 66))
    assert evaluation.correlation(upright, lying) > 0.4 > evaluation.shape_correlation(upright, lying)
    assert evaluation.mean_iou(upright, lying) > 0.6 > 0.4 > evaluation.outline_f1(upright, lying)
    ramp = Image.linear_gradient("L")
    assert evaluation.shape_correlation(ramp, ramp) == evaluation.outline_f1(lying, lying) == pytest.approx(1)
    assert evaluation.shape_correlation(*2 * [Image.new("RGB", (8, 8))]) == 0, "nothing is near in either"


def test_summary_is_a_share_of_booleans_or_a_mean_of_numbers():
    assert str(evaluation.summary([True, False])).endswith(" %")
    mean = evaluation.summary([0.2, 0.4, 0.6])
    assert (mean.value, mean.error) == (pytest.approx(0.4), pytest.approx(0.2 / 3**0.5))


@pytest.mark.parametrize("kind", omni.KINDS)
def test_true_images_have_full_scores_and_others_do_not(kind, pictures):
    upper = Scene(("hedgehog",), "navy")
    same = {"edit": Scene(("owl",), "navy"), "subject": Scene(("hedgehog",), "pink")}.get(kind, upper)
    wrong = Scene(("grapes",), "yellow")
    truth, other = omni.Example(kind, upper, same, ""), omni.Example(kind, wrong, wrong, "")
    best = [1] * len(evaluation.SCORES[kind])
    assert evaluation.scores(truth, omni.draw(truth, pictures), pictures) == pytest.approx(best)
    assert max(evaluation.scores(truth, omni.draw(other, pictures), pictures)) < 0.8


def test_removal_must_keep_the_background(pictures):
    before = Scene(("owl",), "navy")
    removed = omni.Example("edit", before, Scene((), "navy"), "remove the owl")
    assert evaluation.scores(removed, omni.draw(removed, pictures), pictures) == [True]
    for lower in (before, Scene((), "pink")):
        assert evaluation.scores(removed, omni.draw(replace(removed, lower=lower), pictures), pictures) == [False]


def test_shuffling_changes_only_the_panel_or_the_prompt():
    script = module_of("evaluate")
    examples = omni.evaluation_examples("edit", NAMES, 4, random.Random(0))
    others = script.shuffled(examples)
    assert set(others) == {"panel", "prompt"}
    for n, example in enumerate(examples):
        following = examples[(n + 1) % len(examples)]
        assert others["panel"][n] == replace(example, upper=following.upper)
        assert others["prompt"][n] == replace(example, prompt=following.prompt)
    assert set(script.shuffled(omni.evaluation_examples("pair_depth", NAMES, 4, random.Random(0)))) == {"prompt"}
    assert set(script.shuffled(omni.evaluation_examples("predict_depth", NAMES, 4, random.Random(0)))) == {"panel"}


@pytest.mark.slow
def test_evaluation_runs_on_the_demo_checkpoint(pictures, tmp_path, monkeypatch, capsys):
    script = module_of("evaluate")
    monkeypatch.setattr(emoji, "fetch", lambda folder: None)
    monkeypatch.setattr(emoji, "load", lambda folder: pictures)
    monkeypatch.setattr(emoji, "known_names", lambda: NAMES)
    todo = [Scene((name,), color) for name, color in (("owl", "red"), ("grapes", "navy"))]
    monkeypatch.setattr(scenes, "evaluation_scenes", lambda *_: (todo, []))
    rows = ["one emoji", "predict_depth", "depth unnamed"]
    options = ["--out_dir", str(tmp_path), "--prompts", "2", "--shuffled", "2", "--cfg", "1", "--rows", *rows]
    assert script.main(["--model_path", str(ROOT / "assets" / "demo"), *options]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["prompts"], figures["cfg"]) == (2, 1)
    assert set(figures["one emoji"]) == {"all objects", "each object", "background", "reconstruction"}
    assert set(figures["predict_depth: correlation"]) == {"value", "panel", "tokenizer"}
    assert figures["predict_depth: correlation"]["tokenizer"][0] > 0.9
    assert set(figures["depth unnamed: right emoji"]) == {"value", "panel", "prompt", "tokenizer"}
    printed = capsys.readouterr().out
    assert "| one emoji | 2 |" in printed and "| predict_depth | correlation | 2 |" in printed
    sheets = {path.name for path in tmp_path.glob("*.png")}
    assert sheets == {"text_to_image.png", "predict_depth.png", "depth_unnamed.png"}


def test_batches_of_an_evaluation_have_different_noise(tiny_checkpoint, monkeypatch):
    script, asked = module_of("evaluate"), []
    monkeypatch.setattr(script, "_BATCH", 2)
    monkeypatch.setattr(Pipeline, "stream", lambda self, request: asked.append(request) or request.prompts)
    pipeline, args = Pipeline.from_pretrained(tiny_checkpoint, "cpu"), Namespace(cfg=3, seed=50)
    prompts, panels = list("abcde"), list("ABCDE")
    assert list(script.drawn(pipeline, prompts, (32, 64), args, panels, task=I2I_TASKS["edit"])) == prompts
    assert [request.sampling.seed for request in asked] == [50, 52, 54]
    assert [request.panels for request in asked] == [("A", "B"), ("C", "D"), ("E",)]


def test_means_of_rows_have_standard_errors():
    script = module_of("evaluate")
    rows = {row: {"objects right": [0.9, 0.03], "tokenizer": [1.0, 0.0]} for row in script.drawing_rows.CATEGORIES}
    rows |= {"two": {"objects right": [0.6, 0.04]}, "question what": {"right": [1.0, 0.0]}}
    found = script.means(rows)
    assert set(found) == {"six categories, mean", "six categories, least"} and found["six categories, least"] == 0.6
    assert found["six categories, mean"] == pytest.approx([0.85, (5 * 0.03**2 + 0.04**2) ** 0.5 / 6])
