"""`xl2jax ray-batch`: answers a file of videos and questions on all hosts of a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from xl2jax.commands.flags import DEFAULT_CHECKPOINT, TensorFlags, require_checkpoint
from xl2jax.commands.infer import reading
from xl2jax.commands.infer_flags import AnswerArgs, ComputeArgs, FrameArgs
from xl2jax.errors import UserError
from xl2jax.inference.generate import TokenSampling, check_answer_options
from xl2jax.ray.batch import answer_file
from xl2jax.ray.questions import Settings
from xl2jax.ray.rows import Columns
from xl2jax.system.terminal import flag_errors, require_stdout

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ClusterArgs:
    """The cluster, and what each process that loads the model has of it."""

    address: str | None = None
    """Address of a Ray cluster, or auto for the one of this host; by default RAY_ADDRESS of the environment, and without
    it Ray is started on this host and ended again."""
    actors: int | None = None
    """How many processes load the model; by default as many as the cluster has room for."""
    num_gpus: float | None = None
    """GPUs of each; by default as many as --tensor says. 0 computes on CPUs, and 0.5 lets two share a GPU."""
    num_cpus: float = 1.0
    """CPU cores of each, which read videos."""


@dataclasses.dataclass(frozen=True)
class ColumnArgs:
    """The columns of the input."""

    video_column: str = "video"
    """Column with the path of a video."""
    question_column: str = "question"
    """Column with the question."""
    id_column: str | None = None
    """Column of text or whole numbers that is copied to the output as id."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Answers a file of videos and questions on all hosts of a Ray cluster."""

    input: Annotated[Path, tyro.conf.arg(aliases=["-i"])]
    """File of rows: Parquet by its name (.parquet), otherwise a JSON object a line."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder of Parquet files. Rows that it has are not asked again."""
    checkpoint: str = str(DEFAULT_CHECKPOINT)
    """Orbax folder, PyTorch folder or hub id (BAAI/Video-XL-2)."""
    root: Path | None = None
    """Folder that paths of videos are relative to; by default that of --input."""
    rows_per_file: int = 256
    """Rows of a file of the output, about."""
    json: bool = False
    """Prints one JSON object about the run."""
    cluster: tyro.conf.OmitArgPrefixes[ClusterArgs] = ClusterArgs()
    columns: tyro.conf.OmitArgPrefixes[ColumnArgs] = ColumnArgs()
    frames: tyro.conf.OmitArgPrefixes[FrameArgs] = dataclasses.field(default_factory=FrameArgs)
    answer: tyro.conf.OmitArgPrefixes[AnswerArgs] = dataclasses.field(default_factory=AnswerArgs)
    compute: tyro.conf.OmitArgPrefixes[ComputeArgs] = dataclasses.field(default_factory=ComputeArgs)
    split: tyro.conf.OmitArgPrefixes[TensorFlags] = dataclasses.field(default_factory=TensorFlags)


def main() -> int:
    """Runs the command and returns its exit status."""
    with flag_errors():
        args = tyro.cli(Args)
    if args.json:
        require_stdout()
    require_checkpoint(args.checkpoint)
    check_answer_options(args.answer.max_new_tokens, args.answer.seed)
    if args.root is not None and not args.root.is_dir():
        raise UserError(f"--root {args.root}: no such folder")
    read, columns, cluster = reading(args.frames, args.compute), args.columns, args.cluster
    # Actors on other hosts have other working directories.
    checkpoint = os.path.abspath(args.checkpoint) if os.path.exists(args.checkpoint) else args.checkpoint
    settings = Settings(
        checkpoint,
        {"dtype": args.compute.dtype, "weights": args.compute.weights, "tensor": args.split.devices().tensor},
        read.frames,
        read.folder_fps,
        read.prefill,
        read.bilevel,
        read.cache,
        TokenSampling(args.answer.temperature, args.answer.top_p),
        args.answer.max_new_tokens,
        args.answer.seed,
    )
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what its processes say
        done = answer_file(
            args.input,
            args.output,
            settings,
            columns=Columns(columns.video_column, columns.question_column, columns.id_column),
            root=args.root,
            rows_per_file=args.rows_per_file,
            actors=cluster.actors,
            num_gpus=cluster.num_gpus,
            num_cpus=cluster.num_cpus,
            address=cluster.address,
        )
    logger.info("%d rows answered, %d of them with an error, in %s", done.answered, done.errors, args.output)
    if args.json:
        print(json.dumps(dataclasses.asdict(done)))
    return 0
