"""The code of docs/transformers.md runs, block after block, and its training lowers the loss."""

import pytest
import torch
from documents import ROOT, blocks

from lumina_mgpt import Pipeline


@pytest.mark.slow
def test_code_of_the_document_runs(tmp_path, monkeypatch):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    code = blocks((ROOT / "docs" / "transformers.md").read_text(encoding="utf-8"), "python")
    assert len(code) >= 8
    for index, block in enumerate(code):
        exec(compile(block, f"block {index + 1} of docs/transformers.md", "exec"), names)

    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 10 and sum(losses[-3:]) < sum(losses[:3])
    exact = Pipeline.from_pretrained(tmp_path / "finetuned")
    trained = dict(names["model"].named_parameters())
    assert torch.equal(exact.model.layers[0].mlp.up_proj.weight, trained["model.layers.0.mlp.up_proj.weight"])
    (drawn,) = Pipeline.from_pretrained("assets/demo").generate("a hedgehog on a sky blue background", 96, 96, seed=7)
    assert names["picture"].tobytes() == drawn.image.tobytes()
