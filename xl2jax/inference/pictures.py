"""The prompt around pictures: which tokens come before the question, and which of them are visual."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from xl2jax.config import VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.inference.prefill import Stretch
from xl2jax.prompt import PREFIX, PromptTokenizer, check_unicode
from xl2jax.video.pictures import Picture, cut

IMAGE, VIDEO = "<image>", "<video>"
"""Where a picture, and where the video stands in the text around them."""


def joined(parts: Sequence[Sequence[int] | int], first: int = 0) -> Stretch:
    """Token ids, and numbers of visual tokens among them, as one stretch. `first` visual tokens come before it."""
    ids: list[int] = []
    visual: list[int] = []
    for part in parts:
        count = part if isinstance(part, int) else len(part)
        ids += [0] * part if isinstance(part, int) else part
        visual += range(first, first + count) if isinstance(part, int) else [-1] * count
        first += count if isinstance(part, int) else 0
    return Stretch(np.asarray(ids, np.int32), np.asarray(visual, np.int32))


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a question's context holds beside the frames of a video, if there is one at all.

    before, after: text and pictures before and behind the video. tiles: of all pictures, uint8 [n, size, size, 3].
    lead: the text between the last picture or the video and the question. names: of the pictures, for messages.
    """

    before: Stretch
    after: Stretch
    lead: str
    tiles: np.ndarray
    names: tuple[str, ...] = ()

    @property
    def picture_tokens(self) -> int:
        """Visual tokens of all pictures."""
        return int(sum((stretch.visual >= 0).sum() for stretch in (self.before, self.after)))


def default_text(pictures: int, *, video: bool) -> str:
    """The text before a question that names no places: as upstream's evaluation has it."""
    marks = [VIDEO] * video + [IMAGE] * pictures
    return " ".join(marks) + "\n" if marks else ""


def split_question(question: str) -> tuple[str | None, str]:
    """The text up to the last `<image>` or `<video>` of a question, as `surroundings` takes it, and what follows.

    None where the question names no place.
    """
    end = max((match.end() for match in re.finditer(f"{IMAGE}|{VIDEO}", question)), default=None)
    return (None, question) if end is None else (question[:end], question[end:])


def check_places(text: str, pictures: int, *, video: bool) -> None:
    """Raises UserError unless the text has a place for each picture and for the video, and is Unicode."""
    check_unicode(text)
    if text.count(IMAGE) != pictures:
        raise UserError(f"the text has {IMAGE} {text.count(IMAGE)} times for {pictures} pictures: {text[:80]!r}")
    if text.count(VIDEO) != video:
        wanted = "once, where the video stands" if video else "but there is no video"
        raise UserError(f"the text has {VIDEO} {text.count(VIDEO)} times, {wanted}: {text[:80]!r}")


def surroundings(
    tokenizer: PromptTokenizer,
    config: VideoXL2Config,
    pictures: Sequence[Picture] = (),
    text: str | None = None,
    *,
    video: bool,
) -> Surroundings:
    """The prompt before the question. Each piece of text between pictures is tokenised by itself, as upstream does.

    `text` has `<image>` for each picture, and `<video>` where there is a video; by default they stand at its beginning.

    Raises:
      UserError: the text has another number of places, or the checkpoint knows no tiles.
    """
    text = default_text(len(pictures), video=video) if text is None else text
    check_places(text, len(pictures), video=video)
    pieces = re.split(f"({IMAGE}|{VIDEO})", text)
    marks = pieces[1::2]
    size = config.vision.image_size
    tiles = [cut(p.pixels, size, config.grids()) for p in pictures]
    *pieces, lead = pieces
    before: list[list[int] | int] = []
    after: list[list[int] | int] = []
    side, counts = before, iter(tiles)
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            side.append(tokenizer.encode(*PREFIX, piece) if number == 0 else tokenizer.encode(piece))
        elif piece == IMAGE:
            side.append(len(next(counts)) * config.tile_tokens)
        else:
            side = after
    if not marks:  # the question follows the template's own text, with which it is tokenised
        *head, last = PREFIX
        before, lead = [tokenizer.encode(*head)], last + lead
    prefix = joined(before)
    seen = int((prefix.visual >= 0).sum())
    return Surroundings(
        prefix,
        joined(after, seen),
        lead,
        np.concatenate([*tiles, np.zeros((0, size, size, 3), np.uint8)]),
        tuple(p.name for p in pictures),
    )
