"""Layers that accelerate keeps on the disk or elsewhere give the same codes, logits and files."""

import pytest
import torch

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.hf import LuminaMGPTForConditionalGeneration
from lumina_mgpt.model.attention import Span
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.reading import load_model

MAPS = {
    "layers": {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    | {"lm_head": "cpu"},
    "most": {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "disk", "lm_head": "cpu"},
    "all": {"": "disk"},
    "auto": "auto",
}


@pytest.mark.parametrize("name", MAPS)
def test_layers_on_the_disk_give_the_same_results(hf, tiny_checkpoint, tmp_path, name):
    model, processor = hf
    offloaded = LuminaMGPTForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype=torch.float64, device_map=MAPS[name], offload_folder=tmp_path / "offload"
    )
    on_disk = {key.rpartition(".self_attn")[0] for key, part in offloaded.named_parameters() if part.is_meta}
    assert ("model.layers.0" in on_disk) is (name != "auto")
    inputs = processor("a cat", generation_mode="image", height=32, width=32)
    for settings in ({}, {"speculative": True}):
        settings |= {"generation_mode": "image", "seed": 1}
        assert offloaded.generate(**inputs, **settings).equal(model.generate(**inputs, **settings))
    inputs = processor(["a cat", "a"])
    assert offloaded(**inputs).logits.equal(model(**inputs).logits)
    text = {"max_new_tokens": 3, "seed": 1}
    assert offloaded.generate(**inputs, **text).equal(model.generate(**inputs, **text))
    if name == "layers":
        offloaded.save_pretrained(tmp_path / "saved")
        saved = load_model(tmp_path / "saved", None, "cpu")
        assert saved.layers[0].mlp.up_proj.weight.equal(model.model.layers[0].mlp.up_proj.weight)


def test_each_layer_has_its_cache_on_its_device(tiny_checkpoint):
    """The device `meta` stands for a second GPU: it has shapes, but no numbers."""
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    devices = [torch.device("cpu"), torch.device("meta")]
    for dtype in (torch.float32, torch.int8):
        cache = KVCache(config, 2, 8, dtype, devices)
        assert [layer.row.device for layer in cache.layers] == devices
        assert [{tensor.device for tensor in layer.stores} for layer in cache.layers] == [{one} for one in devices]
        cache.copy_rows(torch.tensor([1, 0]), 4)
    span = Span.of(3, torch.tensor([[4, 5, 6]]), cache, 7, torch.float32, devices[0]).to(devices[1], non_blocking=True)
    assert span.mask.device == span.positions.device == devices[1]
    assert Span.of(3, 0, cache, None, torch.float32, devices[0]).to(devices[1]).mask is None
