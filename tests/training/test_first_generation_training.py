"""Training, export and conversion of first-generation checkpoints: against the released code, and end to end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import main_of
from first_generation import (
    divisible_checkpoint,
    oracle_records,
    pre_tokenize,
    sequences_in,
    vocabulary_of,
    with_encoder_inside,
)
from records import write_records
from safetensors.torch import load_file, save_file
from training_runs import ONE, changed, metrics_of, weights_of

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.data.batches import Planned, collate
from lumina_mgpt.data.dataset import TokenDataset
from lumina_mgpt.data.sources import Source
from lumina_mgpt.errors import InputError
from lumina_mgpt.image_tokenizer import load_image_tokenizer
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.training import loss, run_folder
from lumina_mgpt.training.loss import LossModel
from lumina_mgpt.training.options import TrainingConfig
from lumina_mgpt.training.trainer import Trainer
from lumina_mgpt.vqgan.tokenizer import look_for_image_tokenizer

CODES = slice(4, 8196)


@pytest.fixture(scope="module")
def checkpoint(oracle_v1_checkpoint):
    return oracle_v1_checkpoint("image")


@pytest.fixture(scope="module")
def data(oracle_v1_dir, checkpoint, tmp_path_factory) -> Path:
    """A data file over the oracle's training records, made by the commands."""
    folder = tmp_path_factory.mktemp("first")
    records, _ = oracle_records(oracle_v1_dir, folder)
    assert pre_tokenize(write_records(folder, records), folder / "out", checkpoint) == 0
    joined = folder / "records.jsonl"
    line = ["--sub_record_dir", str(folder / "out"), "--save_path", str(joined)]
    assert main_of("concat_records")(line) == 0
    (folder / "data.yaml").write_text(f"META: [{{path: {joined}, type: image, ratio: 3}}]\n")
    return folder / "data.yaml"


@pytest.fixture
def run(data, checkpoint, tmp_path) -> TrainingConfig:
    """Four steps from the oracle's tiny checkpoint, in float32."""
    return TrainingConfig.of(
        data_config=str(data),
        output_dir=str(tmp_path / "run"),
        init_from=str(checkpoint),
        batch_size=2,
        max_steps=4,
        lr=1e-3,
        warmup=0.25,
        precision="fp32",
        dropout=0.1,
        save_iteration_interval=0,
    )


def line_of(settings: TrainingConfig) -> list[str]:
    """Command line of `finetune` for options that differ from their defaults."""
    defaults = {name: item.default for name, item in TrainingConfig.options().items()}
    given = {name: value for name, value in settings.flat().items() if value != defaults[name]}
    return [text for name, value in given.items() for text in (f"--{name}", *([] if value is True else [str(value)]))]


def require_complete(folder: Path, vqgan: str) -> ModelConfig:
    """Asserts that a folder is a first-generation checkpoint with tokenizer and image tokenizer. Returns its config."""
    written = json.loads((folder / "config.json").read_text())
    assert written["generation"] == 1 and written["image_code_offset"] == 4
    config = ModelConfig.from_json(folder / "config.json")
    assert vocabulary_of(folder).cell == 16
    assert (folder / "tokenizer_config.json").is_file() and (folder / "generation_config.json").is_file()
    path = look_for_image_tokenizer(folder, None, "vqgan")
    assert path == folder / vqgan
    images = load_image_tokenizer(folder, path, kind="vqgan")
    assert (images.kind, images.cell, images.num_codes) == ("vqgan", 16, 8192)
    return config


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("batch", ["all", "images"])
def test_losses_and_gradients_equal_those_of_the_released_code(
    oracle_v1_dir, checkpoint, data, monkeypatch, batch, chunked
):
    """Cross-entropy, z-loss and norms of gradients, of a batch with padding, within 1e-4 of their size."""
    wanted = json.loads((oracle_v1_dir / "loss_tiny.json").read_text())[batch]
    names = list(json.loads((oracle_v1_dir / "train_items.json").read_text()))
    if chunked:
        monkeypatch.setattr(loss, "WHOLE_LOGITS", 0)
    model = load_model(checkpoint, torch.float32, "cpu")
    plain = {
        name.removeprefix("model."): value for name, value in load_file(oracle_v1_dir / "tiny.safetensors").items()
    }
    model.load_state_dict(plain)  # the oracle's weights have no script
    dataset = TokenDataset([Source(str(data.parent / "records.jsonl"))], vocabulary_of(checkpoint))
    monkeypatch.setattr("lumina_mgpt.data.dataset.CONTEXT_DROPOUT", 0.0)
    chosen = [names.index(name) for name in wanted["items"]]
    planned = Planned(torch.tensor(chosen).numpy(), len(chosen), int(dataset.lengths.max()))
    micro = collate(dataset, planned, 0, 1)
    module = LossModel(model, wanted["z_loss_weight"])
    total, cross, z = module(micro.ids, micro.index, micro.targets)
    (total / micro.labelled).backward()
    assert cross.item() / micro.labelled == pytest.approx(wanted["cross_entropy"], rel=1e-4)
    assert z.item() / micro.labelled == pytest.approx(wanted["z_loss"], rel=1e-4)
    parameters = dict(model.named_parameters())
    norms = {name: parameters[name.removeprefix("model.")].grad.norm().item() for name in wanted["grad_norms"]}
    assert norms == pytest.approx(wanted["grad_norms"], rel=1e-4)


