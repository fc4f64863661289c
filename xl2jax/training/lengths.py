"""Measures which samples can be used and how long they are, before the first step.

The output folder keeps the lengths in `lengths.json`, so that the next start is fast. A length is stored under a hash
of the sample's contents (its text, and a fingerprint of its media): the data may move to another folder, and a file
that was replaced is measured again. Samples that cannot be used are not stored, so each start tries them again. For a
run that resumes, the file also names the samples that the run began with.
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
    """Hash of the text and the media."""


class _Media(Schema):
    mark: str
    fingerprint: str


class _Entry(Schema):
    id: str
    content: str
    groups: int = pydantic.Field(ge=0)
    tokens: int = pydantic.Field(ge=1)
    cut: bool
    tiles: int = pydantic.Field(0, ge=0)


class Lengths(Schema):
    """The contents of lengths.json."""

    settings: str
    """Hash of the other inputs of a length: how frames are sampled, and the tokenizer."""
    media: dict[str, _Media]
    """By path: the fingerprint, and the `change_mark` at that time."""
    samples: list[_Entry]
    """The usable samples, in the order of the records."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """The result of `measure`."""

    samples: list[Sample]
    problems: list[str]
    """One line for each record that cannot be used."""
    cut: int
    """Number of samples that are longer than the limit."""
    stored: Lengths


def read_lengths(output: Path) -> Lengths | None:
    """The lengths.json of an earlier start, or None if there is none or it cannot be read."""
    path = output / FILE
    if not path.exists():
        return None
    try:
        return read_json(path, Lengths, max_bytes=None)
    except UserError as e:
        logger.warning("%s: all samples are measured again", e)
        return None


def write_lengths(output: Path, lengths: Lengths) -> None:
    """Writes lengths.json. Raises UserError if that fails."""
    with replacing_file(output / FILE) as temporary:
        temporary.write_text(lengths.model_dump_json() + "\n", encoding="utf-8")


def measure(
    records: Sequence[Record],
    settings: str,
    before: Lengths | None,
    probe: Callable[[list[Record]], Probe],
    threads: int,
) -> Measured:
    """Measures all records. Known lengths come from `before`, the others from `probe`, which opens the media."""
    known = {x.content: x for x in before.samples} if before is not None and before.settings == settings else {}
    media, problems = _fingerprints(records, {} if before is None else before.media, threads)
    contents: dict[int, str] = {}
    for number, record in enumerate(records):
        if number not in problems:
            contents[number] = _content(record, [media[_key(path)].fingerprint for path in record.files])
    new = [number for number, content in contents.items() if content not in known]
    probed = probe([records[number] for number in new]) if new else Probe((), {}, frozenset())
    lengths = {n: (Length(x.groups, x.tokens, x.tiles), x.cut) for n, c in contents.items() if (x := known.get(c))}
    for position, number in enumerate(new):
        length = probed.lengths[position]
        if length is None:
            problems[number] = probed.problems[position]
        else:
            lengths[number] = (length, position in probed.cut)
    samples, entries = [], []
    for number in sorted(lengths):
        record, content, (length, cut) = records[number], contents[number], lengths[number]
        samples.append(Sample(record, length, content))
        entries.append(_Entry(id=record.id, content=content, cut=cut, **dataclasses.asdict(length)))
    return Measured(
        samples,
        [f"sample {records[number].id}: {problems[number]}" for number in sorted(problems)],
        sum(x.cut for x in entries),
        Lengths(settings=settings, media=media, samples=entries),
    )


def _content(record: Record, fingerprints: list[str]) -> str:
    """Hash of the text and the media of a record."""
    if record.pictures:
        return digest("pictures", record.turns, record.places, fingerprints)
    return digest(record.kind, record.turns, record.scale, "".join(fingerprints))


def samples_digest(samples: Sequence[Sample]) -> str:
    """Hash of the contents and lengths of the samples, in their order."""
    return digest(*((x.content, x.length) for x in samples))


def differences(before: Lengths | None, now: Lengths) -> str:
    """Describes how the samples of a run have changed."""
    if before is None:
        return f"without {FILE} the changes cannot be listed"
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
    return ", ".join(parts) or "their order changed"


def _key(media: Path) -> str:
    return os.path.abspath(media)


def _fingerprints(
    records: Sequence[Record], before: dict[str, _Media], threads: int
) -> tuple[dict[str, _Media], dict[int, str]]:
    """Marks and fingerprints of all media by path; by record number, why the media of some records cannot be read."""

    def fingerprint(path: Path) -> _Media | str:
        try:
            mark, known = change_mark(path), before.get(_key(path))
            if known is not None and known.mark == mark:
                return known
            return _Media(mark=mark, fingerprint=media_fingerprint(path))
        except OSError as e:
            return str(unreadable(path, e))
        except UserError as e:
            return str(e)

    paths = list(dict.fromkeys(path for record in records for path in record.files))
    results = dict(zip(paths, in_threads(threads, fingerprint, paths), strict=True))
    problems = {n: x for n, r in enumerate(records) for path in r.files if isinstance(x := results[path], str)}
    return {_key(p): x for p, x in results.items() if isinstance(x, _Media)}, problems
