"""Upstream's selection files: which parts of a video matter to a question, found beforehand by another model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from pydantic import Field

from xl2jax.errors import UserError, listing
from xl2jax.system.schema import Schema, read_json

_Count = Annotated[int, Field(ge=1, le=2**20)]
_Unit = Annotated[int, Field(ge=0, le=2**20)]


class _Config(Schema):
    selected_topk: Annotated[int, Field(ge=0, le=2**20)] | None
    """None where the lists have different lengths."""
    selected_chunk_size: _Count
    compression: _Count


class _Category(Schema):
    config: _Config
    selected_unit_indices: dict[str, list[_Unit]]


@dataclasses.dataclass(frozen=True)
class Selection:
    """One question's entry: the chosen units (of 2 groups), most relevant first, and how the video is read."""

    units: list[int]
    select_chunk_groups: int
    pool: int


def read_selection(path: Path, video: str, question: str, category: str | None) -> Selection | None:
    """One question's entry of a selection file, or None where the file has none.

    The key is `<video file name>_<question>`, also tried without the suffix of the file name (as LVBench's files have
    it). Without `category` all categories are searched.

    Raises UserError for a file that is not a selection file, and for a category that it does not have.
    """
    categories = read_json(path, dict[str, _Category | None])
    if category is not None:
        if category not in categories:
            raise UserError(f"{path}: no category {category!r} (it has {listing(categories) or 'none'})")
        categories = {category: categories[category]}
    for entry in filter(None, categories.values()):
        for name in (video, Path(video).stem):
            units, config = entry.selected_unit_indices.get(f"{name}_{question}"), entry.config
            if units is not None:
                return Selection(units[: config.selected_topk], config.selected_chunk_size, config.compression)
    return None


def read_selections(path: Path) -> dict[str, Selection]:
    """All entries of a selection file by their keys, as upstream reads it: the last of several categories wins, and
    lists are taken whole.

    Raises UserError for a file that is not a selection file.
    """
    return {
        key: Selection(units, entry.config.selected_chunk_size, entry.config.compression)
        for entry in filter(None, read_json(path, dict[str, _Category | None]).values())
        for key, units in entry.selected_unit_indices.items()
    }
