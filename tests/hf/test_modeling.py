"""Logits and loss of the model equal those of the project; what it saves loads everywhere."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor

from lumina_mgpt import Pipeline
from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.hf import LuminaMGPTConfig, LuminaMGPTForConditionalGeneration, LuminaMGPTProcessor
from lumina_mgpt.model.convert import quantize_checkpoint
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training import loss as loss_module
from lumina_mgpt.training.loss import LossModel

LENGTHS = (5, 9, 7)


@pytest.fixture(scope="module")
def batch(pipeline):
    """Rows of different lengths, each with its labels."""
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 576, (length,), generator=random) for length in LENGTHS]
    labels = [torch.where(torch.rand(len(row), generator=random) < 0.6, row, -100) for row in rows]
    for label in labels:
        label[0] = -100
    return rows, labels


def _padded(rows, fill: int, side: str) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_projects_logits_and_loss(hf, batch, tiny_checkpoint, side):
    model, (rows, labels) = hf[0], batch
    exact = load_model(tiny_checkpoint, torch.float64, "cpu")
    mask = _padded([torch.ones_like(row) for row in rows], 0, side)
    padded = _padded(labels, -100, side)
    padded[mask == 0] = 3  # a label at a pad has no effect
    output = model(_padded(rows, 7, side), mask, padded)
    for index, row in enumerate(rows):
        expected = exact.project(exact(row[None]))[0]
        torch.testing.assert_close(output.logits[index][mask[index] == 1], expected, rtol=1e-9, atol=1e-9)
    total, count = 0.0, 0
    for row, label in zip(rows, labels, strict=True):
        index = (label[1:] != -100).nonzero()[:, 0]
        total += LossModel(exact, 0.0)(row[None], index, label[1:][index])[0]
        count += len(index)
    torch.testing.assert_close(output.loss, total / count)
    assert model(_padded(rows, 7, side), mask, padded, num_items_in_batch=2 * count).loss == output.loss / 2


def test_the_z_loss_has_the_weight_of_the_configuration(hf, batch, tiny_checkpoint):
    row, label = batch[0][1], batch[1][1]
    model = LuminaMGPTForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float64)
    model.config.z_loss_weight = 0.5
    index = (label[1:] != -100).nonzero()[:, 0]
    total = LossModel(load_model(tiny_checkpoint, torch.float64, "cpu"), 0.5)(row[None], index, label[1:][index])[0]
    torch.testing.assert_close(model(row[None], labels=label[None]).loss, total / len(index))


def test_a_loss_in_chunks_has_the_same_gradients(hf, batch, monkeypatch):
    model, row, label = hf[0], batch[0][1][None], batch[1][1][None]
    results = []
    for limit in (loss_module.WHOLE_LOGITS, 0):
        monkeypatch.setattr("lumina_mgpt.hf.modeling.WHOLE_LOGITS", limit)
        model.train().zero_grad()
        output = model(row, labels=label)
        output.loss.backward()
        results.append((output.loss, model.lm_head.weight.grad.clone(), model.model.layers[0].mlp.up_proj.weight.grad))
        assert (output.logits is None) is (limit == 0)
    model.eval().zero_grad()
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole.float(), chunked.float(), rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(hf, batch):
    model, row, label = hf[0], batch[0][0][None], batch[1][0][None]
    grads = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        assert model.model.gradient_checkpointing is (enable == model.gradient_checkpointing_enable)
        model.train().zero_grad()
        model(row, labels=label).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad.clone())
    model.gradient_checkpointing_disable()
    model.eval().zero_grad()
    torch.testing.assert_close(*grads)


def test_only_the_last_logits_where_asked(hf, batch):
    model, row = hf[0], batch[0][1][None]
    torch.testing.assert_close(model(row, logits_to_keep=2).logits, model(row).logits[:, -2:])
    assert isinstance(model(row, return_dict=False), tuple)


@pytest.mark.parametrize("name", ["inputs_embeds", "output_hidden_states", "position_ids", "colour"])
def test_an_unsupported_argument_is_refused(hf, batch, name):
    with pytest.raises(InputError, match="no argument of this model") as error:
        hf[0](batch[0][0][None], **{name: True})
    assert error.value.parameter == name


@pytest.mark.parametrize(
    "wrong, parameter",
    [
        ({"input_ids": torch.ones(1, 4)}, "input_ids"),
        ({"input_ids": [[1, 2, 3, 4]]}, "input_ids"),
        ({"input_ids": torch.ones(4).long()}, "input_ids"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask"),
        ({"labels": torch.ones(2, 3).long()}, "labels"),  # would be compared with the logits of other ids
        ({"logits_to_keep": -1}, "logits_to_keep"),
    ],
)
def test_tensors_of_other_shapes_are_refused(hf, wrong, parameter):
    with pytest.raises(InputError) as error:
        hf[0](**{"input_ids": torch.ones(2, 4).long(), **wrong})
    assert error.value.parameter == parameter


def test_a_full_disk_is_an_error_of_the_folder(hf, tmp_path, monkeypatch):
    def save(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save)
    with pytest.raises(InputError, match="save_directory .* cannot be written .*No space left"):
        hf[0].save_pretrained(tmp_path / "full")


def test_the_first_generation_loads(oracle_v1_checkpoint, oracle_v1_dir):
    model = LuminaMGPTForConditionalGeneration.from_pretrained(oracle_v1_checkpoint("mixed"))
    assert model.config.generation == 1 and model.config.model_type == "lumina_mgpt"
    ids = torch.tensor([[0, 9000, 9001, 8710]])
    exact = load_model(oracle_v1_checkpoint("mixed"), torch.float32, "cpu")
    assert torch.equal(model(ids).logits, exact.project(exact(ids)))


def test_a_configuration_alone_makes_a_model_to_train(tiny_checkpoint, hf):
    config = LuminaMGPTConfig.from_pretrained(tiny_checkpoint)
    torch.manual_seed(1)
    model = LuminaMGPTForConditionalGeneration(config)
    torch.manual_seed(1)
    exact = Transformer(config.model_config)
    exact.init_weights()
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, exact.layers[1].mlp.down_proj.weight)
    assert torch.equal(model.lm_head.weight, exact.lm_head.weight)
    with pytest.raises(InputError, match="processor.checkpoint"):
        model.generate(torch.tensor([[1]]))
    model.checkpoint = hf[1].checkpoint
    assert model.generate(torch.tensor([[1]]), max_new_tokens=1).shape == (1, 2)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_saved_folder_loads_here_by_auto_classes_and_in_the_pipeline(hf, tiny_checkpoint, tmp_path):
    model, processor = hf
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert ModelConfig.from_json(tmp_path / "config.json") == ModelConfig.from_json(tiny_checkpoint / "config.json")
    again, pipeline = AutoModelForMultimodalLM.from_pretrained(tmp_path), Pipeline.from_pretrained(tmp_path)
    assert type(again) is LuminaMGPTForConditionalGeneration
    assert type(AutoConfig.from_pretrained(tmp_path)) is LuminaMGPTConfig
    assert type(AutoProcessor.from_pretrained(tmp_path)) is LuminaMGPTProcessor
    assert pipeline.model.embed_tokens.weight.equal(again.model.embed_tokens.weight)
    (image,) = pipeline.generate("a cat", 32, 32, seed=3)
    inputs = AutoProcessor.from_pretrained(tmp_path)(text="a cat", generation_mode="image", height=32, width=32)
    assert again.generate(**inputs, generation_mode="image", seed=3)[0].tolist() == image.ids
    again.save_pretrained(tmp_path)  # into its own folder
    assert Pipeline.from_pretrained(tmp_path).generate("a cat", 32, 32, seed=3)[0].ids == image.ids


def test_a_fresh_process_loads_a_saved_folder_by_its_auto_map(hf, tmp_path):
    hf[0].save_pretrained(tmp_path / "saved")
    code = (
        "from transformers import AutoModelForMultimodalLM as M, AutoProcessor as P\n"
        "model, processor = (one.from_pretrained('saved', trust_remote_code=True) for one in (M, P))\n"
        "print(type(model).__module__, type(processor).__module__)\n"
        "model.save_pretrained('again')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["lumina_mgpt.hf.modeling", "lumina_mgpt.hf.processing"], done.stderr
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}


def test_a_processor_is_saved_alone(hf, tmp_path):
    hf[1].save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again("a cat")["input_ids"].equal(hf[1]("a cat")["input_ids"])
    with pytest.raises(InputError, match="holds no weights"):
        LuminaMGPTForConditionalGeneration.from_pretrained(tmp_path)


def test_tied_weights_are_saved_once(tiny_checkpoint, tmp_path):
    config = LuminaMGPTConfig.from_pretrained(tiny_checkpoint, tie_word_embeddings=True)
    model = LuminaMGPTForConditionalGeneration(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.checkpoint = LuminaMGPTProcessor.from_pretrained(tiny_checkpoint).checkpoint
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    exact = load_model(tmp_path, torch.float32, "cpu")
    again = LuminaMGPTForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert exact.lm_head.weight.equal(again.lm_head.weight)


def _changed(source, target, change):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_head_norms_with_one_row_a_head_load(tiny_checkpoint, hf, tmp_path):
    def repeat(tensors):
        for name, rows in tensors.items():
            if "q_norm" in name or "k_norm" in name:
                tensors[name] = rows.repeat(4 if "q_norm" in name else 2, 1)

    folder = _changed(tiny_checkpoint, tmp_path / "perhead", repeat)
    model = LuminaMGPTForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    ids = torch.arange(9)[None]
    torch.testing.assert_close(model(ids).logits, hf[0](ids).logits)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "1 missing keys: model.norm.weight"),
        (lambda tensors: tensors.update({"model.extra": torch.ones(1)}), "1 unknown keys: model.extra"),
        (lambda tensors: tensors.update({"model.vqmodel.extra": torch.ones(1)}), None),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny_checkpoint, tmp_path, change, message):
    folder = _changed(tiny_checkpoint, tmp_path / "changed", change)
    if message is None:
        LuminaMGPTForConditionalGeneration.from_pretrained(folder)
        return
    with pytest.raises(InputError, match=message):
        LuminaMGPTForConditionalGeneration.from_pretrained(folder)


def test_int4_weights_are_refused(tiny_checkpoint, tmp_path):
    quantize_checkpoint(tiny_checkpoint, tmp_path / "int4", 32)
    with pytest.raises(InputError, match="int4 weights are for the command line") as error:
        LuminaMGPTForConditionalGeneration.from_pretrained(tmp_path / "int4")
    assert error.value.parameter == "quantization_config"


def test_a_missing_folder_is_refused(tmp_path):
    for kind in (LuminaMGPTForConditionalGeneration, LuminaMGPTProcessor):
        with pytest.raises(InputError, match="no such folder") as error:
            kind.from_pretrained(tmp_path / "none")
        assert error.value.parameter == "pretrained_model_name_or_path"


def test_a_hub_id_is_fetched_with_the_options_of_the_hub(tiny_checkpoint, monkeypatch):
    calls = []

    def fetch(name, **options):
        calls.append((name, options.get("revision"), options.get("cache_dir")))
        return str(tiny_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    LuminaMGPTForConditionalGeneration.from_pretrained("some/one", revision="v2", cache_dir="cache")
    LuminaMGPTProcessor.from_pretrained("some/one")
    assert calls == [("some/one", "v2", "cache"), ("some/one", None, None)]


def test_uploads_are_left_to_the_method_that_uploads_all_files(hf, tmp_path):
    for one in hf:
        with pytest.raises(InputError, match="must be False"):
            one.save_pretrained(tmp_path, push_to_hub=True)
    assert not list(tmp_path.iterdir())


def test_config_json_names_all_fields(hf, tmp_path):
    hf[0].config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["generation"] == 2 and raw["num_image_codes"] == 64 and raw["image_code_offset"] == 512
    with pytest.raises(InputError, match="hidden_size"):
        LuminaMGPTConfig(hidden_size=-1)
