"""The part of `lumina-mgpt generate` for answers with several images: `--task multiview`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from tqdm import tqdm

from lumina_mgpt.cli.answers import images_of
from lumina_mgpt.cli.progress import codes_bar
from lumina_mgpt.cli.tasks import OutputPlan, preview_file, view_files
from lumina_mgpt.console import stops_delayed

if TYPE_CHECKING:
    from PIL import Image

    from lumina_mgpt.outputs import OutputFolder
    from lumina_mgpt.pipeline import Pipeline
    from lumina_mgpt.preparation import PreparedRequest
    from lumina_mgpt.request import ImageJob
    from lumina_mgpt.results import RowDone


def make(
    pipeline: "Pipeline",
    prepared: "PreparedRequest",
    plan: OutputPlan,
    output: "OutputFolder",
    described: Mapping[str, object],
) -> None:
    """Generates the answers one by one, and saves each image when it is finished, and the contact sheet at the end.

    The repeat r of a prompt samples with the seed of the request plus r. After an error or a stop, finished images
    stay, and the preview is removed.

    Args:
        prepared: the request to generate. Its task makes several images an answer.
        plan: names of the files.
        output: folder to save to.
        described: settings for the text of the saved pictures.
    """
    request, views = prepared.request, prepared.request.task.views
    seeds = request.sampling.with_seeds(request.n)
    total, saved = len(request.jobs) * views, 0
    bar = codes_bar(total, total * prepared.layout.num_codes, shown=request.share[0] == 0)
    try:
        for job in request.jobs:
            sampling, stem = seeds[job.repeat], plan.stem(job)
            text = {"prompt": job.prompt, "repeat": job.repeat} | dict(described)
            text |= {"views": views, "seed": sampling.seed}
            preview = (output, preview_file(stem)) if plan.preview else None
            answer = _views(pipeline, replace(prepared, request=replace(request, sampling=sampling)), job, bar, preview)
            images: list[Image.Image] = []
            for name, image in zip(view_files(stem, views), answer, strict=True):
                with stops_delayed():  # else a picture could be saved and not counted
                    output.save(name, image, text | {"view": len(images)})
                    images.append(image)
                    saved += 1
            path = output.save(f"{stem}.png", contact_sheet(images), text)
            bar.write(f"{path}: {job.prompt}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{saved} of {total} images are in {output.folder}") from None
    finally:
        bar.close()
        for name in plan.preview_names():
            output.discard(name)


def _views(
    pipeline: "Pipeline",
    prepared: "PreparedRequest",
    job: "ImageJob",
    bar: tqdm,
    preview: "tuple[OutputFolder, str] | None",
) -> "Iterator[Image.Image]":
    """Yields the images of one answer. `preview` is where to show the image that is being sampled."""
    request, layout = prepared.request, prepared.layout
    width, height = layout.size

    def on_row(done: "RowDone") -> None:
        if preview:
            output, name = preview
            output.save(name, pipeline.preview(done.codes[None], layout)[0], again=True)

    events = pipeline.conversation().say(
        request.task.instruction(job.prompt, width, height),
        want="images",
        size=layout.size,
        views=request.task.views,
        speculation=request.speculation,
        **asdict(request.sampling),
    )
    return (result.image for result in images_of(events, bar, on_row))


def contact_sheet(images: "Sequence[Image.Image]") -> "Image.Image":
    """Returns images of the same size as one picture: rows from left to right, as many columns as rows or one more.

    Places without an image are white.
    """
    from PIL import Image

    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
