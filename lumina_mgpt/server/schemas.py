"""The fields of requests in OpenAI's form, and the same sampling settings as on the command line as extra fields."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int | None, Field(description="0 ... 2**63 - 1; default: a random seed, which the answer names")]


class Strict(BaseModel):
    """Refuses unknown fields, and values of another JSON type."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class ImageFields(Strict):
    """The fields of both image endpoints."""

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] = 1
    size: Annotated[str, Field(description="WIDTHxHEIGHT in pixels of the returned picture, or auto")] = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    stream: bool | None = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    output_format: Literal["png", "jpeg", "webp"] = "png"
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    user: str | None = None
    seed: Seed = None
    cfg: float | None = None
    top_k: int | None = None
    temperature: float | None = None
    speculative_jacobi: bool = False
    coupling: str | None = None
    window: int | None = None


class GenerationFields(ImageFields):
    """Body of POST /v1/images/generations."""

    task: Annotated[str, Field(description="a task of the checkpoint whose images are all generated")] = "t2i"


class EditFields(ImageFields):
    """Fields of POST /v1/images/edits, besides the uploaded `image`."""

    task: Annotated[str, Field(description="a task of the checkpoint with a given picture")] = "edit"
    prompt: str = ""


class ImageUrl(Strict):
    """A picture as a data URL."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(Strict):
    """A text of a message."""

    type: Literal["text"]
    text: str


class ImagePart(Strict):
    """A picture of a message.

    Attributes:
        index, offset: for pictures of answers: number of the picture, and number of characters of the text before it.
    """

    type: Literal["image_url"]
    image_url: ImageUrl
    index: Annotated[int, Field(ge=0)] = 0
    offset: Annotated[int, Field(ge=0)] = 0


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None
    images: list[ImagePart] = []
    refusal: None = None


class StreamOptions(Strict):
    """What a streamed answer contains besides its text and images."""

    include_usage: bool = False


class ChatFields(Strict):
    """Body of POST /v1/chat/completions.

    Attributes:
        temperature: temperature of the text. 0: always the most probable token.
        image_temperature, top_k, cfg: sampling of images.
        text_top_k: text is sampled from this many most probable tokens.
        size: size of the image, for modalities ["image"].
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    n: Literal[1] = 1
    modalities: Annotated[list[Literal["text", "image"]] | None, Field(min_length=1)] = None
    user: str | None = None
    size: str = "auto"
    seed: Seed = None
    temperature: Annotated[float | None, Field(ge=0)] = None
    text_top_k: int | None = None
    image_temperature: float | None = None
    top_k: int | None = None
    cfg: float | None = None
    speculative_jacobi: bool = False
    coupling: str | None = None
    window: int | None = None
