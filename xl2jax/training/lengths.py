"""Which samples can be used and what each takes: looked at before the first step, kept in the output folder.

`lengths.json` spares the next start most of the work. A length is kept by what its sample holds (its text, a
fingerprint of its media), so the data may move to another folder, and a file that was replaced is looked at again. What
cannot be used is not kept: each start tries it anew. Beside a checkpoint the file says which samples the run began with.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pydantic

from xl2jax.errors import UserError
from xl2jax.system.atomic import replacing_file
from xl2jax.system.process_pool import in_threads
from xl2jax.system.schema import Schema, read_json, unreadable
from xl2jax.training.batches import Length, Probe
from xl2jax.training.fingerprint import change_mark, digest, media_fingerprint
from xl2jax.training.records import Record

logger = logging.getLogger(__name__)

FILE = "lengths.json"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A record that can be used."""

    record: Record
    length: Length
    content: str
    """Hash of its text and its media."""


class _Media(Schema):
    mark: str
    fingerprint: str


class _Entry(Schema):
    id: str
    content: str
    groups: int = pydantic.Field(ge=0)
    tokens: int = pydantic.Field(ge=1)
    cut: bool


class Lengths(Schema):
    """What lengths.json holds."""

    settings: str
    """Hash of all else that lengths follow from: how frames are sampled, the tokenizer."""
    media: dict[str, _Media]
    """By path: `change_mark` when the fingerprint was taken."""
    samples: list[_Entry]
    """Those that can be used, in the order of the records."""


@dataclasses.dataclass(frozen=True)
class Measured:
    samples: list[Sample]
    problems: list[str]
    """One line for each record that cannot be used."""
    cut: int
    """Samples that are longer than the limit."""
    stored: Lengths


def read_lengths(output: Path) -> Lengths | None:
    """What the last start kept, None where it kept nothing that can be read."""
    path = output / FILE
    if not path.exists():
        return None
    try:
        return read_json(path, Lengths, max_bytes=None)
    except UserError as e:
        logger.warning("%s: all samples are looked at again", e)
        return None


def write_lengths(output: Path, lengths: Lengths) -> None:
    with replacing_file(output / FILE) as beside:
        beside.write_text(lengths.model_dump_json() + "\n", encoding="utf-8")


def measure(
    records: Sequence[Record],
    settings: str,
    before: Lengths | None,
    probe: Callable[[list[Record]], Probe],
    threads: int,
) -> Measured:
    """All records that can be used with their lengths: from `before` where it has them, from `probe` else."""
    known = {x.content: x for x in before.samples} if before is not None and before.settings == settings else {}
    media, problems = _look_at_media(records, {} if before is None else before.media, threads)
    contents: dict[int, str] = {}
    for number, record in enumerate(records):
        if number not in problems:
            fingerprint = "" if record.media is None else media[_place(record.media)].fingerprint
            contents[number] = digest(record.kind, record.turns, record.scale, fingerprint)
    new = [number for number, content in contents.items() if content not in known]
    probed = probe([records[number] for number in new]) if new else Probe((), {}, frozenset())
    lengths = {n: (known[c].groups, known[c].tokens, known[c].cut) for n, c in contents.items() if c in known}
    for position, number in enumerate(new):
        length = probed.lengths[position]
        if length is None:
            problems[number] = probed.problems[position]
        else:
            lengths[number] = (length.groups, length.tokens, position in probed.cut)
    samples, entries = [], []
    for number in sorted(lengths):
        record, content, (groups, tokens, cut) = records[number], contents[number], lengths[number]
        samples.append(Sample(record, Length(groups, tokens), content))
        entries.append(_Entry(id=record.id, content=content, groups=groups, tokens=tokens, cut=cut))
    return Measured(
        samples,
        [f"sample {records[number].id}: {problems[number]}" for number in sorted(problems)],
        sum(x.cut for x in entries),
        Lengths(settings=settings, media=media, samples=entries),
    )


def samples_digest(samples: Sequence[Sample]) -> str:
    """Hash of what is trained on: contents and lengths, in their order."""
    return digest(*((x.content, x.length) for x in samples))


def differences(before: Lengths | None, now: Lengths) -> str:
    """How the samples of a run changed, in words."""
    if before is None:
        return f"without {FILE} they cannot be named"
    old, new = (Counter((x.id, x.content) for x in lengths.samples) for lengths in (before, now))
    only_old, only_new = ([id for id, _ in (x - y).elements()] for x, y in ((old, new), (new, old)))
    changed = set(only_old) & set(only_new)
    kinds = {
        "vanished": [id for id in only_old if id not in changed],
        "changed": [id for id in only_new if id in changed],
        "appeared": [id for id in only_new if id not in changed],
    }
    parts = [
        f"{len(ids)} {kind} ({', '.join(ids[:5])}{', ...' * (len(ids) > 5)})" for kind, ids in kinds.items() if ids
    ]
    return ", ".join(parts) or "they stand in another order"


def _place(media: Path) -> str:
    return os.path.abspath(media)


def _look_at_media(
    records: Sequence[Record], before: dict[str, _Media], threads: int
) -> tuple[dict[str, _Media], dict[int, str]]:
    """Mark and fingerprint of all media by path, and why that of some records cannot be read, by record number."""

    def look_at(path: Path) -> _Media | str:
        try:
            mark, known = change_mark(path), before.get(_place(path))
            if known is not None and known.mark == mark:
                return known
            return _Media(mark=mark, fingerprint=media_fingerprint(path))
        except OSError as e:
            return str(unreadable(path, e))
        except UserError as e:
            return str(e)

    paths = list(dict.fromkeys(r.media for r in records if r.media is not None))
    looks = dict(zip(paths, in_threads(threads, look_at, paths), strict=True))
    problems = {n: x for n, r in enumerate(records) if r.media is not None and isinstance(x := looks[r.media], str)}
    return {_place(p): x for p, x in looks.items() if isinstance(x, _Media)}, problems
