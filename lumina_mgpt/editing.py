"""Edits one picture in several turns."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from PIL import Image

from lumina_mgpt.pipeline import OnRow, Pipeline
from lumina_mgpt.preparation import PreparedRequest
from lumina_mgpt.results import ImageDone, RowDone, RowsDone


@dataclass(frozen=True)
class Turn:
    """The result of one turn.

    Attributes:
        image: the whole image.
        result: the edited picture alone.
        seed: the seed that it was sampled with.
    """

    image: Image.Image
    result: Image.Image
    seed: int


def turns_of(pipeline: Pipeline, prepared: PreparedRequest, on_row: OnRow) -> Iterator[Turn]:
    """Yields the result of each turn. Turn t, counted from 1, samples with the seed of the request plus t - 1.

    Each turn sees the codes of the previous result, so no error of decoding and encoding accumulates.

    Args:
        prepared: a request with one prompt a turn and one given picture.
        on_row: called each time a row is final.
    """
    turns = _conversation_turns if prepared.pictures else _panel_turns
    return turns(pipeline, prepared, on_row)


def _panel_turns(pipeline: Pipeline, prepared: PreparedRequest, on_row: OnRow) -> Iterator[Turn]:
    """The given panel of a turn is the lower panel of the last one."""
    panel = prepared.panels[0]
    for index, sampling in enumerate(prepared.request.sampling.with_seeds(len(prepared.starts))):
        (result,) = pipeline.stream(prepared.single(index, panel, sampling=sampling), on_row)
        panel = result.panel_codes
        yield Turn(result.image, result.panel, sampling.seed)


def _conversation_turns(pipeline: Pipeline, prepared: PreparedRequest, on_row: OnRow) -> Iterator[Turn]:
    """The picture is in the first instruction of a conversation, and later instructions have none."""
    request, size = prepared.request, prepared.layout.size
    conversation, jobs = pipeline.conversation(), tuple(request.jobs)
    for index, sampling in enumerate(request.sampling.with_seeds(len(request.prompts))):
        text, pictures = (
            (request.prompts[index], ())
            if index
            else (request.task.instruction(request.prompts[0], *size), prepared.pictures)
        )
        settings = {"want": "image", "size": size, "speculation": request.speculation, **asdict(sampling)}
        for event in conversation.say(text, pictures, **settings):
            if isinstance(event, RowDone):
                on_row(RowsDone(jobs[index : index + 1], event.codes[None], event.layout))
            elif isinstance(event, ImageDone):
                yield Turn(event.image, event.image, sampling.seed)
