"""Answers a file of videos and questions on all hosts of a Ray cluster, into a folder of Parquet files."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xl2jax.checkpoint.params import stored_config
from xl2jax.checkpoint.sources import find_checkpoint
from xl2jax.errors import UserError, require_whole
from xl2jax.inference.devices import Devices
from xl2jax.inference.selection import check_pool
from xl2jax.ray.cluster import check_share, cluster, require_ray, room_for
from xl2jax.ray.output import (
    Done,
    collect_journals,
    count_errors,
    errors_in,
    file_of,
    keep_settings,
    locked,
    open_journal,
    remove_journal,
    write_rows,
)
from xl2jax.ray.questions import Fault, Settings, answer_rows
from xl2jax.ray.rows import Columns, Part, divide, open_rows, read_part

logger = logging.getLogger(__name__)

_MOST_BLOCKS = 10_000
"""Ray's own cost for a block is milliseconds: with more parts than this, several share one."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did: rows that were in the output before, rows of this run, and those of them that have an error."""

    before: int
    answered: int
    errors: int


def answer_file(
    source: Path,
    output: Path,
    settings: Settings,
    *,
    columns: Columns = Columns(),  # noqa: B008 (frozen)
    root: Path | None = None,
    rows_per_file: int = 256,
    actors: int | None = None,
    num_gpus: float | None = None,
    num_cpus: float = 1.0,
    address: str | None = None,
) -> Summary:
    """Answers the rows of a JSONL or Parquet file that the folder `output` has no answers to.

    `source`, `output`, the videos and the checkpoint must be at the same paths on all hosts. Rows about one video that
    stand together share one watching. What cannot be asked gets an `error` in place of an answer.

    Args:
      root: the folder that paths of videos are relative to; by default that of `source`.
      rows_per_file: rows of a file of the output, about.
      actors: how many processes load the model; by default as many as the cluster has room for.
      num_gpus, num_cpus: what each of them has; by default as many GPUs as `settings.load["tensor"]`, or one.
      address: of the cluster, see `cluster.cluster`.

    Raises UserError where the input, the output or the cluster cannot be used. What was answered until then is kept.
    """
    require_ray()
    require_whole("--rows-per-file", rows_per_file, 1)
    tensor = settings.tensor
    num_gpus = float(tensor) if num_gpus is None else num_gpus
    check_share(num_gpus, num_cpus, actors, "--actors", tensor)
    source, output = Path(os.path.abspath(source)), Path(os.path.abspath(output))
    work = _Work(source, output, columns, Path(os.path.abspath(root or source.parent)), settings)
    file = open_rows(source, columns)
    _check_checkpoint(settings)
    with locked(output):
        keep_settings(output, json.loads(json.dumps(settings.described() | {"root": str(work.root)})))
        collect_journals(output)
        done = Done(output)
        parts = list(divide(done.left(_counted(file.rows()), source), rows_per_file))
        left = sum(part.last - part.first + 1 for part in parts)
        logger.info("%d rows, %d of them left", done.count + left, left)
        errors = 0
        if parts:
            with cluster(address), tqdm(total=done.count + left, desc="answer", unit="row") as bar:
                bar.update(done.count)
                actors = room_for(actors, num_gpus, num_cpus, "actors")
                for result in _run(work, parts, min(actors, len(parts)), num_gpus, num_cpus):
                    if result["failure"]:
                        raise UserError(result["failure"])
                    bar.update(result["rows"])
                    errors += result["errors"]
        return Summary(done.count, left, errors)


def _check_checkpoint(settings: Settings) -> None:
    """Raises UserError where the actors could not use the checkpoint, as far as its config tells."""
    config = stored_config(find_checkpoint(settings.checkpoint), settings.load.get("weights"))
    if settings.bilevel is not None:
        check_pool(settings.bilevel, config.visual_tokens)
    Devices(settings.tensor).check(config)


def _counted(rows: Iterator[Any]) -> Iterator[Any]:
    with tqdm(desc="read", unit="row", delay=2) as bar:
        for row in rows:
            bar.update()
            yield row


@dataclasses.dataclass(frozen=True)
class _Work:
    """What an actor needs to know beside the part that it answers."""

    source: Path
    output: Path
    columns: Columns
    root: Path
    settings: Settings


def _run(work: _Work, parts: list[Part], actors: int, num_gpus: float, num_cpus: float) -> Iterator[dict[str, Any]]:
    """What the actors say about the parts, in any order. Ray starts an actor that died again, and brings it its parts."""
    import ray.data

    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    items = [dataclasses.asdict(part) for part in parts]
    return iter(
        ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS))
        .map_batches(
            _Actor,
            fn_constructor_args=(work,),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_gpus=num_gpus,
            num_cpus=num_cpus,
        )
        .iter_rows()
    )


class _Actor:
    """A process of the cluster with a loaded model.

    What the user can mend is a value, `failure`: an exception would be printed by Ray as pages of its own code.
    """

    def __init__(self, work: _Work):
        self._work, self._failure = work, ""
        try:
            import xl2jax
            from xl2jax.system.backend import start_backend

            start_backend()
            self._model = xl2jax.load(work.settings.checkpoint, **work.settings.load)
            self._file = open_rows(work.source, work.columns)
        except UserError as e:
            self._failure = str(e)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        part = Part(*(int(batch[field.name][0]) for field in dataclasses.fields(Part)))
        errors = 0
        if not self._failure:
            try:
                errors = self._answer(part)
            except UserError as e:
                self._failure = str(e)
        return {"rows": [part.last - part.first + 1], "errors": [errors], "failure": [self._failure]}

    def _answer(self, part: Part) -> int:
        """Answers a part. Returns how many of its rows have an error."""
        work = self._work
        target = file_of(work.output, part.first, part.last)
        with open_journal(work.output, part) as journal:
            if target.exists():  # Ray had not heard that this was done before
                remove_journal(work.output, part)
                return errors_in(target)
            try:
                answer_rows(self._model, list(read_part(self._file, part)), work.root, work.settings, journal)
            except Fault:
                # A device that failed once fails for ever in the same process: a new one tries again.
                os._exit(1)
            write_rows(work.output, journal.rows)
            remove_journal(work.output, part)
            return count_errors(journal.rows)
