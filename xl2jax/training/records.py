"""Training records: upstream's YAML of JSON lists, read and checked before anything is trained.

    datasets:
      - json_path: talks.json            # relative to the YAML file
        sampling_strategy: first:10%     # all | first:N | end:N | random:N, N a number or a share in %

    [{"id": "7", "video": "talk.mp4", "scale": 1.0,
      "conversations": [{"from": "human", "value": "<image>\\nWho speaks?"}, {"from": "gpt", "value": "Ada."}]}]

`image` in place of `video` is one picture; with neither the record is text. Media paths are relative to
the media root, by default the folder of the JSON file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from xl2jax.errors import UserError

IMAGE = "<image>"

_ROLES = {"human": "user", "gpt": "assistant"}
_SHOWN = 3  # problems named in one error


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample. `turns` are (user | assistant, text), the first without its leading `<image>`."""

    id: str
    kind: Literal["video", "image", "text"]
    media: Path | None
    turns: tuple[tuple[str, str], ...]
    scale: float


def read_records(path: Path, seed: int, media_root: Path | None = None) -> list[Record]:
    """All records that a YAML file (or one JSON file) names, in its order.

    `random:N` draws with `seed` and the number of the data set.

    Raises:
      UserError: a file is missing or malformed, a record is wrong (the first few are named), nothing is left.
    """
    sets = [{"json_path": path.name}] if path.suffix in (".json", ".jsonl") else _yaml_sets(path)
    records: list[Record] = []
    problems: list[str] = []
    for number, entry in enumerate(sets):
        where = f"{path}: data set {number + 1}"
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
            raise UserError(f"{where}: has no json_path")
        unknown = sorted(set(entry) - {"json_path", "sampling_strategy"})
        if unknown:
            raise UserError(f"{where}: unknown field {', '.join(map(str, unknown))}")
        file = path.parent / entry["json_path"]
        rows = _sampled(
            _json_rows(file), entry.get("sampling_strategy", "all"), random.Random(f"{seed} {number}"), where
        )
        for index, row in rows:
            try:
                records.append(_record(row, str(index), media_root or file.parent))
            except ValueError as e:
                name = f" (id {row['id']})" if isinstance(row, dict) and "id" in row else ""
                problems.append(f"{file}: record {index}{name}: {e}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError("; ".join(problems[:_SHOWN]) + more)
    if not records:
        raise UserError(f"{path}: the data set is empty")
    return records


def _yaml_sets(path: Path) -> list[Any]:
    text = _text(path)
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not YAML ({e})") from None
    sets = raw.get("datasets") if isinstance(raw, dict) else None
    if not isinstance(sets, list) or not sets:
        raise UserError(f"{path}: no list `datasets`")
    return sets


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from None


def _json_rows(path: Path) -> list[Any]:
    text = _text(path)
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: not JSON ({e})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: not a list of records")
    return rows


def _sampled(rows: list[Any], strategy: Any, rng: random.Random, where: str) -> Iterator[tuple[int, Any]]:
    """(index in the file, row) of the rows that a sampling strategy leaves."""
    indexed = list(enumerate(rows))
    if strategy == "all":
        return iter(indexed)
    kind, _, amount = str(strategy).partition(":")
    try:
        share = amount.endswith("%")
        value = float(amount[:-1]) if share else int(amount)
        if kind not in ("first", "end", "random") or not 0 <= value < math.inf or (share and value > 100):
            raise ValueError
    except ValueError:
        raise UserError(
            f"{where}: sampling_strategy {strategy!r} is none of all, first:N, end:N, random:N (N or N%)"
        ) from None
    count = math.ceil(len(rows) * value / 100) if share else int(value)
    if kind == "random":
        rng.shuffle(indexed)
    return iter(indexed[max(len(indexed) - count, 0) :] if kind == "end" else indexed[:count])


def _record(row: Any, index: str, root: Path) -> Record:
    """Raises ValueError with what is wrong."""
    if not isinstance(row, dict):
        raise ValueError("not an object")
    media = {kind: row[kind] for kind in ("video", "image") if row.get(kind) is not None}
    if len(media) == 2:
        raise ValueError("has both a video and an image")
    kind, name = next(iter(media.items()), ("text", None))
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{kind} is not one path" + (" (several images are not supported)" if kind == "image" else ""))
    scale = row.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"scale {scale!r} is not a positive number")
    turns = _turns(row.get("conversations"))
    found = sum(text.count(IMAGE) for _, text in turns)
    if name is None and found:
        raise ValueError(f"{IMAGE} without a video or an image")
    if name is not None:
        if not turns[0][1].startswith(IMAGE):
            raise ValueError(f"the first human turn does not start with {IMAGE}")
        if found > 1:
            raise ValueError(f"{found} times {IMAGE}, expected one")
        turns[0] = (turns[0][0], turns[0][1].removeprefix(IMAGE))
    path = None if name is None else root / name
    return Record(str(row.get("id", index)), kind, path, tuple(turns), float(scale))  # type: ignore[arg-type]


def _turns(raw: Any) -> list[tuple[str, str]]:
    if not isinstance(raw, list) or not raw:
        raise ValueError("has no conversations")
    turns = []
    for number, turn in enumerate(raw):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in _ROLES:
            raise ValueError(f"turn {number + 1} is not {{from: human | gpt, value: text}}")
        expected = ("human", "gpt")[number % 2]
        if turn["from"] != expected:
            raise ValueError(f"turn {number + 1} is from {turn['from']}, expected {expected} (turns alternate)")
        turns.append((_ROLES[turn["from"]], turn["value"]))
    if len(turns) % 2:
        raise ValueError(f"{len(turns)} turns: the last human turn has no answer")
    return turns
