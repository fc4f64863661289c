"""Plans which samples form which batch, before training begins and from the lengths of the samples only.

The plan is a pure function of lengths, seed and batch sizes. The position in the data is therefore a single number, and
a run that resumes with other worker processes continues with the same batches.

The samples of a step have similar lengths: windows of the shuffled samples are sorted by length and cut into steps, and
the steps are shuffled again. A step consists of micro-batches, each of `rows` rows of one shape, which the devices
process at once. The samples of a step do not depend on the number of devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from xl2jax.arithmetic import round_up
from xl2jax.config import VideoXL2Config
from xl2jax.inference.layout import bucket
from xl2jax.prompt import PromptTokenizer
from xl2jax.system.process_pool import in_processes, in_threads
from xl2jax.training.records import Record
from xl2jax.training.samples import open_media, read_frames, read_tiles, sample_tokens, unusable
from xl2jax.video.frame_sampling import FrameSampling

_TOKEN_UNIT = 64  # row lengths are multiples of this
_WINDOW = 32  # number of steps whose samples are sorted by length together


@dataclasses.dataclass(frozen=True)
class Length:
    """The size of a sample: groups of 4 frames, tokens, and tiles of pictures."""

    groups: int
    tokens: int
    tiles: int = dataclasses.field(default=0, repr=False)
    """Their number follows from the tokens. `repr` leaves it out, so that runs without pictures keep their identity."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """The length of each record, or None if it cannot be used; `problems` then has the reason by record number."""

    lengths: tuple[Length | None, ...]
    problems: dict[int, str]
    cut: frozenset[int]
    """Numbers of the records that are longer than the limit and are cut."""


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Rows of record numbers, and the shape to which all rows are padded. Only packed rows hold several records."""

    rows: tuple[tuple[int, ...], ...]
    groups: int
    tokens: int
    samples: int
    """Number of samples that a row has room for: a power of two, so that few shapes are compiled."""
    tiles: int = 0


def probe_records(
    records: Sequence[Record],
    sampling: FrameSampling,
    tokenizer: PromptTokenizer,
    model: VideoXL2Config,
    max_length: int,
    *,
    threads: int,
    workers: int = 0,
    progress: bool = False,
    decode: bool = False,
) -> Probe:
    """Measures every record by opening its media. With `decode` it also reads all frames and pictures.

    The work runs in `workers` processes, or with 0 in `threads` threads of this process.
    """
    probe = _RecordProbe(sampling, tokenizer, model, max_length, decode)
    label = "read the data" if decode else "measure the data"
    results = in_processes(workers, probe, records) if workers else in_threads(threads, probe, records)
    with contextlib.closing(results):
        answers = list(tqdm(results, label, len(records), disable=not progress, unit="sample"))
    return Probe(
        tuple(None if isinstance(x, str) else x[0] for x in answers),
        {i: x for i, x in enumerate(answers) if isinstance(x, str)},
        frozenset(i for i, x in enumerate(answers) if not isinstance(x, str) and x[1]),
    )


@dataclasses.dataclass(frozen=True)
class _RecordProbe:
    """Gives a record's length and whether it is cut, or the reason why it cannot be used."""

    sampling: FrameSampling
    tokenizer: PromptTokenizer
    model: VideoXL2Config
    max_length: int
    decode: bool

    def __call__(self, record: Record) -> tuple[Length, bool] | str:
        try:
            media = open_media(record, self.sampling, self.model)
            tokens = sample_tokens(record, media, self.tokenizer, self.model, self.max_length)
            if self.decode:
                read_frames(record, media, self.model.vision.image_size)
                read_tiles(record, self.model)
        except Exception as e:
            return unusable(e)
        return Length(media.groups, len(tokens.ids), sum(media.tiles)), tokens.cut


def plan_epoch(
    lengths: Sequence[Length], batch: int, rows: int, seed: int, epoch: int, *, pack_to: int | None = None
) -> list[list[MicroBatch]]:
    """The steps of one epoch, each a list of micro-batches. Every sample occurs once.

    A step has `batch` rows; the last step of an epoch may have fewer. A micro-batch has `rows` rows; some rows of the
    last micro-batch may be empty. With `pack_to`, a row holds several samples with at most that many tokens together.
    """
    rng = np.random.default_rng([seed, epoch])
    order = [int(i) for i in rng.permutation(len(lengths))]
    steps: list[list[tuple[int, ...]]] = []
    size = batch * _WINDOW
    for first in range(0, len(order), size):
        window = sorted(
            order[first : first + size], key=lambda i: (lengths[i].groups, lengths[i].tiles, lengths[i].tokens)
        )
        filled: list[tuple[int, ...]] = [(i,) for i in window] if pack_to is None else _packed(window, lengths, pack_to)
        steps += [filled[start : start + batch] for start in range(0, len(filled), batch)]

    def micro_batch(part: list[tuple[int, ...]]) -> MicroBatch:
        return MicroBatch(
            rows=(*part, *[()] * (rows - len(part))),
            groups=padded_groups(max(sum(lengths[i].groups for i in row) for row in part)),
            tokens=padded_tokens(max(sum(lengths[i].tokens for i in row) for row in part)),
            samples=1 << (max(len(row) for row in part) - 1).bit_length(),
            tiles=padded_tiles(max(sum(lengths[i].tiles for i in row) for row in part)),
        )

    return [
        [micro_batch(steps[n][i : i + rows]) for i in range(0, len(steps[n]), rows)]
        for n in rng.permutation(len(steps))
    ]


def padded_groups(groups: int) -> int:
    """The number of groups that rows of at most `groups` are padded to; 0 where no row has frames.

    From 5 on it is even. The patches of an odd number of groups are no multiple of 8, and on GPUs XLA then pads the
    operands of every product in the vision tower by copying them, which costs about a fifth of its time. Above 64, where
    exact numbers would be too many shapes, at most a quarter is added.
    """
    if groups <= 4:
        return groups
    return round_up(groups, 2) if groups <= 64 else bucket(groups, 2)


def padded_tiles(tiles: int) -> int:
    """The number of tiles that rows of at most `tiles` are padded to; 0 where no row has pictures."""
    return bucket(tiles, 1 if tiles <= 4 else 2) if tiles else 0


def padded_tokens(tokens: int) -> int:
    """The number of tokens that rows of at most `tokens` are padded to."""
    return bucket(tokens, _TOKEN_UNIT)


def _packed(window: list[int], lengths: Sequence[Length], limit: int) -> list[tuple[int, ...]]:
    """Packs samples into rows of at most `limit` tokens: first fit, beginning with the longest sample."""
    bins: list[tuple[int, list[int]]] = []
    for i in reversed(window):
        tokens = lengths[i].tokens
        for n, (used, members) in enumerate(bins):
            if used + tokens <= limit:
                members.append(i)
                bins[n] = (used + tokens, members)
                break
        else:
            bins.append((tokens, [i]))
    return [tuple(members) for _, members in bins]
