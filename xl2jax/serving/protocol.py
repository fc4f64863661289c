"""Reads chat requests in OpenAI's format.

What a request asks for and this model cannot do is refused. Fields that change nothing here are ignored: those of other
models' image processors (`min_pixels`, `size` and the like) and of chat templates.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from xl2jax.config import FRAMES_PER_GROUP
from xl2jax.errors import UserError
from xl2jax.inference.bilevel import BilevelConfig
from xl2jax.inference.generate import TokenSampling
from xl2jax.inference.pictures import IMAGE, VIDEO
from xl2jax.prompt import SYSTEM
from xl2jax.serving.errors import RequestError
from xl2jax.serving.limits import Limits
from xl2jax.system.schema import Schema, parse_json
from xl2jax.video.frame_sampling import FrameSampling

DEFAULT_NEW_TOKENS = 512


class _Url(Schema):
    url: str | None = None


class _Text(Schema):
    type: Literal["text"]
    text: str


class _Video(Schema):
    type: Literal["video_url"]
    video_url: _Url | None = None
    uuid: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class _Image(Schema):
    type: Literal["image_url"]
    image_url: _Url


class _FileOf(Schema):
    file_id: str | None = None
    file_data: str | None = None


class _File(Schema):
    type: Literal["file"]
    file: _FileOf
    uuid: Annotated[str, Field(min_length=1, max_length=256)] | None = None


type _Part = Annotated[_Text | _Video | _Image | _File, Field(discriminator="type")]


class _Message(Schema):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part], Field(default_factory=list)]

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content: Any) -> Any:
        if content is None:
            return []
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _StreamOptions(Schema):
    include_usage: bool = False


class _Frames(Schema):
    """Frame settings as vLLM names them; -1 stands for no limit."""

    fps: Annotated[float, Field(le=1000)] | None = None
    num_frames: int | None = None
    max_frames: int | None = None


class _Media(Schema):
    video: _Frames = _Frames()


class _Own(Schema):
    """The settings of this project."""

    model_config = Schema.model_config | {"extra": "forbid"}

    fps: float | Literal["uniform"] | None = None
    max_frames: int | None = None
    folder_fps: Annotated[float, Field(gt=0, le=1000)] = 1.0
    top_chunks: Annotated[int, Field(ge=0, le=1 << 20)] | Literal["all"] | None = None
    chunks: bool = False
    treat_images_as: Literal["frames", "pictures"] = "frames"


class _Format(Schema):
    type: str


class ChatRequest(Schema):
    """The body of POST /v1/chat/completions."""

    model: str | None = None
    messages: Annotated[list[_Message], Field(min_length=1, max_length=1000)]
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16, default_factory=list)
    ]
    n: int | None = 1
    media_io_kwargs: _Media | None = None
    mm_processor_kwargs: _Frames | None = None
    xl2jax: _Own = _Own()
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    logprobs: bool | None = None
    logit_bias: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    response_format: _Format | None = None
    modalities: list[str] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _list(cls, stop: Any) -> Any:
        if stop is None:
            return []
        return [stop] if isinstance(stop, str) else stop


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the video of a request comes from: one of these, and a name for later requests if `uuid` is given.

    url: http, https, file or data. frames: addresses of images, in order. pictures: the same, of pictures that are no
    frames. data: base64, or a data URL.
    """

    url: str | None = None
    frames: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    file_id: str | None = None
    data: str | None = None
    uuid: str | None = None

    @property
    def is_name(self) -> bool:
        """Whether only the name of an earlier video is given."""
        return not (self.url or self.frames or self.pictures or self.file_id or self.data)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A chat request as settings of the library."""

    source: Source
    text: str | None
    """What stands before the question, with the places of pictures; None where they come first."""
    question: str
    history: tuple[tuple[str, str], ...]
    frames: FrameSampling | None
    """None where the request does not say which frames are read."""
    folder_fps: float
    bilevel: BilevelConfig | None
    max_new_tokens: int
    sampling: TokenSampling
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    include_chunks: bool


def read_request(body: bytes, limits: Limits, model: str, bilevel: BilevelConfig | None) -> Asked:
    """Reads and checks the body of a chat request. `bilevel` holds where the request names no `top_chunks`.

    Raises RequestError.
    """
    try:
        request = parse_json(body, ChatRequest, "request")
        if request.model is not None and request.model != model:
            raise RequestError(
                404, f"there is no such model here: this server has {model!r}", code="model_not_found", param="model"
            )
        _refuse_unsupported(request)
        pictures = request.xl2jax.treat_images_as == "pictures"
        source = _source(request.messages, limits, pictures=pictures)
        text, question, history = _conversation(request.messages, limits, pictures=pictures)
        return Asked(
            source=source,
            text=text,
            question=question,
            history=history,
            frames=_frames(request, limits),
            folder_fps=request.xl2jax.folder_fps,
            bilevel=_bilevel(request.xl2jax.top_chunks, bilevel),
            max_new_tokens=_new_tokens(request, limits),
            sampling=TokenSampling(
                0.0 if request.temperature is None else request.temperature,
                1.0 if request.top_p is None else request.top_p,
            ),
            seed=secrets.randbits(32) if request.seed is None else request.seed % 2**32,
            stop=tuple(request.stop),
            stream=bool(request.stream),
            include_usage=request.stream_options is not None and request.stream_options.include_usage,
            include_chunks=request.xl2jax.chunks,
        )
    except UserError as e:
        raise RequestError(400, str(e)) from None


def read_source(body: bytes, limits: Limits) -> Source:
    """The video that the body of a chat request names. Raises RequestError where there is none."""
    try:
        request = parse_json(body, ChatRequest, "request")
        return _source(request.messages, limits, pictures=request.xl2jax.treat_images_as == "pictures")
    except UserError as e:
        raise RequestError(400, str(e)) from None


def _refuse_unsupported(request: ChatRequest) -> None:
    wrong = {
        "n": request.n not in (None, 1),
        "tools": bool(request.tools),
        "functions": bool(request.functions),
        "logprobs": bool(request.logprobs),
        "logit_bias": bool(request.logit_bias),
        "frequency_penalty": bool(request.frequency_penalty),
        "presence_penalty": bool(request.presence_penalty),
        "response_format": request.response_format is not None and request.response_format.type != "text",
        "modalities": request.modalities not in (None, ["text"]),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise RequestError(400, f"{name}: is not supported by this model", code="unsupported", param=name)


def _conversation(
    messages: Sequence[_Message], limits: Limits, *, pictures: bool
) -> tuple[str | None, str, tuple[tuple[str, str], ...]]:
    """The text around pictures, the last question, and the turns before it. Instructions stand before the first question.

    The text is None where no text stands before a picture.
    """
    turns: list[tuple[str, str]] = []
    instructions: list[str] = []
    around: str | None = None
    for message in messages:
        if pictures and any(isinstance(part, _Image) for part in message.content):
            if message.role != "user" or turns:
                raise RequestError(
                    400,
                    "messages: pictures belong into the first message of the user",
                    code="unsupported",
                    param="messages",
                )
            around, text = _placed(message.content)
        else:
            text = "\n".join(part.text for part in message.content if isinstance(part, _Text))
        if message.role in ("system", "developer"):
            if text.strip() and text.strip() != SYSTEM:
                instructions.append(text)
        elif turns and turns[-1][0] == message.role:
            turns[-1] = (message.role, "\n".join(filter(None, (turns[-1][1], text))))
        else:
            turns.append((message.role, text))
    if not turns or turns[0][0] != "user" or turns[-1][0] != "user":
        raise RequestError(400, "messages: should begin and end with a message of the user", param="messages")
    turns[0] = ("user", "\n".join([*instructions, turns[0][1]]))
    texts = [around or "", *(text for _, text in turns)]
    if (length := sum(map(len, texts))) > limits.text_characters:
        raise RequestError(
            400,
            f"messages: have {length:,} characters, more than the {limits.text_characters:,} that are read",
            code="text_too_long",
            param="messages",
        )
    if not texts[-1].strip():
        raise RequestError(400, "messages: the question is empty", param="messages")
    return around, texts[-1], tuple(zip(texts[1:-1:2], texts[2::2], strict=True))


def _placed(parts: Sequence[_Part]) -> tuple[str | None, str]:
    """The text up to the last picture with the places of all of them, and the text behind it.

    Where no text follows, or none comes before, it is None: pictures then come first, as in training.
    """
    texts = [part.text if isinstance(part, _Text) else IMAGE for part in parts if isinstance(part, _Text | _Image)]
    places = [number for number, part in enumerate(parts) if isinstance(part, _Image)]
    words = [part.text for part in parts if isinstance(part, _Text)]
    if any(mark in word for word in words for mark in (IMAGE, VIDEO)):
        raise RequestError(400, f"messages: {IMAGE} in a text names a place: leave it out", param="messages")
    last = places[-1]
    before, behind = texts[: last + 1], texts[last + 1 :]
    if not any(word.strip() for word in behind) or before == [IMAGE] * len(before):
        return None, "\n".join(words)
    return re.sub(f"{IMAGE}\n(?={IMAGE})", f"{IMAGE} ", "\n".join(before)) + "\n", "\n".join(behind)


def _source(messages: Sequence[_Message], limits: Limits, *, pictures: bool) -> Source:
    """The one video of a conversation, which may be named in several messages."""
    found: list[Source] = []
    images: list[str] = []
    for message in messages:
        for part in message.content:
            match part:
                case _Text():
                    continue
                case _Image():
                    images.append(part.image_url.url or "")
                    continue
                case _Video():
                    source = Source(url=part.video_url.url if part.video_url else None, uuid=part.uuid)
                case _File():
                    source = Source(file_id=part.file.file_id, data=part.file.file_data, uuid=part.uuid)
            if source.is_name and source.uuid is None:
                raise RequestError(400, f"messages: a {part.type} part names no video", param="messages")
            if source not in found:
                found.append(source)
    if images:
        found.append(Source(pictures=tuple(images)) if pictures else Source(frames=tuple(images)))
    if not found:
        raise RequestError(400, "messages: hold no video (video_url, file or image_url part)", param="messages")
    if len(found) > 1:
        raise RequestError(400, "messages: name several videos; a conversation is about one", param="messages")
    most = limits.pictures if pictures else limits.frames
    if len(images) > most:
        raise RequestError(
            400, f"messages: hold {len(images)} images, more than the {most} that are read", param="messages"
        )
    return found[0]


def _frames(request: ChatRequest, limits: Limits) -> FrameSampling | None:
    """Which frames are read. vLLM's names mean what they mean there; those of `xl2jax` are those of `infer`."""
    own = request.xl2jax
    theirs = {
        "media_io_kwargs.video": request.media_io_kwargs.video if request.media_io_kwargs else _Frames(),
        "mm_processor_kwargs": request.mm_processor_kwargs or _Frames(),
    }
    given = {name: frames for name, frames in theirs.items() if frames != _Frames()}
    if own.fps is not None or own.max_frames is not None:
        if given:
            raise RequestError(400, f"{next(iter(given))}, xl2jax: both say which frames are read; leave one out")
        most = _most(own.max_frames, "xl2jax.max_frames", limits) or min(FrameSampling.max_frames, limits.frames)
        if own.fps == "uniform":
            return FrameSampling(fps=None, max_frames=most)
        return FrameSampling(FrameSampling.fps if own.fps is None else own.fps, max_frames=most)
    fps: float | None = None
    number: int | None = None
    for name, frames in given.items():
        fps = frames.fps if frames.fps is not None and frames.fps > 0 else fps
        for field, value in (("num_frames", frames.num_frames), ("max_frames", frames.max_frames)):
            number = _most(None if value == -1 else value, f"{name}.{field}", limits) or number
    if fps is None and number is None:
        return None
    return FrameSampling(fps, max_fps=None, max_frames=number or limits.frames)


def _most(value: int | None, name: str, limits: Limits) -> int | None:
    if value is not None and not FRAMES_PER_GROUP <= value <= limits.frames:
        raise RequestError(
            400,
            f"{name}: should be from {FRAMES_PER_GROUP} to {limits.frames}, not {value}",
            code="too_many_frames" if value > limits.frames else None,
            param=name,
        )
    return value


def _bilevel(top: int | Literal["all"] | None, default: BilevelConfig | None) -> BilevelConfig | None:
    if top == "all":
        return None
    return default if top is None else dataclasses.replace(default or BilevelConfig(), top_chunks=top)


def _new_tokens(request: ChatRequest, limits: Limits) -> int:
    number = request.max_completion_tokens or request.max_tokens or min(DEFAULT_NEW_TOKENS, limits.new_tokens)
    if number > limits.new_tokens:
        name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        raise RequestError(400, f"{name}: should be at most {limits.new_tokens}, not {number}", param=name)
    return number