# -- the start ---------------------------------------------------------------------------------------------------------


def test_a_text_model_starts_with_zeros_in_the_head_of_image_codes(run, checkpoint):
    start = load_file(checkpoint / "model.safetensors")
    trainer = Trainer(changed(run, zero_image_head=True, ema=0.5), ONE)
    head, own = trainer.model.lm_head.weight.detach(), start["lm_head.weight"].float()
    assert not head[CODES].any() and own[CODES].any()
    assert torch.equal(head[: CODES.start], own[: CODES.start])
    assert torch.equal(head[CODES.stop :], own[CODES.stop :])
    assert torch.equal(trainer.model.embed_tokens.weight, start["model.embed_tokens.weight"].float())
    trainer.run()
    after = weights_of(run.output_dir)["lm_head.weight"]
    assert after[CODES].any()  # they are trained
    Trainer(changed(run, zero_image_head=True, ema=0.5, max_steps=6, resume="auto"), ONE).run()
    assert (weights_of(run.output_dir)["lm_head.weight"][CODES] - after[CODES]).abs().max() < 0.1  # zeroed once only


@pytest.mark.parametrize(
    "values, message",
    [
        ({"lora_rank": 2}, "zero_image_head cannot be used with lora_rank=2: the head is not trained"),
        ({"freeze_embeddings": True}, "zero_image_head cannot be used with freeze_embeddings=True"),
        ({"init_from": None, "model_config": "x", "tokenizer_path": "x"}, "with model_config=FILE: new weights"),
    ],
)
def test_a_zero_head_must_be_trained(values, message):
    base = dict(data_config="x", output_dir="x", init_from="x", batch_size=1, max_steps=1, zero_image_head=True)
    with pytest.raises(InputError, match=message):
        TrainingConfig.of(**(base | values))


def test_a_tied_head_cannot_be_zero(run, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "tied")
    weights = load_file(tmp_path / "tied" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "tied" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="zero_image_head needs a head of its own"):
        Trainer(changed(run, init_from=str(tmp_path / "tied"), zero_image_head=True), ONE)


def test_options_for_panels_are_refused(run, data):
    with pytest.raises(InputError, match="spare_panel must be 0 for Lumina-mGPT, whose images have no panels"):
        Trainer(changed(run, code_noise=0.5, spare_panel=0.5), ONE)
    given = data.with_name("given.yaml")
    given.write_text(data.read_text().replace("ratio: 3", "given: true"))
    with pytest.raises(InputError, match="data_config given of .* must be false"):
        Trainer(changed(run, data_config=str(given)), ONE)


def test_the_length_of_sequences_is_checked_against_the_context(run, checkpoint):
    """`max_position_embeddings` is smaller than the trained lengths: an export keeps it up to the family's context."""
    assert ModelConfig.from_json(checkpoint / "config.json").context == 10240
    with pytest.raises(InputError, match="max_seq_len must be at least .*, got 50: . of 4 sequences are longer"):
        Trainer(changed(run, max_seq_len=50), ONE)
    trainer = Trainer(changed(run, max_seq_len=50, overlong="drop"), ONE)
    assert trainer.dataset.lengths.max() <= 50
    assert trainer.model.config.max_position_embeddings == 4096


def test_contexts_are_dropped_as_the_family_says(run, settings):
    assert Trainer(run, ONE).dataset.several
    assert not Trainer(settings, ONE).dataset.several


# -- end to end --------------------------------------------------------------------------------------------------------


