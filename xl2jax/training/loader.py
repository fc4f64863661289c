"""Reads micro-batches as arrays. grain reads them ahead in threads or worker processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from typing import TypedDict

import grain
import numpy as np
from absl import flags

from xl2jax.config import FRAMES_PER_GROUP, VideoXL2Config
from xl2jax.errors import UserError
from xl2jax.prompt import PromptTokenizer
from xl2jax.system.process_pool import KILLED, ignore_interrupts
from xl2jax.training.batches import MicroBatch
from xl2jax.training.loss import IGNORE
from xl2jax.training.records import Record
from xl2jax.training.samples import open_media, read_frames, read_tiles, sample_tokens, unusable
from xl2jax.video.frame_sampling import FrameSampling


class Arrays(TypedDict):
    """The rows of a micro-batch that one process reads. B rows, F frames, N tiles, T tokens."""

    pixels: np.ndarray  # uint8 [B, F, size, size, 3]
    tiles: np.ndarray  # uint8 [B, N, size, size, 3]
    ids: np.ndarray  # int32 [B, T]; see `TokenBatch` for this and the next three
    visual: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray  # int32 [B, M]
    samples: list[str]  # ids of the samples that were read
    failed: list[str]  # "id: reason" for each sample that could not be read


@dataclasses.dataclass(frozen=True)
class Loader:
    """Reads the rows of one process. It is pickled into worker processes."""

    records: Sequence[Record]
    sampling: FrameSampling
    tokenizer: PromptTokenizer
    model: VideoXL2Config
    max_length: int

    def __call__(self, batch: MicroBatch) -> Arrays:
        """Reads a micro-batch. The place of a sample that cannot be read stays empty."""
        model, shape, size = self.model, (len(batch.rows), batch.tokens), self.model.vision.image_size
        all_tiles = np.zeros((len(batch.rows), batch.tiles, size, size, 3), np.uint8)
        frames = np.zeros((len(batch.rows), batch.groups * FRAMES_PER_GROUP, size, size, 3), np.uint8)
        ids, lengths = np.zeros(shape, np.int32), np.zeros((len(batch.rows), batch.samples), np.int32)
        visual, labels = np.full(shape, -1, np.int32), np.full(shape, IGNORE, np.int32)
        samples, failed = [], []
        for b, row in enumerate(batch.rows):
            t = f = n = read = 0
            for index in row:
                record = self.records[index]
                try:
                    media = open_media(record, self.sampling, model)
                    tokens = sample_tokens(record, media, self.tokenizer, model, self.max_length)
                    pixels, tiles = read_frames(record, media, size), read_tiles(record, model)
                except Exception as e:
                    failed.append(f"{record.id}: {unusable(e)}")
                    continue
                columns = slice(t, t + len(tokens.ids))
                fits = f + len(pixels) <= frames.shape[1] and n + len(tiles) <= batch.tiles
                if columns.stop > batch.tokens or not fits:
                    failed.append(f"{record.id}: longer than when training began; was the file changed?")
                    continue
                ids[b, columns], labels[b, columns] = tokens.ids, tokens.labels
                offset = f // FRAMES_PER_GROUP * model.visual_tokens
                if record.pictures:
                    offset = batch.groups * model.visual_tokens + n * model.tile_tokens
                visual[b, columns] = np.where(tokens.visual < 0, -1, tokens.visual + offset)
                labels[b, t] = IGNORE  # in a packed row, the token before belongs to another sample
                frames[b, f : f + len(pixels)], all_tiles[b, n : n + len(tiles)] = pixels, tiles
                lengths[b, read] = len(tokens.ids)
                t, f, n, read = columns.stop, f + len(pixels), n + len(tiles), read + 1
                samples.append(record.id)
        return Arrays(
            pixels=frames,
            tiles=all_tiles,
            ids=ids,
            visual=visual,
            labels=labels,
            lengths=lengths,
            samples=samples,
            failed=failed,
        )


def read_ahead(
    plan: Sequence[MicroBatch], loader: Loader, start: int, *, process: int, processes: int, workers: int, threads: int
) -> Generator[Arrays]:
    """Yields this process's rows of `plan[start:]`, in order. Close the generator to free what was read ahead.

    Reads in `workers` processes of `threads` threads each, or with 0 workers in threads of this process.

    Raises:
      UserError: a worker process was killed.
    """
    rows = len(plan[0].rows) // processes
    local_rows = slice(process * rows, (process + 1) * rows)
    local = [dataclasses.replace(m, rows=m.rows[local_rows]) for m in plan[start:]]
    data = grain.MapDataset.source(local).map(loader)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    stream = data.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads absl flags before it starts processes
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2), ignore_interrupts
        )
    iterator = iter(stream)
    try:
        yield from iterator
    except RuntimeError as e:
        if "terminated unexpectedly" not in str(e):
            raise
        raise UserError(KILLED) from e
    finally:
        iterator.close()
