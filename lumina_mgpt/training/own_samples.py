"""Replaces the images of training sequences by images that the model in training samples for the same prompts."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.data.batches import MicroBatch
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.pipeline import Checkpoint, Pipeline
from lumina_mgpt.training.adapters import plain_copy
from lumina_mgpt.training.distillation import image_starts
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.unirep import IGNORED, ImageLayout
from lumina_mgpt.vocabulary import Vocabulary

Place = tuple[int, int]  # row of a batch, and position of an image start in this row


@torch.no_grad()
def with_own_samples(
    batches: list[MicroBatch], model: Transformer, vocabulary: Vocabulary, processes: Processes, seed: int
) -> list[MicroBatch]:
    """Returns copies of micro-batches with images that the model samples, without guidance.

    Only rows with a single labelled image are changed. Codes without a label, those of a given panel, stay. All
    processes call the function together. It needs memory for a copy of the whole weights, as sample pictures do.

    Args:
        batches: what `distillation.codes_only` returns, not packed.
        model: the model in training.
        seed: seed of the noise. The same seed and weights give the same images.
    """
    device = processes.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    found = [image_places(batch, vocabulary) for batch in batches]
    copy = plain_copy(model, dtype, device, any(found))
    if not any(found):
        return batches
    no_images: Any = None  # codes are not decoded
    pipeline = Pipeline(Checkpoint(Path(), model.config, vocabulary, None), copy, no_images)
    settings = SamplingConfig(seed=seed, **{**model.config.family.sampling, "cfg": 1.0})  # type: ignore[arg-type]
    changed, made = [], 0
    for batch, places in zip(batches, found, strict=True):
        ids = batch.ids.clone()
        for layout, group in places.items():
            starts = [ids[row, :begin].tolist() for row, begin in group]
            spans = [ids[row, begin : begin + layout.length] for row, begin in group]
            given = torch.stack([vocabulary.id_to_code(span[layout.code_offsets[: layout.given]]) for span in spans])
            repeats = range(made, made := made + len(group))
            codes = pipeline.sample(starts, layout, settings, repeats, given=given)
            for span, image in zip(spans, codes.flatten(1), strict=True):
                span.copy_(layout.fill(image))
        targets = ids.flatten()[(batch.index + 1).clamp(max=ids.numel() - 1)].where(batch.targets != IGNORED, IGNORED)
        changed.append(replace(batch, ids=ids, targets=targets))
    return changed


def image_places(batch: MicroBatch, vocabulary: Vocabulary) -> dict[ImageLayout, list[Place]]:
    """Returns the images to sample, by layout. Codes before the first labelled one are given."""
    counted, width = batch.targets != IGNORED, batch.ids.shape[1]
    starts, index = image_starts(batch, vocabulary)[counted], batch.index[counted]
    places: dict[ImageLayout, list[Place]] = defaultdict(list)
    for row in (index // width).unique().tolist():
        own = index // width == row
        begun: Tensor = starts[own].unique()
        if len(begun) != 1:
            continue
        begin = int(begun) - row * width
        sizes = [vocabulary.grid_size(int(id_)) for id_ in batch.ids[row, begin + 1 : begin + 3]]
        layout = ImageLayout(vocabulary, *sizes)
        first = int(index[own].min()) + 1 - int(begun)  # offset of the first labelled code
        given = int((layout.code_offsets < first).sum())
        places[replace(layout, given=given)].append((row, begin))
    return dict(places)