def test_from_records_to_images_by_the_commands(run, checkpoint, data, tmp_path):
    """finetune with a moving average, and samples on the way; its export draws."""
    shutil.copytree(checkpoint, tmp_path / "small")
    config = tmp_path / "small" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_size": 64}))  # of the sampled images
    settings = changed(run, init_from=str(config.parent), ema=0.5, sample_every=2, overlong="drop", device="cpu")
    (tmp_path / "small" / "vqgan.safetensors").rename(tmp_path / "named.safetensors")
    assert main_of("finetune")([*line_of(settings), "--vqgan_path", str(tmp_path / "named.safetensors")]) == 0
    output = Path(run.output_dir)
    assert len(metrics_of(output)) == 4 and len(list((output / "samples").iterdir())) == 3
    export = output / "export"
    assert require_complete(export, "vqgan.safetensors").max_position_embeddings == 4096
    assert (export / "vqgan.safetensors").read_bytes() == (checkpoint / "vqgan.safetensors").read_bytes()
    start, end = load_file(checkpoint / "model.safetensors"), load_file(export / "model.safetensors")
    assert start.keys() == end.keys() and not torch.equal(start["lm_head.weight"], end["lm_head.weight"])
    (result,) = Pipeline.from_pretrained(export, "cpu", "fp32").generate("a dog", 96, 64, cfg=1.0)
    assert result.image.size == (96, 64) and result.codes.shape == (4, 6)
    line = ["--output_dir", str(output), "--save_path", str(tmp_path / "now")]
    assert main_of("export")(line) == 0
    require_complete(tmp_path / "now", "vqgan.safetensors")


def test_a_resumed_run_equals_the_uninterrupted_one(run, tmp_path):
    base = changed(run, ema=0.9, max_steps=6)
    Trainer(base, ONE).run()
    broken = changed(base, output_dir=str(tmp_path / "broken"), save_iteration_interval=2, resume="auto")
    trainer = Trainer(broken, ONE)
    step = trainer._step
    trainer._step = lambda began: step(began) if trainer.at < 3 else (_ for _ in ()).throw(SystemExit)
    with pytest.raises(SystemExit):
        trainer.run()
    again = Trainer(broken, ONE)
    assert again.at == 2
    again.run()
    one, two = weights_of(base.output_dir), weights_of(broken.output_dir)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def without_generation(output_dir: str) -> None:
    """Makes the checkpoints of a run those of an earlier version, which did not store the generation."""
    for path in (Path(output_dir) / "checkpoints").glob("*/trainer.json"):
        state = json.loads(path.read_text())
        del state["identity"]["model_config"]["generation"], state["model"]["generation"], state["checksums"]
        del state["settings"]["zero_image_head"]
        path.write_text(json.dumps(state))
        (path.parent / "SHA256SUMS").unlink()


def test_a_run_of_a_version_without_generations_resumes_as_the_second(settings, run):
    Trainer(changed(settings, max_steps=2), ONE).run()
    without_generation(settings.output_dir)
    again = Trainer(changed(settings, max_steps=4, resume="auto"), ONE)
    assert again.at == 2
    again.run()
    first = changed(run, output_dir=run.output_dir + "-first", max_steps=1)
    Trainer(first, ONE).run()
    without_generation(first.output_dir)
    with pytest.raises(InputError, match="is of a run with another value: model_config"):
        Trainer(changed(first, resume="auto"), ONE)


def test_adapters_are_trained_and_merged(run, checkpoint, tmp_path):
    pytest.importorskip("peft")
    settings = changed(run, lora_rank=2, lr=1e-2, dropout=0.0)
    trainer = Trainer(settings, ONE)
    trainer.run()
    ids = torch.arange(8900, 8940)[None]
    with torch.no_grad():
        logits = trainer.model.eval().project(trainer.model(ids))
    line = ["--output_dir", run.output_dir, "--save_path", str(tmp_path / "adapter"), "--adapter"]
    assert main_of("export")(line) == 0
    merge = ["--model_path", str(checkpoint), "--adapter", str(tmp_path / "adapter"), "--save_path"]
    assert main_of("merge_lora")([*merge, str(tmp_path / "merged")]) == 0
    require_complete(tmp_path / "merged", "vqgan.safetensors")
    model = load_model(tmp_path / "merged", torch.float32, "cpu")
    with torch.no_grad():
        got = model.project(model(ids))
    # the merge rounds to bf16, the dtype of the checkpoint
    assert (got - logits).norm() < 0.05 * logits.norm()


