"""Reads and checks training records: upstream's YAML file, which lists JSON files.

    datasets:
      - json_path: talks.json            # relative to the YAML file
        sampling_strategy: first:10%     # all | first:N | end:N | random:N, N a number or a share in %

    [{"id": "7", "video": "talk.mp4", "scale": 1.0,
      "conversations": [{"from": "human", "value": "<image>\\nWho speaks?"}, {"from": "gpt", "value": "Ada."}]}]

With `image` in place of `video` the record has one picture or a list of them, and with neither it is text. Media paths
are relative to the media root, which is by default the folder of the JSON file. A file with the suffix `.jsonl` has one
record a line.

In a record with pictures each turn may have `<image>`, as often as it has pictures. As upstream does, the pictures move
to the front of the turn, and as many characters as their tags have are cut from its front, whatever they are: only turns
that begin with all of their tags are as they seem. A single tag in another place is moved to the front before that.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from xl2jax.errors import UserError, shorten
from xl2jax.system.schema import Schema, check, parse_json, read_bytes, read_json, read_yaml

IMAGE = "<image>"

_NOISE = "QA_GT_caption_based_noisy"  # a mark in a data set that upstream's trainer removes from samples with pictures

_ROLES = {"human": "user", "gpt": "assistant"}
_ID_LENGTH = 80  # characters of an id that messages show


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample. `turns` are (user | assistant, text) pairs without the tags of a video or of pictures."""

    id: str
    """Names the sample in messages. Ids need not be unique."""
    kind: Literal["video", "image", "text"]
    media: Path | None
    """The video."""
    turns: tuple[tuple[str, str], ...]
    scale: float
    """Factor by which frame times are multiplied."""
    pictures: tuple[Path, ...] = ()
    places: tuple[int, ...] = ()
    """The number of pictures at the front of each turn."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The video or the pictures."""
        return self.pictures if self.media is None else (self.media,)


@dataclasses.dataclass(frozen=True)
class RecordSet:
    """The well-formed records, and one line about each malformed one."""

    records: list[Record]
    malformed: list[str]
    cut: int = 0
    """Number of records whose text was cut because their pictures do not stand at the front of a turn."""


def _usable_name(name: str) -> str:
    if not name.strip() or "\0" in name:
        raise ValueError("should be the name of a file")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise ValueError("should be a name that files can have") from None
    return name


type _FileName = Annotated[str, pydantic.AfterValidator(_usable_name)]


class _Set(Schema):
    model_config = pydantic.ConfigDict(extra="forbid")

    json_path: _FileName
    sampling_strategy: str = "all"


class _Sets(Schema):
    datasets: list[_Set] = pydantic.Field(min_length=1)


class _Turn(Schema):
    speaker: Literal["human", "gpt"] = pydantic.Field(alias="from")
    value: str