# -- the image tokenizer in copies -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def divisible(oracle_v1_dir, tmp_path_factory) -> Path:
    return divisible_checkpoint(oracle_v1_dir, tmp_path_factory.mktemp("divisible") / "model")


def quantize(source: Path, target: Path) -> None:
    assert main_of("quantize")(["--model_path", str(source), "--save_path", str(target), "--group", "32"]) == 0


def test_a_quantized_copy_draws(divisible, checkpoint, oracle_v1_dir, tmp_path):
    shutil.copytree(divisible, tmp_path / "model")
    shutil.copyfile(checkpoint / "vqgan.safetensors", tmp_path / "model" / "vqgan.safetensors")
    shutil.copyfile(checkpoint / "generation_config.json", tmp_path / "model" / "generation_config.json")
    quantize(tmp_path / "model", tmp_path / "int4")
    assert require_complete(tmp_path / "int4", "vqgan.safetensors").int4_group == 32
    (result,) = Pipeline.from_pretrained(tmp_path / "int4", "cpu").generate("a dog", 64, 64)
    assert result.image.size == (64, 64)


def test_a_vqgan_in_the_subfolder_of_the_hub_is_copied(divisible, checkpoint, tmp_path):
    """Beside a VQGAN in the folder itself, it is left out: a copy with both could not be opened."""
    source, inner = tmp_path / "hub", tmp_path / "hub" / "original_tokenizers"
    shutil.copytree(divisible, source)
    shutil.copyfile(checkpoint / "generation_config.json", source / "generation_config.json")
    inner.mkdir()
    torch.save({"state_dict": load_file(checkpoint / "vqgan.safetensors")}, inner / "vqgan.ckpt")
    (inner / "text_tokenizer.json").write_text("{}")
    quantize(source, tmp_path / "one")
    require_complete(tmp_path / "one", "vqgan.ckpt")
    shutil.copyfile(checkpoint / "vqgan.safetensors", source / "vqgan.safetensors")
    quantize(source, tmp_path / "two")
    require_complete(tmp_path / "two", "vqgan.safetensors")
    assert not (tmp_path / "two" / "vqgan.ckpt").exists()


def test_an_encoder_inside_is_ignored_in_training_and_kept_in_an_export(run, checkpoint, data, oracle_v1_dir, tmp_path):
    """`model.vqmodel.*` is a file of its own in an export: it still encodes pictures, and asks for a file to draw."""
    inside = with_encoder_inside(checkpoint, tmp_path / "inside")
    trainer = Trainer(changed(run, init_from=str(inside)), ONE)
    assert isinstance(trainer.model, Transformer) and not any("vqmodel" in name for name in trainer.model.state_dict())
    trainer.run()
    names = weights_of(run.output_dir).keys()
    assert not any("vqmodel" in name for name in names)
    export = Path(run.output_dir) / "export"
    require_complete(export, "vqgan_encoder.safetensors")
    records, items = oracle_records(oracle_v1_dir, tmp_path)
    assert pre_tokenize(write_records(tmp_path, records), tmp_path / "out", export) == 0
    assert [sequence.ids.tolist() for sequence in sequences_in(tmp_path / "out")] == [item["ids"] for item in items]
    with pytest.raises(InputError, match="vqgan_path must name a VQGAN file to make images"):
        load_image_tokenizer(export, export / "vqgan_encoder.safetensors").require_decoder()
    shutil.copyfile(checkpoint / "vqgan.safetensors", export / "vqgan.safetensors")
    assert look_for_image_tokenizer(export, None, "vqgan") == export / "vqgan.safetensors"
    (export / "vqgan.safetensors").rename(export / "vqgan_other.safetensors")
    weights_of(run.output_dir)
    require_complete(export, "vqgan_encoder.safetensors")  # a new export replaces the image tokenizer of a former one
    assert run_folder.newest(Path(run.output_dir)).name == "step-00000004"


def test_an_export_without_any_image_tokenizer_says_so(run, checkpoint, tmp_path, caplog):
    shutil.copytree(checkpoint, tmp_path / "bare")
    (tmp_path / "bare" / "vqgan.safetensors").unlink()
    Trainer(changed(run, init_from=str(tmp_path / "bare"), max_steps=1), ONE).run()
    weights_of(run.output_dir)
    assert "no VQGAN beside" in caplog.text and "the export holds none; generation needs vqgan_path then" in caplog.text