class _Row(Schema):
    id: str | int | float | None = None
    video: _FileName | None = None
    image: list[_FileName] | None = None
    scale: float = pydantic.Field(1.0, gt=0, le=1e6)
    conversations: list[_Turn] = pydantic.Field(min_length=1)

    @pydantic.field_validator("image", mode="before")
    @classmethod
    def _list_of_images(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _turns_alternate(self) -> _Row:
        for number, turn in enumerate(self.conversations):
            expected = ("human", "gpt")[number % 2]
            if turn.speaker != expected:
                raise ValueError(f"turn {number + 1} is from {turn.speaker}, expected {expected} (turns alternate)")
        if len(self.conversations) % 2:
            raise ValueError(f"{len(self.conversations)} turns: the last human turn has no answer")
        return self

    @pydantic.model_validator(mode="after")
    def _media_has_its_place(self) -> _Row:
        if self.video is not None and self.image is not None:
            raise ValueError("has both a video and an image")
        places = sum(turn.value.count(IMAGE) for turn in self.conversations)
        if self.video is None and not self.image:
            if places:
                raise ValueError(f"contains {IMAGE} but has no video or image")
        elif self.image:
            if places != len(self.image):
                raise ValueError(f"contains {IMAGE} {places} times for {len(self.image)} images")
        elif not self.conversations[0].value.startswith(IMAGE):
            raise ValueError(f"the first human turn does not start with {IMAGE}")
        elif places > 1:
            raise ValueError(f"contains {IMAGE} {places} times, expected once")
        return self


def read_records(path: Path, seed: int, media_root: Path | None = None) -> RecordSet:
    """All records of the data sets in a YAML file, or of one JSON file, in their order.

    `random:N` draws with `seed` and the number of the data set. Malformed records are left out and reported.

    Raises:
      UserError: a file is missing or malformed as a whole, or no record is well formed.
    """
    single = path.suffix in (".json", ".jsonl")
    sets = [_Set(json_path=path.name)] if single else read_yaml(path, _Sets).datasets
    records: list[Record] = []
    malformed: list[str] = []
    cut = 0
    roots: set[Path] = set()
    for number, entry in enumerate(sets):
        file = path.parent / entry.json_path
        root = media_root or file.parent
        roots.add(root)
        rng, where = random.Random(f"{seed} {number}"), f"{path}: data set {number + 1}"
        for index, row in _sampled(_rows(file), entry.sampling_strategy, rng, where):
            try:
                records.append(_record(row, index, root, file))
                cut += _is_cut(row)
            except UserError as e:
                malformed.append(str(e))
    records, misplaced = _without_folders_of_media(records, roots)
    malformed += misplaced
    if not records:
        raise UserError(f"{path}: the data set is empty{f' ({malformed[0]})' if malformed else ''}")
    return RecordSet(records, malformed, cut)


def _rows(path: Path) -> list[Any]:
    """The rows of a JSON or JSONL file. A JSONL line that is not JSON is replaced by its error."""
    if path.suffix != ".jsonl":
        return read_json(path, list[Any], max_bytes=None)
    rows: list[Any] = []
    for line in io.BytesIO(read_bytes(path, max_bytes=None)):  # only \n ends a line of JSONL
        if line.strip():
            try:
                rows.append(parse_json(line, object, f"{path}: record {len(rows)}"))
            except UserError as e:
                rows.append(e)
    return rows


def _sampled(rows: list[Any], strategy: str, rng: random.Random, where: str) -> Iterator[tuple[int, Any]]:
    """(index in the file, row) of the rows that a sampling strategy selects."""
    indexed = list(enumerate(rows))
    if strategy == "all":
        return iter(indexed)
    kind, _, amount = strategy.partition(":")
    try:
        share = amount.endswith("%")
        value = float(amount[:-1]) if share else int(amount)
        if kind not in ("first", "end", "random") or not 0 <= value < math.inf or (share and value > 100):
            raise ValueError
    except ValueError:
        text = shorten(strategy, _ID_LENGTH)
        raise UserError(
            f"{where}: sampling_strategy {text!r} is none of all, first:N, end:N, random:N (N or N%)"
        ) from None
    count = math.ceil(len(rows) * value / 100) if share else int(value)
    if kind == "random":
        rng.shuffle(indexed)
    return iter(indexed[max(len(indexed) - count, 0) :] if kind == "end" else indexed[:count])


def _record(row: Any, index: int, root: Path, file: Path) -> Record:
    """Converts a row. Raises UserError if it is malformed."""
    if isinstance(row, UserError):
        raise row
    name = f" (id {shorten(row['id'], _ID_LENGTH)})" if isinstance(row, dict) and "id" in row else ""
    checked = check(row, _Row, f"{file}: record {index}{name}")
    roles, values = zip(*((_ROLES[turn.speaker], turn.value) for turn in checked.conversations), strict=True)
    identifier = shorten(index if checked.id is None else checked.id, _ID_LENGTH)
    if not checked.image:
        turns = tuple(zip(roles, (values[0].removeprefix(IMAGE), *values[1:]), strict=True))
        video = None if checked.video is None else root / checked.video
        return Record(identifier, "text" if video is None else "video", video, turns, checked.scale)
    texts, places = zip(*map(_pictures_first, values), strict=True)
    pictures = tuple(root / name for name in checked.image)
    return Record(identifier, "image", None, tuple(zip(roles, texts, strict=True)), checked.scale, pictures, places)


def _pictures_first(value: str) -> tuple[str, int]:
    """The text of a turn without its pictures, and their number, as upstream's trainer reads it."""
    count = value.count(IMAGE)
    if count == 1 and not value.startswith(IMAGE):
        value = f"{IMAGE}\n{value.replace(IMAGE, '').strip()}".strip()
    value = value.replace(_NOISE, "")
    return value[count * len(IMAGE) :], count


def _is_cut(row: Any) -> bool:
    """Whether upstream's rule cuts text of a well-formed row, because its pictures do not stand at the front of a turn."""
    if not row.get("image"):
        return False
    values = [turn["value"] for turn in row["conversations"]]
    return any((k := value.count(IMAGE)) > 1 and not value.startswith(IMAGE * k) for value in values)


def _without_folders_of_media(records: list[Record], roots: set[Path]) -> tuple[list[Record], list[str]]:
    """Removes records whose video is a media root or a folder that holds media of other records.

    A video may be a folder of frames. These folders were given by mistake: the images in them are not frames.
    """
    holders: set[str] = set()

    def add(folder: str) -> None:
        while folder not in holders:
            holders.add(folder)
            folder = os.path.dirname(folder)

    places = [os.path.abspath(r.media) if r.media is not None else None for r in records]
    for root in roots:
        add(os.path.abspath(root))
    for place in places:
        if place is not None:
            add(os.path.dirname(place))
    kept, misplaced = [], []
    for record, place in zip(records, places, strict=True):
        if place in holders:
            misplaced.append(f"sample {record.id}: {record.media} is the folder of other media, not a video")
        else:
            kept.append(record)
    return kept, misplaced
